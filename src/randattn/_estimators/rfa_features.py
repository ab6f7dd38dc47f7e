"""Features of RFA that depend on the data: preconditioned, optimal and trigonometric features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from randattn._core.average import finite, nonzero
from randattn._core.inputs import Inputs, dot
from randattn._core.library import Array, namespace


def _means(x: Inputs, of: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Return the means (..., 1, X) of `of` over the queries and over the keys, padding left out."""
    xp = x.xp

    def mean(y: Array, mask: Array | None) -> Array:
        if mask is None:
            return xp.mean(of(y), axis=-2, keepdims=True)
        count = xp.sum(xp.astype(mask, y.dtype), axis=-1)[..., None, None]
        # Padding is zero, and `of` is zero there: only the number of tokens needs the mask.
        return xp.sum(of(y), axis=-2, keepdims=True) / nonzero(count)

    return mean(x.q, x.query_mask), mean(x.k, x.key_mask)


def preconditioned(x: Inputs) -> Inputs:
    """Scale queries by, and keys by one over, ``(mean k^2 / mean q^2)^(1/4)``, feature by feature."""
    xp, (of_q, of_k) = x.xp, _means(x, lambda y: y * y)
    # A feature that is zero on one side keeps the factor 1. The inner `where` and `nonzero` keep 0 / 0, whose
    # gradient is NaN, out of the branch that is not taken.
    factor = xp.where((of_q > 0) & (of_k > 0), xp.where(of_q > 0, of_k, 1.0) / nonzero(of_q), 1.0) ** 0.25
    return replace(x, q=x.q * factor, k=x.k / nonzero(factor))


def optimal_spread(x: Inputs) -> Array:
    """Return the variance s (..., 1, 1) of the proposal of least second moment, at the mean of ``|q + k|^2``.

    At z = q + k the second moment is ``s^d (2s - 1)^(-d/2) exp(2s |z|^2 / (2s - 1))``. It is least where
    ``2d s^2 - (3d + 2|z|^2) s + d = 0``.
    """
    # Equation: mean |q + k|^2 = mean |q|^2 + mean |k|^2 + 2 mean(q).mean(k), over all pairs, in linear time.
    xp, d = x.xp, x.q.shape[-1]
    (mean_q, mean_k), squares = _means(x, lambda y: y), _means(x, lambda y: dot(y, y)[..., None])
    square = x.scale * (sum(squares) + 2 * dot(mean_q, mean_k)[..., None])
    half = 3 * d + 2 * square
    return (half + xp.sqrt(half * half - 8 * d * d)) / (4 * d)


def trigonometric(x: Inputs, w: Array) -> Array:
    """Estimate by trigonometric features: ``exp(q.k) = exp((|q|^2 + |k|^2)/2) E cos(w.(q - k))``.

    This is equation 5 of Peng et al. (2021). The features have signs: the result is no average of the values
    and can leave their range. It is clipped to the range, in which exact attention lies.
    """
    xp = x.xp
    # exp(|q|^2/2) is common to a row and cancels. The keys' factor exp(|k|^2/2) is taken over its maximum, or
    # it would overflow.
    log_weight = 0.5 * x.scale * dot(x.k, x.k)[..., None]
    lowest, highest = x.v, x.v
    if x.key_mask is not None:
        attended = x.key_mask[..., None]
        log_weight = xp.where(attended, log_weight, -math.inf)
        lowest, highest = xp.where(attended, x.v, math.inf), xp.where(attended, x.v, -math.inf)
    weight = xp.exp(log_weight - finite(xp.max(log_weight, axis=-2, keepdims=True)))
    total = xp.sum(weight, axis=-2, keepdims=True)

    w = x.root * w
    phi_q, phi_k = _waves(x.q, w), _waves(x.k, w) * weight
    values = xp.matmul(phi_q, xp.matmul(xp.matrix_transpose(phi_k), x.v))
    norm = xp.matmul(phi_q, xp.matrix_transpose(xp.sum(phi_k, axis=-2, keepdims=True)))
    # Signed terms cancel: a normalizer below S eps times the total weight is rounding alone, and is lifted to
    # that. Without keys the values are zero, and the divisor 1 gives zero.
    smallest = xp.where(total == 0, 1.0, w.shape[-2] * xp.finfo(norm.dtype).eps * total)
    out = values / xp.where(xp.abs(norm) < smallest, smallest, norm)
    lowest = xp.where(total == 0, 0.0, xp.min(lowest, axis=-2, keepdims=True))
    highest = xp.where(total == 0, 0.0, xp.max(highest, axis=-2, keepdims=True))
    return xp.minimum(xp.maximum(out, lowest), highest)


def _waves(x: Array, w: Array) -> Array:
    # Equation: cos(w.(q - k)) = cos(w.q) cos(w.k) + sin(w.q) sin(w.k).
    xp = namespace(x)
    angle = xp.matmul(x, xp.matrix_transpose(w))
    return xp.concat([xp.cos(angle), xp.sin(angle)], axis=-1)
