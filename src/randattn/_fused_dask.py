"""`attend` on Dask arrays: each chunk of queries with each chunk of keys is a task of its own.

A task calls `_fused.attend` on its chunks, whatever arrays these are; the averages over chunks of keys
are merged by a tree. The logits of two chunks live in their task alone, and nothing is computed here.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import dask.array as da
from dask.array.utils import meta_from_array

from . import _attend, _fused
from ._attend import Average, Keys, PairWeight, merge
from ._inputs import placement
from ._tracing import namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Array = Any
    # A Dask array (..., N) whose chunks are each an `Average` of that many queries.
    Averages = Any
    # The axes of an array: those of one name are cut at the same places.
    Names = tuple[str, ...]
    Chunks = dict[str, tuple[int, ...]]
    Operand = tuple[Any, Names | None]


def attend(
    q: Array,
    sets: Sequence[Keys],
    scale: float,
    pair_bias: Array | None,
    pair_weight: PairWeight | None,
    is_causal: bool,
) -> Average:
    """`_attend.attend`, cut as the queries are."""
    if is_causal and max(q.numblocks[-2], sets[0].k.numblocks[-2]) > 1:
        return _causal(q, sets, scale, pair_bias, pair_weight)
    if pair_weight is not None:
        # It may look at all keys of a query.
        sets = [_in_one_chunk(keys) for keys in sets]
    lead = _lead(len(_attend.leading_axes(q, sets, pair_bias, pair_weight)))
    names = (*lead, "n")
    weigh, mask, arrays = pair_weight or (None, None, ())
    given: list[tuple[Any, ...]] = [(q, "n", "d"), (mask, "n")]
    for number, keys in enumerate(sets):
        m = f"m{number}"
        given += [(keys.k, m, "d"), (keys.v, m, "e"), (keys.bias, m)]
    given += [(x, f"rows {number}", f"columns {number}") for number, x in enumerate(arrays)]
    given.append((pair_bias, "n", "m0"))
    chunks, (of_q, of_mask, *others, of_pair_bias) = _laid_out(lead, given)
    of_arrays = others[3 * len(sets) :]

    parts: list[Averages] = []
    together: list[Operand] = []
    kappas = []
    for number, keys in enumerate(sets):
        of_keys = others[3 * number : 3 * number + 3]
        if keys.k.numblocks[-2] == 1:
            together += of_keys
            kappas.append(keys.kappa)
            continue
        operands = [of_q, of_pair_bias, (None, None), *of_keys]
        average = partial(_average, kappas=[keys.kappa], weigh=None, scale=scale, is_causal=False)
        part = _tasks(average, (*names, f"m{number}"), chunks, operands)
        meta = meta_from_array(q, ndim=len(names))
        parts.append(
            da.reduction(
                part, _unchanged, _merged_along, axis=-1, dtype=q.dtype, meta=meta, concatenate=False
            )
        )
    if kappas:
        operands = [of_q, of_pair_bias, of_mask, *together, *of_arrays]
        average = partial(_average, kappas=kappas, weigh=weigh, scale=scale, is_causal=is_causal)
        parts.append(_tasks(average, names, chunks, operands))
    if len(parts) > 1:
        parts = [_tasks(_merged, names, chunks, [(part, names) for part in parts])]
    return _apart(parts[0], names, chunks, sets[0].v.shape[-1])


def _causal(
    q: Array, sets: Sequence[Keys], scale: float, pair_bias: Array | None, pair_weight: PairWeight | None
) -> Average:
    """A chunk of queries at a time, with the keys beside it, and those before it without a mask."""
    if pair_weight is not None:
        return _attend.attend(
            q, *sets, scale=scale, pair_bias=pair_bias, pair_weight=pair_weight, is_causal=True
        )
    first, *others = sets
    done = []
    for rows in _slices(q.chunks[-2]):
        before = slice(0, rows.start)
        beside, earlier = (
            None if pair_bias is None else pair_bias[..., rows, columns] for columns in (rows, before)
        )
        queries = q[..., rows, :]
        parts = [attend(queries, [_in_one_chunk(first.of(rows))], scale, beside, None, is_causal=True)]
        if rows.start:
            parts.append(attend(queries, [first.of(before)], scale, earlier, None, is_causal=False))
        if others:
            parts.append(attend(queries, others, scale, None, None, is_causal=False))
        done.append(reduce(merge, parts))
    outs, log_norms = zip(*done, strict=True)
    return Average(da.concatenate(outs, axis=-2), da.concatenate(log_norms, axis=-1))


def _lead(count: int) -> Names:
    """Names of leading axes, counted from the last one."""
    return tuple(f"lead {axis}" for axis in range(-count, 0))


def _laid_out(lead: Names, given: Sequence[tuple[Any, ...]]) -> tuple[Chunks, list[Operand]]:
    """How each axis is cut, and the arrays, given with the names of their trailing axes, cut so.

    Tokens stay cut as the first array has them, leading axes as the one with the most chunks; features
    are not cut.
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
            chunks.setdefault(name, cut if name[0] in "nm" else (sum(cut),))
    return chunks, [_cut(x, names, chunks) for x, names in operands]


def _cut(x: Array, names: Names | None, chunks: Chunks) -> Operand:
    if names is None:
        return x, names
    own = zip(names, x.shape, x.chunks, strict=True)
    return x.rechunk(
        tuple(cut if size == 1 else chunks[name] for name, size, cut in own), method="tasks"
    ), names


