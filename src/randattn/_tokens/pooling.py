"""Gather, pool and merge tokens by the blocks that `grids` and `device_parts` lay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core.average import Average, average_of_all, merge
from randattn._core.checks import check_broadcast, resolve_count
from randattn._core.inputs import Inputs, hide, log_mask, with_rank
from randattn._core.library import Array, check_known, namespace, placement
from randattn._core.tracing import plain

from .device_parts import Cuts, Members, Pieces, divided, pieces
from .grids import Blocks, blocks


def pool(x: Array, at: Blocks, mask: Array | None) -> Average:
    """Return the mean token (..., B, D) of each block and the logarithm of its size, without padding.

    A block of padding alone has the mean 0 and the logarithm -inf.
    """
    parts = in_pieces(x, at)
    if parts is not None:
        return union(pool(x, parts.atoms, mask), parts)[0]
    bias = gather_bias(x, mask, at)
    tokens = gather(hide(x, mask), at)
    if bias is None:
        xp, length = namespace(x), at.index.shape[1]
        mean = backend_of(x).mean_of_rows(tokens)
        return Average(mean, xp.full(mean.shape[:-1], math.log(length), dtype=x.dtype, device=placement(x)))
    return average_of_all(bias, tokens)


def in_pieces(x: Array, at: Blocks) -> Pieces | None:
    """Return the pieces of blocks, for tokens on several devices or in chunks.

    None for other tokens, and for blocks that are pieces already.
    """
    if at.laid is None:
        return None
    longest = backend_of(x).longest_chunk(x)
    if longest is not None:
        return divided(at, longest)
    lanes = backend_of(x).lanes_of(x)
    return pieces(at, lanes) if lanes > 1 else None


def gather(x: Array, at: Blocks) -> Array:
    """Gather the tokens of blocks: (..., N, D) -> (..., B, L, D)."""
    xp = namespace(x)
    if not at.in_order:
        x = _take(_with_edges(x, at), at.index, axis=-2, lanes=at.lanes)
    x = backend_of(x).cut_between_blocks(x, at.index.shape[1])
    *lead, _, d = x.shape
    return xp.reshape(x, (*lead, *at.index.shape, d))


def _with_edges(x: Array, at: Blocks) -> Array:
    """Append to each lane the first tokens of the next lane; no other tokens leave a device."""
    if not at.edge:
        return x
    xp = namespace(x)
    *lead, n, d = x.shape
    x = xp.reshape(x, (*lead, at.lanes, n // at.lanes, d))
    # The last lane gets tokens of the first lane, which no window reads.
    x = xp.concat([x, xp.roll(x[..., : at.edge, :], -1, axis=-3)], axis=-2)
    return xp.reshape(x, (*lead, n + at.lanes * at.edge, d))


def gather_bias(x: Array, mask: Array | None, at: Blocks) -> Array | None:
    """Return a bias (..., B, L) for the tokens of each block: 0, or -inf for padding of tokens or of blocks.

    None where all entries are 0.
    """
    if mask is None and at.valid is None:
        return None
    keep: Array = None
    if at.valid is not None:
        keep = with_rank(backend_of(x).along(at.valid, x), x.ndim)
    if mask is not None:
        tokens = gather(mask[..., None], at)[..., 0]
        keep = tokens if keep is None else tokens & keep
    return log_mask(keep, x)


def scatter(x: Array, at: Blocks, like: Array) -> Array:
    """Bring rows of blocks (..., B, L, E) back to their tokens (..., N, E), in the chunks of `like`."""
    return backend_of(x).cut_tokens_as(_scattered(x, at), like)


def _scattered(x: Array, at: Blocks) -> Array:
    xp = namespace(x)
    *lead, b, length, e = x.shape
    x = xp.reshape(x, (*lead, b * length, e))
    if at.in_order:
        return x
    x = _take(x, at.place, axis=-2, lanes=at.lanes)
    if not at.edge:
        return x
    # The rows of an edge are tokens of the next lane: they go there, for tokens that are not `own`.
    # No -1 in a shape: an empty batch would leave it open.
    x = xp.reshape(x, (*lead, at.lanes, x.shape[-2] // at.lanes, e))
    mine, edge = x[..., : -at.edge, :], xp.roll(x[..., -at.edge :, :], 1, axis=-3)
    own = with_rank(xp.asarray(at.own[..., None], device=placement(x)), x.ndim)
    x = xp.where(own, mine, xp.concat([edge, mine[..., at.edge :, :]], axis=-2))
    return xp.reshape(x, (*lead, x.shape[-3] * x.shape[-2], e))


def _take(x: Array, index: Any, axis: int, lanes: int) -> Array:
    """Take from `x` at a NumPy index of any shape, which is flattened into the axis.

    With lanes, index and axis have a share for each lane, and an entry is in the share of its own lane.
    """
    xp = namespace(x)
    if lanes == 1:
        return backend_of(x).take(x, index, axis)
    axis, size = axis + x.ndim, x.shape[axis]
    shape, rest = tuple(x.shape[:axis]), tuple(x.shape[axis + 1 :])
    # Along an axis of lanes a device takes from its own tokens; a flat `take` would gather all tokens first.
    within = index.reshape(lanes, -1) % (size // lanes)
    at = xp.asarray(within.reshape(*[1] * len(shape), *within.shape, *[1] * len(rest)), device=placement(x))
    x = xp.reshape(x, (*shape, lanes, size // lanes, *rest))
    return xp.reshape(xp.take_along_axis(x, at, axis=axis + 1), (*shape, index.size, *rest))


class Parted(NamedTuple):
    """Averages over atoms, and at each level the averages over the parts of each group.

    The averages over parts are computed once. Lazy arrays have none: each task computes them from the atoms.
    """

    atoms: Average
    members: list[Average]


def union(atoms: Average, parts: Pieces | None) -> tuple[Average, Parted]:
    """Merge averages over atoms to averages over groups; return the averages over their parts too.

    Without pieces the atoms are the groups.
    """
    if parts is None:
        return atoms, Parted(atoms, [])
    own = backend_of(atoms.out)
    if not parts.levels:
        return own.everywhere(atoms), Parted(atoms, [])
    if own.is_lazy:
        return own.regroup(_union, atoms, parts.levels[-1].index.shape[:1], parts), Parted(atoms, [])
    levels = list(_levels(atoms, parts))
    return own.everywhere(levels[-1][0]), Parted(atoms, [members for _, members in levels])


def others(groups: Parted, cut: Cuts) -> Average:
    """Return averages over the groups that each window cuts, without the window's part: (..., B, R, E)."""
    if groups.members:
        return _others(groups.members, cut)
    return backend_of(groups.atoms.out).regroup(_others_of_atoms, groups.atoms, cut.is_cut.shape, cut)


