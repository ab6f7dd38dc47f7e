"""`attend` on Dask arrays: each chunk of queries with each chunk of keys is a task of its own.

A task calls `_fused.attend` on its chunks, whatever arrays these are; the averages over chunks of keys
are merged by a tree. The logits of two chunks live in their task alone, and nothing is computed here.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import dask.array as da
from dask.array.utils import meta_from_array

from . import _attend, _fused
from ._attend import Average, Keys, PairWeight, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Array = Any
    # A Dask array (..., N) whose chunks are each an `Average` of that many queries.
    Averages = Any
    # The axes of an array: those of one name are cut at the same places.
    Names = tuple[str, ...]
    Chunks = dict[str, tuple[int, ...]]


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
    lead = len(_attend.leading_axes(q, sets, pair_bias, pair_weight))
    weigh, mask, arrays = pair_weight or (None, None, ())
    operands = [(q, "n", "d"), (pair_bias, "n", "m0"), (mask, "n")]
    for number, keys in enumerate(sets):
        m = f"m{number}"
        operands += [(keys.k, m, "d"), (keys.v, m, "e"), (keys.bias, m)]
    operands += [(x, f"rows {number}", f"columns {number}") for number, x in enumerate(arrays)]
    chunks, (of_q, of_pair_bias, of_mask, *others) = _laid_out(lead, operands)
    of_sets, of_arrays = others[: 3 * len(sets)], others[3 * len(sets) :]

    together: tuple[list[Any], list[float | None]] = ([], [])
    parts = []
    for number, keys in enumerate(sets):
        operands = of_sets[3 * number : 3 * number + 3]
        if keys.k.numblocks[-2] == 1:
            together[0].extend(operands)
            together[1].append(keys.kappa)
            continue
        part = _tasks(
            _average,
            (*_lead(lead), "n", f"m{number}"),
            chunks,
            [of_q, of_pair_bias, (None, None), *operands],
            kappas=[keys.kappa],
            weigh=None,
            scale=scale,
            is_causal=False,
        )
        parts.append(
            da.reduction(
                part,
                _as_it_is,
                _merged_along,
                axis=-1,
                dtype=q.dtype,
                concatenate=False,
                meta=meta_from_array(q, ndim=part.ndim - 1),
            )
        )
    names = (*_lead(lead), "n")
    if together[0]:
        operands = [of_q, of_pair_bias, of_mask, *together[0], *of_arrays]
        parts.append(
            _tasks(
                _average,
                names,
                chunks,
                operands,
                kappas=together[1],
                weigh=weigh,
                scale=scale,
                is_causal=is_causal,
            )
        )
    if len(parts) > 1:
        parts = [_tasks(_merged, names, chunks, [(part, names) for part in parts])]
    e = max(keys.v.shape[-1] for keys in sets)
    out, log_norm = (
        _tasks(_item, (*names, *last), {**chunks, "e": (e,)}, [(parts[0], names)], number=number)
        for number, last in enumerate((("e",), ()))
    )
    return Average(out, log_norm)


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


def _laid_out(
    lead: int, operands: Sequence[tuple[Any, ...]]
) -> tuple[Chunks, list[tuple[Any, Names | None]]]:
    """The chunks of each axis, and the arrays in them, features in one chunk.

    Tokens stay cut as the first array has them, leading axes as the one with the most chunks.
    """
    named: list[tuple[Any, Names | None]] = []
    chunks: Chunks = {}
    for x, *trailing in operands:
        if x is None:
            named.append((None, None))
            continue
        axes = x.ndim - len(trailing)
        names = (*_lead(lead)[lead - axes :], *trailing)
        named.append((x, names))
        for axis, (name, cut) in enumerate(zip(names, x.chunks, strict=True)):
            own = cut if axis < axes or name[0] in "nm" else (sum(cut),)
            known = chunks.get(name)
            if known is None or (axis < axes and (len(own) > len(known) or known == (1,))):
                chunks[name] = own
    return chunks, [
        (x, names)
        if names is None
        else (
            x.rechunk(
                tuple(
                    cut if size == 1 else chunks[name]
                    for name, size, cut in zip(names, x.shape, x.chunks, strict=True)
                )
            ),
            names,
        )
        for x, names in named
    ]


def _tasks(
    function: Callable[..., Any],
    names: Names,
    chunks: Chunks,
    operands: Sequence[tuple[Any, Names | None]],
    **options: Any,
) -> Array:
    """`function` of the chunks that meet, a task for each; not fused with what makes them.

    Fused, a chunk of keys would be made once for each chunk of queries.
    """
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
        concatenate=False,
        dtype=like.dtype,
        meta=meta_from_array(like, ndim=len(names)),
        **options,
    )


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
    q, pair_bias, mask, *others = (_chunk(x) for x in (q, pair_bias, mask, *others))
    sets = [Keys(*others[3 * number : 3 * number + 3], kappa) for number, kappa in enumerate(kappas)]
    weight = None if weigh is None else PairWeight(weigh, mask, tuple(others[3 * len(kappas) :]))
    return _fused.attend(q, *sets, scale=scale, pair_bias=pair_bias, pair_weight=weight, is_causal=is_causal)


def _chunk(x: Any) -> Any:
    """What Dask gives in a list for each axis that the result has not."""
    while isinstance(x, list):
        (x,) = x
    return x


def _as_it_is(x: Average, **_: Any) -> Average:
    return x


def _merged_along(parts: Any, **_: Any) -> Average:
    return _merged(*(parts if isinstance(parts, list) else [parts]))


def _merged(*parts: Average) -> Average:
    return reduce(merge, parts)


def _item(average: Average, number: int) -> Array:
    return average[number]


def _slices(cut: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in cut:
        yield slice(start, start + size)
        start += size


def _in_one_chunk(keys: Keys) -> Keys:
    bias = None if keys.bias is None else keys.bias.rechunk({-1: -1})
    return Keys(keys.k.rechunk({-2: -1}), keys.v.rechunk({-2: -1}), bias, keys.kappa)
