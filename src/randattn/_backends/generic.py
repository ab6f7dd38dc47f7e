"""The operations that estimators need of a library, by the array API standard alone.

A subclass for each library overrides the methods in which the library's own way is faster, or the only way.
The methods here serve arrays of all other libraries: array-api-strict, and arrays with
``__array_namespace__``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

from randattn._core import average as plain
from randattn._core import block_sizes
from randattn._core.average import Average, Keys, merge
from randattn._core.indexing import cut, joined, rows, slices
from randattn._core.library import Array, Library, check_known, hint, is_known, namespace, placement

S = TypeVar("S", bound="tuple[Any, ...]")


class Backend(Library):
    """An array library as estimators use it.

    Attributes
    ----------
    is_lazy : bool
        True where an array is a graph, whose values are computed on demand, chunk by chunk.
    compiles_loops : bool
        True where each shape of a block is a program, so that few shapes are better than few operations.
    """

    is_lazy = False
    compiles_loops = False

    # The call of an estimator.

    def call(self, function: Callable[..., Any], q: Array, *args: Any, **options: Any) -> Any:
        """Call an estimator in a context that changes none of its operations."""
        return function(q, *args, **options)

    def full_precision(self, x: Array) -> contextlib.AbstractContextManager[object]:  # noqa: ARG002
        """Return a context in which no operation rounds its arrays to a lower precision."""
        return contextlib.nullcontext()

    # The average.

    def attend(self, q: Array, sets: tuple[Keys, ...], scale: float) -> Average:
        """Average the values of all sets with weights ``exp(scale q . k + bias)``."""
        if scale != 1 and all(keys.pair_weight is None for keys in sets):
            # A pair weight is a function of the unscaled queries: with a pair weight the scale stays outside.
            of_keys = hint(sum(math.prod(keys.k.shape) for keys in sets))
            of_queries = hint(math.prod(q.shape))
            if 2 * of_queries < of_keys:
                # One scaled copy of the far shorter side costs less than scaling it again in each block.
                q, scale = q * scale, 1.0
            elif 2 * of_keys < of_queries:
                sets, scale = tuple(keys.scaled(scale) for keys in sets), 1.0
        if len(sets) == 1 or all(keys.pair_bias is None for keys in sets):
            return self.attend_together(q, sets, scale)
        # A pair bias is a matrix of all logits of its set: the set is averaged alone, then merged.
        together = tuple(keys for keys in sets if keys.pair_bias is None)
        parts = [self.attend_together(q, (keys,), scale) for keys in sets if keys.pair_bias is not None]
        if together:
            parts.insert(0, self.attend_together(q, together, scale))
        return reduce(merge, parts)

    def attend_together(self, q: Array, sets: tuple[Keys, ...], scale: float) -> Average:
        """Compute `attend` for sets without a pair bias, or for a single set."""
        return plain.attend(q, *sets, scale=scale)

    # Loops over tokens.

    def by_rows(self, function: Callable[..., Array], size: int, *arrays: tuple[Array, int]) -> Array:
        """Apply `function` to `size` rows at a time, and join the results to (..., rows, E).

        The number beside each array is its axis of rows, -1 or -2.
        """
        x, axis = arrays[0]
        if hint(x.shape[axis]) <= size:
            return function(*(x for x, _ in arrays))
        if not is_known(x.shape[axis]):
            count = x.shape[axis]
            parts = [cut(x, axis, plain.parts_of(count, size)) for x, axis in arrays]
            return joined([function(*part) for part in zip(*parts, strict=True)], -2, count)
        done = [
            function(*(x[..., part] if axis == -1 else x[..., part, :] for x, axis in arrays))
            for part in slices(x.shape[axis], size)
        ]
        return namespace(x).concat(done, axis=-2)

    def carry(
        self, function: Callable[..., tuple[Any, Array]], state: Any, *arrays: tuple[Array, int]
    ) -> tuple[Any, Array]:
        """Go along axis -2 of the arrays in blocks: `function` maps a state and rows to a state and results.

        The number beside each array counts the rows of a block.
        """
        x, size = arrays[0]
        check_known("k", "a causal form, which goes along the tokens a block at a time", x.shape[-2])
        if x.shape[-2] <= size:
            return function(state, *(x for x, _ in arrays))
        return self.carry_blocks(function, state, *arrays)

    def carry_blocks(
        self, function: Callable[..., tuple[Any, Array]], state: Any, *arrays: tuple[Array, int]
    ) -> tuple[Any, Array]:
        """Compute `carry` where there is more than one block."""
        x, done = arrays[0][0], []
        for parts in zip(*(slices(x.shape[-2], size) for x, size in arrays), strict=True):
            rows = (x[..., part, :] for (x, _), part in zip(arrays, parts, strict=True))
            state, out = function(state, *rows)
            done.append(out)
        return state, namespace(x).concat(done, axis=-2)

    # Entries of an array.

    def take(self, x: Array, index: Any, axis: int) -> Array:
        """Take from `x` at a NumPy index of any shape, which is flattened into the axis."""
        xp = namespace(x)
        return xp.take(x, xp.reshape(self.beside(index, x), (-1,)), axis=axis)

    def cumulative_sum(self, x: Array, axis: int) -> Array:
        """Return the running sums along an axis; each sum includes its own entry."""
        return namespace(x).cumulative_sum(x, axis=axis)

    def mean_of_rows(self, x: Array) -> Array:
        """Return the means (..., D) of rows (..., L, D)."""
        return namespace(x).mean(x, axis=-2)

    def constant(self, x: Array) -> Array:
        """Return `x` without gradients."""
        return x

    def is_at_hand(self, x: Array) -> bool:  # noqa: ARG002
        """Tell whether the host can read the values without waiting for a device or a program."""
        return False

    def largest(self, x: Array, count: int) -> Array:
        """Return the places of the `count` largest entries of the last axis, in any order."""
        return namespace(x).argsort(x, axis=-1)[..., x.shape[-1] - count :]

    def order_of(self, x: Array, *, stable: bool = False) -> Array:
        """Return the places of the entries of the last axis in ascending order.

        Equal entries come in any order, unless the sort is `stable`.
        """
        return namespace(x).argsort(x, axis=-1, stable=stable)

    def in_order(self, x: Array) -> Array:
        """Return the entries of the last axis in ascending order."""
        return namespace(x).sort(x, axis=-1, stable=False)

    def sums_by_group(self, x: Array, index: Array, group: Array, count: int) -> Array:
        """Sum the rows `index` (L, B, T) of `x` (L, S, X) by their groups (L, B, T): (L, B, C, X).

        Groups are in ascending order along axis T.
        """
        xp, (heads, blocks, taken_rows) = namespace(x), index.shape
        number = xp.arange(count, dtype=group.dtype, device=placement(x))
        ends = xp.sum(xp.astype(group[..., None, :] <= number[None, None, :, None], index.dtype), axis=-1)
        taken = rows(x, index)
        # Sums as differences of running sums, since the standard has no sum by index. The rounding is that of
        # the running sum, which may be far larger than the sum of a group.
        sums = self.cumulative_sum(xp.concat([xp.zeros_like(taken[..., :1, :]), taken], axis=-2), -2)
        sums = xp.reshape(sums, (heads * blocks, taken_rows + 1, x.shape[-1]))
        sums = rows(sums, xp.reshape(ends, (heads * blocks, count)))
        sums = xp.concat([sums[:, :1, :], sums[:, 1:, :] - sums[:, :-1, :]], axis=1)
        return xp.reshape(sums, (heads, blocks, count, x.shape[-1]))

    def marked(self, index: Array, count: int) -> Array:
        """Return whether each of `count` entries is in the index (..., n): (..., count), boolean."""
        xp = namespace(index)
        number = xp.arange(count, dtype=index.dtype, device=placement(index))
        return xp.any(index[..., None] == xp.reshape(number, (1,) * index.ndim + (count,)), axis=-2)

    def put(self, x: Array, new: Array, start: Array, axis: int) -> Array:
        """Return `x` with `new` along an axis from `start` on, an integer array; at the latest at the end."""
        xp, count, size = namespace(x), x.shape[axis], new.shape[axis]
        start = xp.where(start > count - size, count - size, start)
        place = xp.arange(count, dtype=start.dtype, device=placement(x)) - start
        is_new = (place >= 0) & (place < size)
        new = xp.take(new, xp.where(is_new, place, 0), axis=axis)
        shape = [1] * x.ndim
        shape[axis] = count
        return xp.where(xp.reshape(is_new, tuple(shape)), new, x)

    def when(self, condition: Array, function: Callable[[S], S], state: S) -> S:
        """Return ``function(state)`` where the condition, one boolean, is true; else the state."""
        # Both are computed: a trace does not know the condition, and to read it may wait for a device.
        xp = namespace(condition)
        both = zip(function(state), state, strict=True)
        return type(state)(*(xp.where(condition, new, old) for new, old in both))

    # Tokens on several devices, or in chunks.

    def lanes_of(self, x: Array) -> int:  # noqa: ARG002
        """Return the number of lanes: equal parts of the tokens (axis -2) that may be on separate devices."""
        return 1

    def everywhere(self, x: Average) -> Average:
        """Bring averages of groups to all devices that have tokens, or into one chunk."""
        return x

    def regroup(
        self,
        function: Callable[..., Average],
        averages: Average,
        shape: tuple[int, ...],  # noqa: ARG002
        *indices: Any,
    ) -> Average:
        """Return ``function(averages, *indices)``, from (..., A) to (..., *shape) averages."""
        return function(averages, *indices)

    def longest_chunk(self, x: Array) -> int | None:  # noqa: ARG002
        """Return the tokens (axis -2) of the longest chunk; None for an array without chunks."""
        return None

    def cut_between_blocks(self, x: Array, length: int) -> Array:  # noqa: ARG002
        """Cut the tokens so that no chunk ends within a block of `length` tokens."""
        return x

    def cut_tokens_as(self, x: Array, like: Array) -> Array:  # noqa: ARG002
        """Cut the tokens (axis -2) in the chunks of the tokens of `like`."""
        return x

    def along(self, rows: Any, tokens: Array) -> Array:
        """Bring a NumPy array with many rows beside `tokens`, in at most as many chunks."""
        return self.beside(rows, tokens)

    def with_whole_tokens(
        self,
        function: Callable[..., Array],
        rule: Any,
        size: int,  # noqa: ARG002
        heads: int,  # noqa: ARG002
        *arrays: tuple[Array | None, int],
    ) -> Array:
        """Return ``function(rule, *arrays)`` (..., N, size), which needs all tokens of an array at once.

        The number beside each array counts its trailing axes; `function` gets them in one chunk, and with
        them so many axes of heads. The function and the rule are those of `as_program`.
        """
        return self.as_program(function, rule, *(x for x, _ in arrays))

    def is_sharded(self, x: Array) -> bool:  # noqa: ARG002
        """Tell whether the tokens (axis -2) are in shards, as `over_shards` takes them: devices or chunks."""
        return False

    def over_shards(
        self,
        function: Callable[..., Average],
        rule: Any,
        size: int,  # noqa: ARG002
        *arrays: tuple[Array | None, int],
    ) -> Array:
        """Return ``function(rule, q, *keys).out`` (..., N, size), merged over the shards of the keys.

        No key leaves its shard; each shard has all queries, or a chunk of them. The arrays are q, and others
        with the tokens of the keys.
        """
        return function(rule, *(x for x, _ in arrays)).out

    def as_program(self, function: Callable[..., Array], rule: Any, *arrays: Array | None) -> Array:
        """Return ``function(rule, *arrays)``; a library that compiles keeps a program for both.

        The function must be one of a module, and the rule hashable: all else that changes what the function
        does must be part of the rule, or a kept program would do what it did before.
        """
        return function(rule, *arrays)


def mean_by_product(x: Array) -> Array:
    """Return the means (..., D) of rows (..., L, D) as a product with a row of ``1 / L``.

    The product takes a third of the time of a library's own mean.
    """
    xp = namespace(x)
    if hint(math.prod(x.shape)) <= block_sizes.SMALL_LOGITS:
        return xp.mean(x, axis=-2)
    share = xp.full((1, x.shape[-2]), 1 / x.shape[-2], dtype=x.dtype, device=placement(x))
    return xp.matmul(share, x)[..., 0, :]
