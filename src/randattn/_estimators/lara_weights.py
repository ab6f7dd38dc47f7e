"""Make the weights ``alpha_nc`` by which LARA's proposals share the work for a query."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from randattn._core import library
from randattn._core.average import Operations, PairWeight, finite, nonzero
from randattn._core.library import Array, namespace

# The smallest weight alpha_nc, a number without unit: a moved weight can be negative, and has no logarithm
# then. The published code has this value.
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

    `offset` (..., C) is added to the logits of the landmarks, -inf for an absent landmark. The K frequencies
    are `copies` of the C proposals' frequencies, followed by frequencies without a landmark.
    """
    xp = namespace(qt)
    there = xp.astype(offset > -math.inf, offset.dtype)
    count = nonzero(xp.sum(there, axis=-1))[..., None, None]
    arrays = (qt, offset[..., None], balance[..., None], count)
    # Dynamo warns of a function that has a cache.
    function = (_moved if library.compiler.is_tracing() else _cached)(alpha, over_queries, copies)
    return PairWeight(function, mask, arrays)


def _moved(alpha: float, over_queries: bool, copies: int) -> Callable[..., Array]:
    """Make the function that computes the weights with these constants."""

    def moved(
        ops: Operations, q: Array, mask: Array | None, qt: Array, offset: Array, balance: Array, count: Array
    ) -> Array:
        # Equation: alpha_nc = bh_c + alpha (t_nc - mean_c t_nc), at least `_SMALLEST_ALPHA`, where t_nc is
        # exp(q_n.qt_c) normalized over the queries or over the landmarks.
        xp = namespace(q)
        log_t = ops.add(ops.products("t", qt, q), offset)
        if over_queries:
            if mask is not None:
                log_t = xp.where(mask[..., None, :], log_t, -math.inf)
            # t is at most one, but rounding of large terms can lift its logarithm above zero.
            t = ops.exp(ops.at_most(log_t, 0.0))
            mean = xp.sum(t, axis=-2, keepdims=True) / count
        else:
            t = ops.exp(ops.subtract(log_t, finite(xp.max(log_t, axis=-2, keepdims=True))))
            t = ops.multiply(t, 1 / nonzero(xp.sum(t, axis=-2, keepdims=True)))
            # t sums to one over the landmarks: its mean needs no second sum.
            mean = 1 / count
        t = ops.subtract(t, mean)
        if alpha != 1:
            t = ops.multiply(t, alpha)
        others = balance.shape[-2] - copies * qt.shape[-2]
        if copies > 1 or others:
            # Antithetic draws share a landmark. A draw from N(0, I) has none: it keeps its balance heuristic.
            t = xp.concat([t] * copies + [xp.zeros_like(t[..., :1, :])] * others, axis=-2)
        return ops.at_least(ops.add(t, balance), _SMALLEST_ALPHA)

    return moved


# JAX takes the function as a static argument and compiles anew for each new object: equal constants must give
# the same function.
_cached = functools.cache(_moved)


def probability(log_p: Array) -> Array:
    """Return the probability ``exp(log_p)``, at most one."""
    xp = namespace(log_p)
    # Rounding of large terms can lift log p above zero.
    return xp.exp(xp.where(log_p > 0, 0.0, log_p))


def only(there: Array | None, log_weight: Array) -> Array:
    """Return the log weights, -inf where `there` is False."""
    if there is None:
        return log_weight
    return namespace(there).where(there, log_weight, -math.inf)
