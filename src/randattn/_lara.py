"""LARA: multiple importance sampling, one proposal ``N(mu_c, I)`` for each pair of landmarks.

``attend(q, W, f(W), log Z(W) + log alpha_nc - log r_c).out`` with ``w_c ~ N(mu_c, I)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import attend, finite, nonzero
from ._draws import normal_draws
from ._inputs import (
    check_option,
    check_real,
    hide,
    log_mask,
    namespace,
    prepare,
    refuse_causal,
    resolve_count,
)
from ._segments import (
    blocks,
    blocks_of_queries,
    check_grid,
    check_sizes,
    given_landmarks,
    pool,
    resolve_query_mask,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._inputs import Inputs

    Array = Any

_SMALLEST_ALPHA = 1e-8


def lara(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_landmarks: int | tuple[int, ...] | None = None,
    landmarks: tuple[Array, Array] | None = None,
    weighting: str = "optimal",
    alpha: float = 1.0,
    normalize: str = "queries",
    mix_keys: bool = False,
    antithetic: bool = False,
    noise_scale: float = 1.0,
    rng: Any = None,
    noise: Array | None = None,
    query_mask: Array | None = None,
    grid: tuple[int, ...] | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    check_option("weighting", weighting, ("optimal", "balance", "biased"))
    check_option("normalize", normalize, ("queries", "landmarks"))
    alpha, noise_scale = check_real("alpha", alpha), check_real("noise_scale", noise_scale)
    refuse_causal("lara", is_causal)
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, enable_gqa=enable_gqa)
    query_mask = resolve_query_mask(x, query_mask)
    qt, kt, there = _landmarks(x, num_landmarks, landmarks, noise, query_mask, grid)
    eps = normal_draws(x, tuple(qt.shape[-2:]), rng=rng, noise=noise, axes="C, D")

    if mix_keys:
        kt, _ = attend(kt, kt, kt, log_mask(there, kt))
    mu = qt + kt
    w = mu if eps is None else mu + noise_scale * eps
    if antithetic and eps is not None:
        xp = x.xp
        w = xp.concat([w, mu - noise_scale * eps], axis=-2)
        mu = xp.concat([mu, mu], axis=-2)
        there = None if there is None else xp.concat([there, there], axis=-1)

    f, log_z = attend(w, x.k, x.v, x.kappa)
    log_r, log_mixture = _log_densities(w, mu, there)
    if weighting == "optimal":
        log_alpha = _optimal(x, qt, there, query_mask, x.xp.exp(log_r - log_mixture), alpha, normalize)
        out, _ = attend(x.q, w, f, _only(there, log_z - log_r), pair_bias=log_alpha)
    else:
        # The balance heuristic over r_c: the proposal's own density cancels.
        towards = w + mu if weighting == "biased" else w
        out, _ = attend(x.q, towards, f, _only(there, log_z - log_mixture))
    return x.finish(out)


def _landmarks(
    x: Inputs,
    num_landmarks: int | tuple[int, ...] | None,
    landmarks: tuple[Array, Array] | None,
    noise: Array | None,
    query_mask: Array | None,
    grid: tuple[int, ...] | None,
) -> tuple[Array, Array, Array | None]:
    """The landmarks' means (..., C, D) and whether there is a token behind each (..., C)."""
    sizes = check_grid(grid, x.q.shape[-2], x.k.shape[-2])
    given = landmarks[-1] if isinstance(landmarks, tuple | list) and landmarks else None
    count = resolve_count("num_landmarks", num_landmarks, 64, landmarks=(given, -2), noise=(noise, -2))
    if landmarks is not None:
        return *given_landmarks(x, landmarks, count), None
    how = "segments" if len(sizes) == 1 else "cells"
    counts = check_sizes("num_landmarks", count, sizes)
    keys = blocks(sizes, how, counts)
    queries = blocks_of_queries(x, keys, sizes, how, counts)
    qt, log_queries = pool(x.q, queries, query_mask)
    kt, log_keys = pool(x.k, keys, x.key_mask)
    if query_mask is None and x.key_mask is None:
        return qt, kt, None
    return qt, kt, (log_queries > -math.inf) & (log_keys > -math.inf)


def _log_densities(w: Array, mu: Array, there: Array | None) -> tuple[Array, Array]:
    """Of each draw over N(0, I): the log density of its own proposal, and of their sum."""
    xp = namespace(w)
    half_norm = xp.sum(mu * mu, axis=-1) / 2
    log_r = xp.sum(w * mu, axis=-1) - half_norm
    _, log_mixture = attend(w, mu, mu, _only(there, -half_norm))
    return log_r, finite(log_mixture)


def _optimal(
    x: Inputs,
    qt: Array,
    there: Array | None,
    query_mask: Array | None,
    balance: Array,
    alpha: float,
    normalize: str,
) -> Callable[[slice], Array]:
    """``log alpha_nc``, for any slice of the queries: balance, moved towards landmarks near the query."""
    xp = x.xp
    copies = balance.shape[-1] // qt.shape[-2]
    there = None if there is None else there[..., None, : qt.shape[-2]]
    if normalize == "queries":
        seen = hide(x.q, query_mask)
        _, over_queries = attend(qt, seen, seen[..., :1], log_mask(query_mask, seen))

    def log_alpha(rows: slice) -> Array:
        log_t = xp.matmul(x.q[..., rows, :], xp.matrix_transpose(qt))
        if there is not None:
            log_t = xp.where(there, log_t, -math.inf)
        if normalize == "queries":
            log_t = log_t - finite(over_queries)[..., None, :]
            if query_mask is not None:
                log_t = xp.where(query_mask[..., rows, None], log_t, -math.inf)
            t = xp.exp(log_t)
        else:
            t = xp.exp(log_t - finite(xp.max(log_t, axis=-1, keepdims=True)))
            t = t / nonzero(xp.sum(t, axis=-1, keepdims=True))
        if there is None:
            mean = xp.mean(t, axis=-1, keepdims=True)
        else:
            count = xp.sum(xp.astype(there, t.dtype), axis=-1, keepdims=True)
            mean = xp.sum(t, axis=-1, keepdims=True) / nonzero(count)
        towards = alpha * (t - mean)
        if copies == 2:
            towards = xp.concat([towards, towards], axis=-1)
        weights = balance[..., None, :] + towards
        return xp.log(xp.where(weights > _SMALLEST_ALPHA, weights, _SMALLEST_ALPHA))

    return log_alpha


def _only(there: Array | None, log_weight: Array) -> Array:
    """No weight for a landmark that is made of padding alone."""
    if there is None:
        return log_weight
    return namespace(there).where(there, log_weight, -math.inf)
