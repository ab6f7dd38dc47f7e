"""Averages over parts of groups, regrouped by `merge`. Which part goes where is a NumPy index."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import Average, average, merge
from ._fused import regroup, take
from ._inputs import namespace, placement

if TYPE_CHECKING:
    Array = Any


def union(parts: Average, members: Any, is_member: Any) -> Average:
    """The averages (..., C) over groups of parts: `members` (C, r), filled up where not `is_member`."""
    return regroup(_union, parts, members.shape[:1], members, is_member)


def others(parts: Average, members: Any, is_member: Any, inside: Any, is_cut: Any) -> Average:
    """For parts at `inside` (B, R) among the members, the averages over the others of their groups."""
    return regroup(_others, parts, inside.shape, members, is_member, inside, is_cut)


def _union(parts: Average, members: Any, is_member: Any) -> Average:
    out, log_norm = _at(parts, members, is_member)  # (..., C, r, E)
    out, log_norm = average(log_norm[..., None, :], out)
    return Average(out[..., 0, :], log_norm[..., 0])


def _others(parts: Average, members: Any, is_member: Any, inside: Any, is_cut: Any) -> Average:
    xp = namespace(parts.out)
    of_groups = _at(parts, members, is_member)  # (..., C, r, E)
    after = _before(Average(xp.flip(of_groups.out, axis=-2), xp.flip(of_groups.log_norm, axis=-1)))
    after = Average(xp.flip(after.out, axis=-2), xp.flip(after.log_norm, axis=-1))
    out, log_norm = merge(_before(of_groups), after)
    out = xp.reshape(out, (*out.shape[:-3], -1, out.shape[-1]))
    log_norm = xp.reshape(log_norm, (*log_norm.shape[:-2], -1))
    return _at(Average(out, log_norm), inside, is_cut)


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


def _at(parts: Average, index: Any, is_real: Any) -> Average:
    """The parts at an index (A, B), with no weight where they are not real."""
    out, log_norm = take(parts.out, index, axis=-2), take(parts.log_norm, index, axis=-1)
    xp = namespace(out)
    out = xp.reshape(out, (*out.shape[:-2], *index.shape, out.shape[-1]))
    log_norm = xp.reshape(log_norm, (*log_norm.shape[:-1], *index.shape))
    is_real = xp.asarray(is_real, device=placement(log_norm))
    return Average(out, xp.where(is_real, log_norm, -math.inf))