def _union(atoms: Average, parts: Pieces) -> Average:
    *_, (groups, _) = _levels(atoms, parts)
    return groups


def _others_of_atoms(atoms: Average, cut: Cuts) -> Average:
    return _others([members for _, members in _levels(atoms, cut.pieces)], cut)


def _others(members: Sequence[Average], cut: Cuts) -> Average:
    parts = zip(members, cut.pieces.levels, strict=True)
    return _only(reduce(merge, [_all_but(one, level) for one, level in parts]), cut.is_cut)


def _levels(atoms: Average, parts: Pieces) -> Iterator[tuple[Average, Average]]:
    """Yield at each level the averages over its groups, and the averages over their parts."""
    for level in parts.levels:
        members = _of_groups(backend_of(atoms.out).everywhere(atoms) if level.lanes == 1 else atoms, level)
        atoms = average_of_all(members.log_norm, members.out)
        yield atoms, members


def _of_groups(atoms: Average, level: Members) -> Average:
    """Gather the averages over the parts of each group: (..., C, r, E)."""
    return _only(_taken(atoms, level.index, level.lanes), level.valid)


def _taken(x: Average, index: Any, lanes: int) -> Average:
    """Return the averages at a NumPy index, in the shape of the index."""
    xp = namespace(x.out)
    out, log_norm = _take(x.out, index, -2, lanes), _take(x.log_norm, index, -1, lanes)
    out = xp.reshape(out, (*out.shape[:-2], *index.shape, out.shape[-1]))
    return Average(out, xp.reshape(log_norm, (*log_norm.shape[:-1], *index.shape)))