def _tasks(
    function: Callable[..., Any],
    names: Names,
    chunks: Chunks,
    operands: Sequence[Operand],
) -> Array:
    """`function` of the chunks that meet, a task for each."""
    like = operands[0][0]
    known = {name for _, axes in operands if axes for name in axes}
    whole = {name: chunks[name] for name in names if name not in known}
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
    operands: list[Operand] = [(averages, names)]
    out = _tasks(itemgetter(0), (*names, "e"), {**chunks, "e": (features,)}, operands)
    return Average(out, _tasks(itemgetter(1), names, chunks, operands))


def _average(
    q: Any,
    pair_bias: Any,
    mask: Any,
    *others: Any,
    kappas: Sequence[float | None],
    weigh: Callable[..., Array] | None,
    scale: float,
    is_causal: bool,
) -> Average:
    """The average of some chunks."""
    q, pair_bias, mask, *rest = (_chunk(x) for x in (q, pair_bias, mask, *others))
    of_sets = zip(rest[::3], rest[1::3], rest[2::3], kappas, strict=False)
    sets = [Keys(*keys) for keys in of_sets]
    weight = None if weigh is None else PairWeight(weigh, mask, tuple(rest[3 * len(kappas) :]))
    return _fused.attend(q, *sets, scale=scale, pair_bias=pair_bias, pair_weight=weight, is_causal=is_causal)


def _chunk(x: Any) -> Any:
    """What Dask gives in a list for each axis that the result has not."""
    while isinstance(x, list):
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
    return Keys(
        keys.k.rechunk({-2: -1}, method="tasks"), keys.v.rechunk({-2: -1}, method="tasks"), bias, keys.kappa
    )


def most_tokens(x: Array) -> int:
    """The tokens (axis -2) of the largest chunk."""
    return int(max(x.chunks[-2]))


def cut_between_blocks(x: Array, length: int) -> Array:
    """Have no chunk end inside one of the blocks of so many tokens, and none much larger than it was."""
    return x.rechunk({-2: max(1, most_tokens(x) // length) * length}, method="tasks")


def cut_as(x: Array, like: Array) -> Array:
    """Have the tokens cut as those of `like`."""
    return x.rechunk({-2: like.chunks[-2]}, method="tasks")


def in_one(out: Array, log_norm: Array) -> Average:
    """Averages that are far fewer than tokens, in one chunk."""
    return Average(out.rechunk({-2: -1}, method="tasks"), log_norm.rechunk({-1: -1}, method="tasks"))


def regroup(
    function: Callable[..., Average], averages: Average, shape: tuple[int, ...], *indices: Any
) -> Average:
    """``function(averages, *indices)`` in a task for all that are in one chunk."""

    def of_chunks(out: Any, log_norm: Any) -> Average:
        return function(Average(_chunk(out), _chunk(log_norm)), *indices)

    out, log_norm = in_one(*averages)
    lead = _lead(out.ndim - 2)
    chunks, operands = _laid_out(lead, [(out, "a", "e"), (log_norm, "a")])
    names = (*lead, *(f"b{axis}" for axis in range(len(shape))))
    chunks |= {name: (size,) for name, size in zip(names[len(lead) :], shape, strict=True)}
    return _apart(_tasks(of_chunks, names, chunks, operands), names, chunks, out.shape[-1])


def with_whole_tokens(function: Callable[..., Array], size: int, *arrays: tuple[Array | None, int]) -> Array:
    """``function(*arrays)`` (..., N, size), N that of the first array, a task for each chunk of leading axes.

    Of each array the number of its trailing axes, which are in one chunk.
    """
    given: list[tuple[Any, ...]] = []
    first: Any = arrays[0][0]
    for number, (x, trailing) in enumerate(arrays):
        whole = x if x is None else x.rechunk({-1 - axis: -1 for axis in range(trailing)}, method="tasks")
        given.append((whole, *(f"{axis} {number}" for axis in range(trailing))))
    lead = _lead(max(x.ndim - trailing for x, trailing in arrays if x is not None))
    chunks, operands = _laid_out(lead, given)
    names = (*lead, "0 0", "result")
    chunks["result"] = (size,)
    found = da.blockwise(
        lambda *blocks: function(*map(_chunk, blocks)),
        names,
        *(part for x, own in operands for part in (x, own)),
        new_axes={"result": size},
        concatenate=True,
        dtype=first.dtype,
        meta=meta_from_array(first, ndim=len(names)),
    )
    return cut_as(found, first)


def along(rows: Any, tokens: Array) -> Array:
    """A NumPy array in as many chunks as the tokens."""
    return da.from_array(rows, chunks=(-(-rows.shape[0] // tokens.numblocks[-2]), *rows.shape[1:]))


def take(x: Array, index: Any, axis: int) -> Array:
    """`x` at a NumPy index: a chunk is taken from those that its tokens lie in."""
    axis %= x.ndim
    if x.numblocks[axis] > 1:
        return da.take(x, index, axis=axis)
    chunks = (*x.chunks[:axis], (index.size,), *x.chunks[axis + 1 :])
    return x.map_blocks(_take, index=index, axis=axis, chunks=chunks, dtype=x.dtype, meta=meta_from_array(x))


def _take(x: Array, index: Any, axis: int) -> Array:
    xp = namespace(x)
    return xp.take(x, xp.asarray(index, device=placement(x)), axis=axis)
