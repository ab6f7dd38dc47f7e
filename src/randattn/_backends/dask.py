"""Dask: a task for each pair of a chunk of queries and a chunk of keys.

A task attends from its chunks, which are arrays of any library. A tree merges the averages over chunks of
keys. The logits of two chunks exist in their task alone, and building the graph computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from operator import itemgetter
from typing import Any, NamedTuple

import dask.array as da
from dask.array.utils import meta_from_array

from randattn._core import average as plain
from randattn._core import library
from randattn._core.average import Average, Keys, PairWeight, merge
from randattn._core.library import Array, namespace, placement

from .generic import Backend

# A Dask array (..., N) in which each chunk is an `Average` of as many queries.
Averages = Any
# Names of the axes of an array: axes of one name are cut at the same places.
Names = tuple[str, ...]
Chunks = dict[str, tuple[int, ...]]
Operand = tuple[Any, Names | None]


class Dask(Backend):
    """Dask's arrays, which are graphs of chunks."""

    name = "dask"
    is_lazy = True

    def cut_as(self, x: Array, like: Array) -> Array:
        """Cut the last axis of a mask in the chunks of the tokens of `like`."""
        return x.rechunk({x.ndim - 1: like.chunks[-2]}, method="tasks")

    def attend(self, q: Array, sets: tuple[Keys, ...], scale: float) -> Average:
        """Attend from each chunk of queries in tasks of its own."""
        # A task numbers its queries and keys from 0, so that its causal mask would be wrong for other chunks.
        is_cut = any(keys.is_causal and max(q.numblocks[-2], keys.k.numblocks[-2]) > 1 for keys in sets)
        return _causal(q, sets, scale) if is_cut else _attend_chunks(q, sets, scale)

    def everywhere(self, x: Average) -> Average:
        """Bring averages of groups, which are far fewer than tokens, into one chunk."""
        # "tasks" here and below: with a distributed client Dask may choose "p2p", which waits for all chunks.
        return Average(x.out.rechunk({-2: -1}, method="tasks"), x.log_norm.rechunk({-1: -1}, method="tasks"))

    def regroup(
        self, function: Callable[..., Average], averages: Average, shape: tuple[int, ...], *indices: Any
    ) -> Average:
        """Return ``function(averages, *indices)``, in one task that has all averages in one chunk."""

        def of_chunks(out: Any, log_norm: Any) -> Average:
            return function(Average(_chunk(out), _chunk(log_norm)), *indices)

        out, log_norm = self.everywhere(averages)
        lead = _lead(out.ndim - 2)
        chunks, operands = _laid_out(lead, [(out, "a", "e"), (log_norm, "a")])
        names = (*lead, *(f"b{axis}" for axis in range(len(shape))))
        chunks |= {name: (size,) for name, size in zip(names[len(lead) :], shape, strict=True)}
        return _apart(_tasks(of_chunks, names, chunks, operands), names, chunks, out.shape[-1])

    def longest_chunk(self, x: Array) -> int | None:
        """Return the number of tokens (axis -2) of the longest chunk."""
        return int(max(x.chunks[-2]))

    def cut_between_blocks(self, x: Array, length: int) -> Array:
        """Cut the tokens so that no chunk ends within a block of `length` tokens."""
        # The longest chunk, rounded down to whole blocks: a chunk grows only where a block is longer.
        longest = int(max(x.chunks[-2]))
        return x.rechunk({-2: max(1, longest // length) * length}, method="tasks")

    def cut_tokens_as(self, x: Array, like: Array) -> Array:
        """Cut the tokens in the chunks of the tokens of `like`."""
        return x.rechunk({-2: like.chunks[-2]}, method="tasks")

    def along(self, rows: Any, tokens: Array) -> Array:
        """Bring a NumPy array beside the tokens, in at most as many chunks."""
        return da.from_array(rows, chunks=(-(-rows.shape[0] // tokens.numblocks[-2]), *rows.shape[1:]))

    def take(self, x: Array, index: Any, axis: int) -> Array:
        """Take from `x` at a NumPy index of any shape, which is flattened into the axis."""
        index, axis = index.reshape(-1), axis % x.ndim
        # Dask's own `take` plans which chunks each entry comes from; with one chunk no plan is needed.
        if x.numblocks[axis] > 1:
            return da.take(x, index, axis=axis)
        chunks = (*x.chunks[:axis], (index.size,), *x.chunks[axis + 1 :])
        return x.map_blocks(
            _take, index=index, axis=axis, chunks=chunks, dtype=x.dtype, meta=meta_from_array(x)
        )

    def with_whole_tokens(
        self,
        function: Callable[..., Array],
        rule: Any,
        size: int,
        heads: int,
        *arrays: tuple[Array | None, int],
    ) -> Array:
        """Return ``function(rule, *arrays)`` (..., N, size) in one task for each leading chunk.

        The result has the tokens of the first array, in the same chunks.
        """
        given: list[tuple[Any, ...]] = []
        first: Any = arrays[0][0]
        for number, (x, trailing) in enumerate(arrays):
            whole = x
            if x is not None:
                axes = min(x.ndim, trailing + heads)
                whole = x.rechunk({-1 - axis: -1 for axis in range(axes)}, method="tasks")
            given.append((whole, *(f"{axis} {number}" for axis in range(trailing))))
        lead = _lead(max(x.ndim - trailing for x, trailing in arrays if x is not None))
        chunks, operands = _laid_out(lead, given)
        names = (*lead, "0 0", "result")
        chunks["result"] = (size,)
        found = da.blockwise(
            lambda *blocks: function(rule, *map(_chunk, blocks)),
            names,
            *(part for x, own in operands for part in (x, own)),
            new_axes={"result": size},
            concatenate=True,
            dtype=first.dtype,
            meta=meta_from_array(first, ndim=len(names)),
        )
        return self.cut_tokens_as(found, first)

    def is_sharded(self, x: Array) -> bool:
        """Tell whether the tokens are in several chunks."""
        return bool(x.numblocks[-2] > 1)

    def over_shards(
        self,
        function: Callable[..., Average],
        rule: Any,
        size: int,
        *arrays: tuple[Array | None, int],
    ) -> Array:
        """Return ``function(rule, q, *keys).out``, by a task for each pair of chunks of queries and keys."""
        (q, _), *keys = arrays
        lead = _lead(max(x.ndim - trailing for x, trailing in arrays if x is not None))
        given = [
            (x, "m", *(f"of {number}" for _ in range(trailing - 1)))
            for number, (x, trailing) in enumerate(keys)
        ]
        chunks, operands = _laid_out(lead, [(q, "n", "d"), *given])
        names = (*lead, "n")
        part = _tasks(partial(_of_chunks, function, rule), (*names, "m"), chunks, operands)
        return _apart(_over_keys(part, q), names, chunks, size).out


BACKEND = Dask()


class _Rule(NamedTuple):
    """A set of keys without its arrays."""

    kappa: float | None
    function: Callable[..., Array] | None  # the function of the pair weight
    num_arrays: int  # the number of arrays of the pair weight
    is_causal: bool


def _attend_chunks(q: Array, sets: Sequence[Keys], scale: float) -> Average:
    # The factors of a query may depend on all its keys, which then must be in one chunk.
    sets = [keys if keys.pair_weight is None else _in_one_chunk(keys) for keys in sets]
    lead = _lead(len(plain.leading_axes(q, sets)))
    names = (*lead, "n")
    given: list[tuple[Any, ...]] = [(q, "n", "d")]
    for number, keys in enumerate(sets):
        m, weight = f"m{number}", keys.pair_weight
        given += [(keys.k, m, "d"), (keys.v, m, "e"), (keys.bias, m), (keys.pair_bias, "n", m)]
        given.append((None if weight is None else weight.mask, "n"))
        others = () if weight is None else weight.arrays
        given += [
            (x, f"rows {number} {which}", f"columns {number} {which}") for which, x in enumerate(others)
        ]
    chunks, (of_q, *left) = _laid_out(lead, given)

    parts: list[Averages] = []
    together: list[Operand] = []
    rules: list[_Rule] = []
    for number, keys in enumerate(sets):
        function, _, arrays = keys.pair_weight or (None, None, ())
        rule = _Rule(keys.kappa, function, len(arrays), keys.is_causal)
        operands, left = left[: 5 + len(arrays)], left[5 + len(arrays) :]
        if keys.k.numblocks[-2] == 1:
            together += operands
            rules.append(rule)
            continue
        average = partial(_average, rules=[rule], scale=scale)
        part = _tasks(average, (*names, f"m{number}"), chunks, [of_q, *operands])
        parts.append(_over_keys(part, q))
    if rules:
        average = partial(_average, rules=rules, scale=scale)
        parts.append(_tasks(average, names, chunks, [of_q, *together]))
    if len(parts) > 1:
        parts = [_tasks(_merged, names, chunks, [(part, names) for part in parts])]
    return _apart(parts[0], names, chunks, sets[0].v.shape[-1])


def _over_keys(parts: Averages, like: Array) -> Averages:
    """Merge averages along their last axis, whose chunks are chunks of keys."""
    meta = meta_from_array(like, ndim=parts.ndim - 1)
    # Chunks are tuples (`Average`), which Dask cannot concatenate; the tree merges a few at a time.
    merged = {"axis": -1, "dtype": like.dtype, "meta": meta, "concatenate": False}
    return da.reduction(parts, _unchanged, _merged_along, **merged)


def _causal(q: Array, sets: Sequence[Keys], scale: float) -> Average:
    """Attend from a chunk of queries at a time: with a mask to its own tokens, without to earlier keys."""
    if any(keys.pair_weight is not None for keys in sets):
        return plain.attend(q, *sets, scale=scale)
    done = []
    for rows in _slices(q.chunks[-2]):
        queries, parts = q[..., rows, :], []
        for keys in sets:
            here = keys.for_queries(rows)
            if not keys.is_causal:
                parts.append(_attend_chunks(queries, [here], scale))
                continue
            beside, before = (
                here.of(part)._replace(
                    pair_bias=None if here.pair_bias is None else here.pair_bias[..., part]
                )
                for part in (rows, slice(0, rows.start))
            )
            parts.append(_attend_chunks(queries, [_in_one_chunk(beside)._replace(is_causal=True)], scale))
            if rows.start:
                parts.append(_attend_chunks(queries, [before], scale))
        done.append(reduce(merge, parts))
    outs, log_norms = zip(*done, strict=True)
    return Average(da.concatenate(outs, axis=-2), da.concatenate(log_norms, axis=-1))


def _lead(count: int) -> Names:
    """Return names of the leading axes, counted from the last axis, as broadcasting counts them."""
    return tuple(f"lead {axis}" for axis in range(-count, 0))


def _laid_out(lead: Names, given: Sequence[tuple[Any, ...]]) -> tuple[Chunks, list[Operand]]:
    """Return the chunks of each axis, and the arrays in these chunks with the names of all their axes.

    Each array is given with the names of its trailing axes. Tokens keep the chunks of the first array that
    has them, and leading axes the chunks of the array with the most chunks. Features are in one chunk.
    """
    operands: list[Operand] = []
    chunks: Chunks = {}
    for x, *trailing in given:
        if x is None:
            operands.append((None, None))
            continue
        axes = x.ndim - len(trailing)
        names = (*lead[len(lead) - axes :], *trailing)
        operands.append((x, names))
        for name, cut in zip(names[:axes], x.chunks, strict=False):
            known = chunks.get(name, (1,))
            chunks[name] = cut if known == (1,) or len(cut) > len(known) else known
        for name, cut in zip(trailing, x.chunks[axes:], strict=True):
            # The names of token axes alone begin with "n" or "m".
            chunks.setdefault(name, cut if name[0] in "nm" else (sum(cut),))
    return chunks, [_cut(x, names, chunks) for x, names in operands]


def _cut(x: Array, names: Names | None, chunks: Chunks) -> Operand:
    if names is None:
        return x, names
    own = zip(names, x.shape, x.chunks, strict=True)
    return x.rechunk(
        tuple(cut if size == 1 else chunks[name] for name, size, cut in own), method="tasks"
    ), names


def _tasks(function: Callable[..., Any], names: Names, chunks: Chunks, operands: Sequence[Operand]) -> Array:
    """Apply `function` in a task for each combination of chunks."""
    like = operands[0][0]
    known = {name for _, axes in operands if axes for name in axes}
    whole = {name: chunks[name] for name in names if name not in known}
    # Without `dtype` and `meta` Dask would call `function` on empty arrays to learn its result.
    return da.blockwise(
        function,
        names,
        *(x for operand in operands for x in operand),
        new_axes=whole,
        adjust_chunks={name: chunks[name] for name in names if name in known},
        align_arrays=False,
        dtype=like.dtype,
        meta=meta_from_array(like, ndim=len(names)),
    )


def _apart(averages: Averages, names: Names, chunks: Chunks, features: int) -> Average:
    """Split chunks that are averages into an array `out` and an array `log_norm`."""
    operands: list[Operand] = [(averages, names)]
    out = _tasks(itemgetter(0), (*names, "e"), {**chunks, "e": (features,)}, operands)
    return Average(out, _tasks(itemgetter(1), names, chunks, operands))


def _average(q: Any, *others: Any, rules: Sequence[_Rule], scale: float) -> Average:
    """Attend from a chunk of queries to chunks of keys."""
    q, *left = (_chunk(x) for x in (q, *others))
    sets = []
    for kappa, function, count, is_causal in rules:
        (k, v, bias, pair_bias, mask, *arrays), left = left[: 5 + count], left[5 + count :]
        weight = None if function is None else PairWeight(function, mask, tuple(arrays))
        sets.append(Keys(k, v, bias, kappa, pair_bias, weight, is_causal))
    own: Any = library.known_library(q)
    found: Average = own.attend(q, tuple(sets), scale)
    return found


def _of_chunks(function: Callable[..., Average], rule: Any, *chunks: Any) -> Average:
    return function(rule, *map(_chunk, chunks))


def _chunk(x: Any) -> Any:
    """Take a chunk out of the nested lists that Dask passes for axes that the result has not."""
    while isinstance(x, list):
        # Such an axis has one chunk; two would raise here, not be dropped.
        (x,) = x
    return x


def _unchanged(x: Average, **_: Any) -> Average:
    return x


def _merged_along(parts: Any, **_: Any) -> Average:
    return _merged(*(parts if isinstance(parts, list) else [parts]))


def _merged(*parts: Average) -> Average:
    return reduce(merge, parts)


def _slices(cut: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in cut:
        yield slice(start, start + size)
        start += size


def _in_one_chunk(keys: Keys) -> Keys:
    bias = None if keys.bias is None else keys.bias.rechunk({-1: -1}, method="tasks")
    k, v = (x.rechunk({-2: -1}, method="tasks") for x in (keys.k, keys.v))
    return keys._replace(k=k, v=v, bias=bias)


def _take(x: Array, index: Any, axis: int) -> Array:
    xp = namespace(x)
    return xp.take(x, xp.asarray(index, device=placement(x)), axis=axis)
