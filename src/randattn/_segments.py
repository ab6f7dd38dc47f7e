"""Pooling, grouping and windows on a grid of tokens, as `_plans.py` lays them."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from ._attend import Average, average_of_all, merge
from ._checks import check_broadcast, check_count
from ._fused import beside, chunked, everywhere, lanes_of, mean_of_rows, regroup, take
from ._inputs import hide, log_mask, placement, with_rank
from ._plans import blocks, divided, pieces
from ._shown import shown
from ._static import plain, static
from ._tracing import check_known, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._inputs import Inputs
    from ._plans import Blocks, Cuts, Members, Pieces, Sizes

    Array = Any


def pool(x: Array, at: Blocks, mask: Array | None) -> Average:
    """The mean token (..., B, D) of each block and the logarithm of its size, padding left out.

    A block of padding alone has a mean of zero and the size's logarithm -inf.
    """
    parts = in_pieces(x, at)
    if parts is not None:
        return union(pool(x, parts.atoms, mask), parts)[0]
    bias = gather_bias(x, mask, at)
    tokens = gather(hide(x, mask), at)
    if bias is None:
        xp, length = namespace(x), at.index.shape[1]
        mean = mean_of_rows(tokens)
        return Average(mean, xp.full(mean.shape[:-1], math.log(length), dtype=x.dtype, device=placement(x)))
    return average_of_all(bias, tokens)


def in_pieces(x: Array, at: Blocks) -> Pieces | None:
    """Blocks in pieces, where their tokens are laid over devices, or in chunks shorter than a block."""
    if at.laid is None:
        return None
    chunks = chunked(x)
    if chunks is not None:
        return divided(at, chunks.most_tokens(x))
    lanes = lanes_of(x)
    return pieces(at, lanes) if lanes > 1 else None


def gather(x: Array, at: Blocks) -> Array:
    """(..., N, D) -> (..., B, L, D)."""
    xp = namespace(x)
    if not at.in_order:
        x = _take(_with_edges(x, at), at.index, axis=-2, lanes=at.lanes)
    chunks = chunked(x)
    if chunks is not None:
        x = chunks.cut_between_blocks(x, at.index.shape[1])
    *lead, _, d = x.shape
    return xp.reshape(x, (*lead, *at.index.shape, d))


def _with_edges(x: Array, at: Blocks) -> Array:
    """Give each lane the first tokens of the next one: all that leaves a device."""
    if not at.edge:
        return x
    xp = namespace(x)
    *lead, n, d = x.shape
    x = xp.reshape(x, (*lead, at.lanes, n // at.lanes, d))
    x = xp.concat([x, xp.roll(x[..., : at.edge, :], -1, axis=-3)], axis=-2)
    return xp.reshape(x, (*lead, n + at.lanes * at.edge, d))


def gather_bias(x: Array, mask: Array | None, at: Blocks) -> Array | None:
    """0 for the tokens of each block, -inf for padding and what fills it up: (..., B, L); None for all 0."""
    if mask is None and at.valid is None:
        return None
    keep: Array = None
    if at.valid is not None:
        keep = with_rank(along(at.valid, x), x.ndim)
    if mask is not None:
        tokens = gather(mask[..., None], at)[..., 0]
        keep = tokens if keep is None else tokens & keep
    return log_mask(keep, x)


def along(rows: Any, tokens: Array) -> Array:
    """A NumPy array of many rows as one beside `tokens`, in as many chunks."""
    chunks = chunked(tokens)
    if chunks is not None:
        return chunks.along(rows, tokens)
    return beside(rows, tokens)


def scatter(x: Array, at: Blocks, like: Array) -> Array:
    """(..., B, L, E) -> (..., N, E), cut as `like` where that is chunked."""
    x, chunks = _scattered(x, at), chunked(x)
    return x if chunks is None else chunks.cut_as(x, like)


def _scattered(x: Array, at: Blocks) -> Array:
    xp = namespace(x)
    *lead, b, length, e = x.shape
    x = xp.reshape(x, (*lead, b * length, e))
    if at.in_order:
        return x
    x = _take(x, at.place, axis=-2, lanes=at.lanes)
    if not at.edge:
        return x
    # What belongs to the next lane goes there.
    x = xp.reshape(x, (*lead, at.lanes, -1, e))
    mine, edge = x[..., : -at.edge, :], xp.roll(x[..., -at.edge :, :], 1, axis=-3)
    own = with_rank(xp.asarray(at.own[..., None], device=placement(x)), x.ndim)
    x = xp.where(own, mine, xp.concat([edge, mine[..., at.edge :, :]], axis=-2))
    return xp.reshape(x, (*lead, -1, e))


def _take(x: Array, index: Any, axis: int, lanes: int) -> Array:
    """`x` at a NumPy index of any shape, which is flattened into the axis.

    With lanes, each of an equal share of the index is into the same share of the axis.
    """
    xp = namespace(x)
    if lanes == 1:
        return take(x, index, axis)
    axis, size = axis + x.ndim, x.shape[axis]
    shape, rest = tuple(x.shape[:axis]), tuple(x.shape[axis + 1 :])
    within = index.reshape(lanes, -1) % (size // lanes)
    at = xp.asarray(within.reshape(*[1] * len(shape), *within.shape, *[1] * len(rest)), device=placement(x))
    x = xp.reshape(x, (*shape, lanes, size // lanes, *rest))
    return xp.reshape(xp.take_along_axis(x, at, axis=axis + 1), (*shape, index.size, *rest))


class Parted(NamedTuple):
    """What groups are made of: averages over the smallest pieces, and at each level the parts of each.

    The parts are made once for all that asks for them, but for chunked arrays, in their tasks.
    """

    atoms: Average
    members: list[Average]


def union(atoms: Average, parts: Pieces | None) -> tuple[Average, Parted]:
    """The averages over the groups, of those over their pieces (None: they are the groups); and these."""
    if parts is None:
        return atoms, Parted(atoms, [])
    if not parts.levels:
        return everywhere(atoms), Parted(atoms, [])
    if chunked(atoms.out) is not None:
        return regroup(_union, atoms, parts.levels[-1].index.shape[:1], parts), Parted(atoms, [])
    levels = list(_levels(atoms, parts))
    return everywhere(levels[-1][0]), Parted(atoms, [members for _, members in levels])


def others(groups: Parted, cut: Cuts) -> Average:
    """For each window and each group that it cuts, the average over the other parts: (..., B, R, E)."""
    if groups.members:
        return _others(groups.members, cut)
    return regroup(_others_of_atoms, groups.atoms, cut.is_cut.shape, cut)


def _union(atoms: Average, parts: Pieces) -> Average:
    *_, (groups, _) = _levels(atoms, parts)
    return groups


def _others_of_atoms(atoms: Average, cut: Cuts) -> Average:
    return _others([members for _, members in _levels(atoms, cut.pieces)], cut)


def _others(members: Sequence[Average], cut: Cuts) -> Average:
    parts = zip(members, cut.pieces.levels, strict=True)
    out, log_norm = reduce(merge, [_all_but(one, level) for one, level in parts])
    return Average(out, namespace(out).where(beside(cut.is_cut, out), log_norm, -math.inf))


def _levels(atoms: Average, parts: Pieces) -> Iterator[tuple[Average, Average]]:
    """At each level the averages over its groups, and the parts of each of them."""
    for level in parts.levels:
        members = _of_groups(everywhere(atoms) if level.lanes == 1 else atoms, level)
        atoms = average_of_all(members.log_norm, members.out)
        yield atoms, members


def _of_groups(atoms: Average, level: Members) -> Average:
    """The parts of each group, beside each other: (..., C, r, E)."""
    xp, shape = namespace(atoms.out), level.index.shape
    log_norm = _take(atoms.log_norm, level.index, axis=-1, lanes=level.lanes)
    log_norm = xp.reshape(log_norm, (*log_norm.shape[:-1], *shape))
    log_norm = xp.where(beside(level.valid, log_norm), log_norm, -math.inf)
    out = _take(atoms.out, level.index, axis=-2, lanes=level.lanes)
    return Average(xp.reshape(out, (*out.shape[:-2], *shape, out.shape[-1])), log_norm)


def _all_but(members: Average, level: Members) -> Average:
    """For each window the groups that it cuts without its own part: (..., B, R, E)."""
    xp, shape = namespace(members.out), level.inside.shape
    before, after = (
        _before(members),
        _before(Average(xp.flip(members.out, axis=-2), xp.flip(members.log_norm, axis=-1))),
    )
    rest = merge(before, Average(xp.flip(after.out, axis=-2), xp.flip(after.log_norm, axis=-1)))
    out = xp.reshape(rest.out, (*rest.out.shape[:-3], -1, rest.out.shape[-1]))
    log_norm = xp.reshape(rest.log_norm, (*rest.log_norm.shape[:-2], -1))
    out = _take(out, level.inside, axis=-2, lanes=level.lanes)
    log_norm = _take(log_norm, level.inside, axis=-1, lanes=level.lanes)
    out = xp.reshape(out, (*out.shape[:-2], *shape, out.shape[-1]))
    return Average(out, xp.reshape(log_norm, (*log_norm.shape[:-1], *shape)))


def _before(parts: Average) -> Average:
    """For each part (..., r, E) the average over those before it: a scan of `merge`, by doubling."""
    xp = namespace(parts.out)

    def later(x: Average, step: int) -> Average:
        out, log_norm = x.out[..., :step, :], x.log_norm[..., :step]
        return Average(
            xp.concat([xp.zeros_like(out), x.out[..., :-step, :]], axis=-2),
            xp.concat([xp.full_like(log_norm, -math.inf), x.log_norm[..., :-step]], axis=-1),
        )

    count, step = parts.out.shape[-2], 1
    parts = later(parts, 1)
    while step < count:
        parts = merge(parts, later(parts, step))
        step *= 2
    return parts


def blocks_of_queries(x: Inputs, keys: Blocks) -> Blocks:
    """As many blocks of queries as of keys, the very same ones where N = M."""
    n, m = x.q.shape[-2], x.k.shape[-2]
    check_known("q", "segments that are laid by the number of tokens", n, m)
    n, m = plain((n, m))
    if n == m:
        return keys
    count = keys.index.shape[0]
    return blocks((n,), "segments" if n >= count else "cells", (count,))


def pooling_ranks(landmarks: Any, noise: Any) -> list[tuple[Any, int]]:
    """The further arrays of an estimator that pools, with the number of their trailing axes."""
    pair = landmarks if isinstance(landmarks, tuple | list) else ()
    return [(noise, 2), *[(array, 2) for array in pair]]


def given_landmarks(x: Inputs, landmarks: Any, count: int) -> tuple[Array, Array]:
    """The caller's own landmarks (..., C, D)."""
    if not isinstance(landmarks, tuple | list) or len(landmarks) != 2:
        raise TypeError(
            f"landmarks: expected a pair (q_landmarks, k_landmarks), got {type(landmarks).__name__}"
        )
    names = ("landmarks[0]", "landmarks[1]")
    pair = [x.match(name, array, 2) for name, array in zip(names, landmarks, strict=True)]
    for name, array, ours in zip(names, landmarks, pair, strict=True):
        if array.ndim < 2 or tuple(ours.shape[-2:]) != (count, x.q.shape[-1]):
            raise ValueError(
                f"{name}: expected shape (..., {count}, {x.q.shape[-1]}), got {tuple(array.shape)}"
            )
    check_broadcast(
        q=(x.q, 2), k=(x.k, 2), v=(x.v, 2), **{n: (a, 2) for n, a in zip(names, pair, strict=True)}
    )
    return pair[0], pair[1]


