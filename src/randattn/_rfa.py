"""Random-feature attention: ``attend(q, W, f(W), log Z(W)).out`` with ``W ~ N(0, I)``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import attend, finite
from ._draws import no_draws, normal_draws
from ._inputs import check_option, namespace, prepare, refuse_causal, resolve_count

if TYPE_CHECKING:
    from ._inputs import Inputs

    Array = Any


def rfa(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_samples: int | None = None,
    features: str = "positive",
    draws: str = "iid",
    rng: Any = None,
    noise: Array | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    check_option("features", features, ("positive", "trigonometric"))
    check_option("draws", draws, ("iid", "orthogonal"))
    refuse_causal("rfa", is_causal)
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, enable_gqa=enable_gqa)
    count = resolve_count("num_samples", num_samples, 64, noise=(noise, -2))
    w = normal_draws(
        x, (count, x.q.shape[-1]), rng=rng, noise=noise, axes="S, D", orthogonal=draws == "orthogonal"
    )
    if w is None:
        raise no_draws("rfa")
    if features == "trigonometric":
        return x.finish(_trigonometric(x, w))
    f, log_z = attend(w, x.k, x.v, x.kappa)
    out, _ = attend(x.q, w, f, log_z)
    return x.finish(out)


def _trigonometric(x: Inputs, w: Array) -> Array:
    """Peng et al. (2021), equation 5: ``exp(q.k)`` as ``exp((|q|^2 + |k|^2)/2) E cos(w.(q - k))``.

    The features have signs, so that this is no average and can leave the range of V, where the
    estimate (never the truth) is cut to it.
    """
    xp = x.xp
    log_weight = 0.5 * xp.sum(x.k * x.k, axis=-1, keepdims=True)
    lowest, highest = x.v, x.v
    if x.key_mask is not None:
        attended = x.key_mask[..., None]
        log_weight = xp.where(attended, log_weight, -math.inf)
        lowest, highest = xp.where(attended, x.v, math.inf), xp.where(attended, x.v, -math.inf)
    weight = xp.exp(log_weight - finite(xp.max(log_weight, axis=-2, keepdims=True)))
    total = xp.sum(weight, axis=-2, keepdims=True)

    phi_q, phi_k = _waves(x.q, w), _waves(x.k, w) * weight
    values = xp.matmul(phi_q, xp.matmul(xp.matrix_transpose(phi_k), x.v))
    norm = xp.matmul(phi_q, xp.matrix_transpose(xp.sum(phi_k, axis=-2, keepdims=True)))
    # Below this the normalizer is rounding alone; with no key at all any divisor gives the zero.
    smallest = xp.where(total == 0, 1.0, w.shape[-2] * xp.finfo(norm.dtype).eps * total)
    out = values / xp.where(xp.abs(norm) < smallest, smallest, norm)
    lowest = xp.where(total == 0, 0.0, xp.min(lowest, axis=-2, keepdims=True))
    highest = xp.where(total == 0, 0.0, xp.max(highest, axis=-2, keepdims=True))
    return xp.minimum(xp.maximum(out, lowest), highest)


def _waves(x: Array, w: Array) -> Array:
    xp = namespace(x)
    angle = xp.matmul(x, xp.matrix_transpose(w))
    return xp.concat([xp.cos(angle), xp.sin(angle)], axis=-1)
