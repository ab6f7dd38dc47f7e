"""Randomized attention: the mean over s of ``f(w_ns)``, unbiased at quadratic cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import attend, finite, query_blocks
from ._draws import no_draws, normal_draws, uniform_draws
from ._inputs import namespace, prepare, refuse_causal, resolve_count

if TYPE_CHECKING:
    from ._inputs import Inputs

    Array = Any


def ra(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_samples: int | None = None,
    rng: Any = None,
    noise: Array | None = None,
    components: Array | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    refuse_causal("ra", is_causal)
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, enable_gqa=enable_gqa)
    count = resolve_count("num_samples", num_samples, 1, noise=(noise, -3), components=(components, -2))
    n, d = x.q.shape[-2:]
    if (noise is None) != (components is None):
        raise ValueError("components: expected noise and components together, or rng instead of both")
    eps = normal_draws(x, (count, n, d), rng=rng, noise=noise, axes="S, N, D")
    if eps is None:
        raise no_draws("ra")
    u = uniform_draws(x, (count, n), rng=rng, components=components, axes="S, N")

    xp = x.xp
    means = []
    for rows in query_blocks(n, math.prod(x.lead) * count * x.k.shape[-2]):
        chosen = _sample_keys(x, x.q[..., rows, :], u[..., rows])
        w = x.q[..., None, rows, :] + chosen + eps[..., rows, :]
        f, _ = attend(w, x.k[..., None, :, :], x.v[..., None, :, :], x.kappa[..., None, :])
        means.append(xp.mean(f, axis=-3))
    return x.finish(xp.concat(means, axis=-2) if len(means) > 1 else means[0])


def _sample_keys(x: Inputs, q: Array, u: Array) -> Array:
    """For uniforms (..., S, N) the keys (..., S, N, D) at which each query's softmax passes them."""
    xp = x.xp
    logits = xp.matmul(q, xp.matrix_transpose(x.k))
    if x.key_mask is not None:
        logits = xp.where(x.key_mask[..., None, :], logits, -math.inf)
    mass = xp.exp(logits - finite(xp.max(logits, axis=-1, keepdims=True)))
    passed = xp.cumulative_sum(mass, axis=-1)[..., None, :, :]
    total = passed[..., -1:]
    # A key without mass is never chosen, not even where rounding makes u one.
    first = xp.minimum(
        _count(passed <= u[..., None] * total), _count(passed < total)
    )
    index = xp.arange(x.k.shape[-2], dtype=first.dtype, device=x.device)
    one_hot = xp.astype(first[..., None] == index, q.dtype)
    return xp.matmul(one_hot, x.k[..., None, :, :])


def _count(found: Array) -> Array:
    xp = namespace(found)
    return xp.sum(xp.astype(found, xp.int32), axis=-1, dtype=xp.int32)
