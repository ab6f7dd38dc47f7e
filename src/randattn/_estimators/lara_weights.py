"""How LARA's proposals share the work for a query: ``alpha_nc``."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from randattn._core import library
from randattn._core.average import PairWeight, finite, nonzero
from randattn._core.library import namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from randattn._core.average import Steps

    Array = Any

_SMALLEST_ALPHA = 1e-8


def optimal(
    qt: Array,
    offset: Array,
    balance: Array,
    *,
    mask: Array | None,
    alpha: float,
    over_queries: bool,
    copies: int,
) -> PairWeight:
    """Return the balance heuristic (..., K), moved towards the landmarks (..., C, D) near the query.

    `offset` (..., C) is added to the landmarks' logits, -inf for one that is not there. The frequencies are
    `copies` of the landmarks' and, after these, frequencies of no landmark.
    """
    xp = namespace(qt)
    there = xp.astype(offset > -math.inf, offset.dtype)
    count = nonzero(xp.sum(there, axis=-1))[..., None, None]
    arrays = (qt, offset[..., None], balance[..., None], count)
    # Dynamo would warn of a cache.
    function = (_moved if library.compiler.is_tracing() else _cached)(alpha, over_queries, copies)
    return PairWeight(function, mask, arrays)


def _moved(alpha: float, over_queries: bool, copies: int) -> Callable[..., Array]:
    """Make the function of the weights, with these constants."""

    def moved(
        steps: Steps, q: Array, mask: Array | None, qt: Array, offset: Array, balance: Array, count: Array
    ) -> Array:
        xp = namespace(q)
        log_t = steps.add(steps.products("t", qt, q), offset)
        if over_queries:
            if mask is not None:
                log_t = xp.where(mask[..., None, :], log_t, -math.inf)
            # At most one, also where the terms are so large that rounding alone makes it more.
            t = steps.exp(steps.at_most(log_t, 0.0))
            mean = xp.sum(t, axis=-2, keepdims=True) / count
        else:
            t = steps.exp(steps.subtract(log_t, finite(xp.max(log_t, axis=-2, keepdims=True))))
            t = steps.multiply(t, 1 / nonzero(xp.sum(t, axis=-2, keepdims=True)))
            mean = 1 / count
        t = steps.subtract(t, mean)
        if alpha != 1:
            t = steps.multiply(t, alpha)
        others = balance.shape[-2] - copies * qt.shape[-2]
        if copies > 1 or others:
            t = xp.concat([t] * copies + [xp.zeros_like(t[..., :1, :])] * others, axis=-2)
        return steps.at_least(steps.add(t, balance), _SMALLEST_ALPHA)

    return moved


# The same function for the same constants, by which JAX knows it again.
_cached = functools.cache(_moved)


def probability(log_p: Array) -> Array:
    """Return ``exp(log_p)``, at most one, also where terms are so large that rounding alone makes it more."""
    xp = namespace(log_p)
    return xp.exp(xp.where(log_p > 0, 0.0, log_p))


def only(there: Array | None, log_weight: Array) -> Array:
    """Take the weight from landmarks that are made of padding alone."""
    if there is None:
        return log_weight
    return namespace(there).where(there, log_weight, -math.inf)
