"""NumPy: averages in blocks that stay in the cache, written over in place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from randattn._core import average as plain
from randattn._core import block_sizes
from randattn._core.average import Average, Keys
from randattn._core.checks import out_of_range
from randattn._core.library import Array, namespace

from . import inplace, inplace_ops
from .generic import Backend, mean_by_product


class InPlace(Backend):
    """A library whose arrays can be written to, and which computes at once."""

    operations = inplace_ops.BufferedOperations

    def block_logits(self) -> int:
        """Return the number of logits of a block."""
        return block_sizes.GPU_LOGITS

    def attend_together(self, q: Array, sets: tuple[Keys, ...], scale: float) -> Average:
        """Compute the average in place; with a pair bias or few logits, the plain average."""
        if sets[0].pair_bias is not None:
            return plain.attend(q, *sets, scale=scale)
        sets = tuple(keys.biased() for keys in sets)
        lead = math.prod(plain.leading_axes(q, sets))
        if lead * q.shape[-2] * sum(keys.k.shape[-2] for keys in sets) <= block_sizes.SMALL_LOGITS:
            return plain.attend_whole(q, sets, scale)
        return inplace.attend_in_blocks(q, sets, self.operations(q), scale, self.block_logits())

    def mean_of_rows(self, x: Array) -> Array:
        """Return the means (..., D) of rows (..., L, D)."""
        return mean_by_product(x)

    def largest(self, x: Array, count: int) -> Array:
        """Return the places of the `count` largest entries of the last axis, in any order."""
        rest = x.shape[-1] - count
        return namespace(x).argpartition(x, rest, axis=-1)[..., rest:] if rest else super().largest(x, count)

    def marked(self, index: Array, count: int) -> Array:
        """Return whether each entry is in the index."""
        xp, (*lead, size) = namespace(index), index.shape
        found = xp.zeros((math.prod(lead), count), dtype=xp.bool)
        found[xp.arange(found.shape[0])[:, None], xp.reshape(index, (-1, size))] = True
        return xp.reshape(found, (*lead, count))


class _NumpyOperations(inplace_ops.BufferedOperations):
    strided = looks = True

    def quietly(self) -> AbstractContextManager[object]:
        return np.errstate(over="ignore", invalid="ignore")


class Numpy(InPlace):
    """NumPy's arrays, whose values are on the host."""

    name = "numpy"
    operations = _NumpyOperations

    def block_logits(self) -> int:
        """Return the number of logits of a block."""
        return block_sizes.INPLACE_LOGITS

    def call(self, function: Callable[..., Any], q: Array, *args: Any, **options: Any) -> Any:
        """Call an estimator, and raise one error for an overflow, not a warning for each operation."""
        # A caller who ignores overflow gets the result as it is, NaN included.
        if np.geterr()["over"] == "ignore":
            return function(q, *args, **options)
        try:
            with np.errstate(over="raise"):
                return function(q, *args, **options)
        except FloatingPointError:
            error = out_of_range(dict(zip("qkv", (q, *args), strict=False)))
        # After the handler, so that the error does not show NumPy's own as its context.
        raise error

    def is_at_hand(self, x: Array) -> bool:  # noqa: ARG002
        """Return True: the values are on the host."""
        return True

    def sums_by_group(self, x: Array, index: Array, group: Array, count: int) -> Array:
        """Sum rows by their groups, by running sums, a row of all blocks at a time."""
        xp, (heads, blocks, size) = namespace(x), index.shape
        shape, block = (size, heads * blocks, x.shape[-1]), xp.arange(heads * blocks)
        first = xp.arange(0, heads * x.shape[1], x.shape[1])[:, None, None]
        index = xp.reshape(xp.moveaxis(index + first, -1, 0), (-1,))
        sums = xp.reshape(xp.take(xp.reshape(x, (-1, shape[-1])), index, axis=0), shape)
        for before, here in itertools.pairwise(sums):
            xp.add(before, here, out=here)
        group = group + xp.reshape(count * block, (heads, blocks, 1))
        counts = xp.bincount(xp.reshape(group, (-1,)), minlength=heads * blocks * count)
        ends = xp.cumulative_sum(xp.reshape(counts, (-1, count)), axis=-1)
        found = sums[xp.maximum(ends - 1, 0), block[:, None]]
        found[ends == 0] = 0
        # A copy, since both sides overlap.
        found[:, 1:] -= found[:, :-1].copy()
        return xp.reshape(found, (heads, blocks, count, shape[-1]))

    def put(self, x: Array, new: Array, start: Array, axis: int) -> Array:
        """Return a copy of `x` with `new` along an axis from `start` on."""
        first, index, x = min(int(start), x.shape[axis] - new.shape[axis]), [slice(None)] * x.ndim, x.copy()
        index[axis] = slice(first, first + new.shape[axis])
        x[tuple(index)] = new
        return x

    def when(self, condition: Array, function: Callable[[Any], Any], state: Any) -> Any:
        """Return ``function(state)`` where the condition is true; else the state itself, without a copy."""
        return function(state) if condition else state


BACKEND = Numpy()