def _only(x: Average, there: Any) -> Average:
    """Return the averages with the log-norm -inf where a NumPy mask is False."""
    there = backend_of(x.out).beside(there, x.out)
    return x._replace(log_norm=namespace(x.out).where(there, x.log_norm, -math.inf))


def _all_but(members: Average, level: Members) -> Average:
    """Compute `others` for the parts of one level: (..., B, R, E)."""
    xp = namespace(members.out)
    # The parts before merged with the parts after: a difference (group less part) would lose all digits where
    # the part has nearly all of the group's weight.
    before = _before(members)
    after = _before(Average(xp.flip(members.out, axis=-2), xp.flip(members.log_norm, axis=-1)))
    rest = merge(before, Average(xp.flip(after.out, axis=-2), xp.flip(after.log_norm, axis=-1)))
    *lead, groups, parts, features = rest.out.shape
    out = xp.reshape(rest.out, (*lead, groups * parts, features))
    log_norm = xp.reshape(rest.log_norm, (*rest.log_norm.shape[:-2], groups * parts))
    return _taken(Average(out, log_norm), level.inside, level.lanes)


def _before(parts: Average) -> Average:
    """Return for each part (..., r, E) the average over the parts before it, by a scan of `merge`."""
    xp = namespace(parts.out)

    def later(x: Average, step: int) -> Average:
        out, log_norm = x.out[..., :step, :], x.log_norm[..., :step]
        return Average(
            xp.concat([xp.zeros_like(out), x.out[..., :-step, :]], axis=-2),
            xp.concat([xp.full_like(log_norm, -math.inf), x.log_norm[..., :-step]], axis=-1),
        )

    count, step = parts.out.shape[-2], 1
    # By doubling: after a step each average is over the 2 * step parts before it, in log2(count) merges.
    parts = later(parts, 1)
    while step < count:
        parts = merge(parts, later(parts, step))
        step *= 2
    return parts


def blocks_of_queries(x: Inputs, keys: Blocks) -> Blocks:
    """Return as many blocks of queries as of keys, the same blocks where N = M."""
    n, m = x.q.shape[-2], x.k.shape[-2]
    check_known("q", "segments that are laid by the number of tokens", n, m)
    n, m = plain((n, m))
    if n == m:
        return keys
    count = keys.index.shape[0]
    return blocks((n,), "segments" if n >= count else "cells", (count,))


def pooling_ranks(landmarks: Any, noise: Any) -> list[tuple[Any, int]]:
    """Return the noise and the landmarks, each with the number of its trailing axes."""
    pair = landmarks if isinstance(landmarks, tuple | list) else ()
    return [(noise, 2), *[(array, 2) for array in pair]]


def count_of_blocks(name: str, count: Any, landmarks: Any, noise: Any) -> Any:
    """Return the caller's count, one for each axis of a grid too; else that of landmarks or noise, or 64."""
    if isinstance(count, tuple | list):
        return count
    given = landmarks[-1] if isinstance(landmarks, tuple | list) and landmarks else None
    return resolve_count(name, count, 64, landmarks=(given, -2), noise=(noise, -2))


def given_landmarks(x: Inputs, landmarks: Any, count: int) -> tuple[Array, Array]:
    """Check the caller's landmarks (..., C, D) and return them."""
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