def check_grid(grid: Any, n: int, m: int) -> Sizes:
    """The caller's grid, or a row of all keys."""
    if grid is None:
        check_known("k", "segments and windows that are laid by the number of tokens", m)
        return plain((m,))
    if not isinstance(grid, tuple | list) or not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: expected a tuple of one, two or three sizes, got {shown(grid)}")
    sizes = tuple(check_count("grid", size) for size in grid)
    if not math.prod(sizes) == n == m:
        raise ValueError(f"grid: expected as many places as queries ({n}) and keys ({m}), got {shown(sizes)}")
    return sizes


def check_sizes(name: str, value: Any, grid: Sizes) -> Sizes:
    """A number on the grid as sizes on its axes: the caller's own, or the best that fit."""
    if isinstance(value, numbers.Integral):
        return _factors(grid, check_count(name, value), name in ("window", "group_size"))
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: expected an integer or one for each axis of the grid, got {shown(value)}")
    sizes = tuple(check_count(name, size) for size in value)
    if len(sizes) != len(grid) or any(size > n for size, n in zip(sizes, grid, strict=False)):
        raise ValueError(
            f"{name}: expected a size for each axis that fits the grid {grid}, got {shown(sizes)}"
        )
    return sizes


@static
def _factors(grid: Sizes, total: int, cubes: bool) -> Sizes:
    """Sizes that fit the grid with the largest product up to `total`.

    Of several, those that are nearest to cubes themselves (`cubes`) or that cut the grid into
    blocks nearest to cubes.
    """
    return _best_factors(grid, total, cubes)


@functools.lru_cache(maxsize=256)
def _best_factors(grid: Sizes, total: int, cubes: bool) -> Sizes:
    def preference(sizes: Sizes) -> tuple[int, float]:
        edges = sizes if cubes else [n / size for n, size in zip(grid, sizes, strict=True)]
        return math.prod(sizes), -max(edges) / min(edges)

    return max(_sizes_within(grid, total), key=preference)


def _sizes_within(grid: Sizes, total: int) -> Iterator[Sizes]:
    *others, last = grid
    for sizes in itertools.product(*(range(1, min(n, total) + 1) for n in others)):
        rest = total // math.prod(sizes)
        if rest:
            yield (*sizes, min(last, rest))
