"""LARA: multiple importance sampling, one proposal ``N(mu_c, I)`` for each pair of landmarks.

``attend(q, W, f(W), log Z(W) + log alpha_nc - log r_c).out`` with ``w_c ~ N(mu_c, I)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import attend, finite, nonzero
from ._draws import normal_draws
from ._inputs import (
    check_flags,
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
    pooling_ranks,
    resolve_query_mask,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._inputs import Inputs
    from ._segments import How

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
    r"""LARA, linear randomized attention: linear time, consistent, near RA with few samples.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, real floating, heads first. Leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_landmarks : int or tuple of int, optional
        Proposals C, by default 64, or as many as `landmarks` or `noise` has; at most M. On a `grid`
        a tuple gives the number on each axis; an int is laid out as the largest number up to it that
        fits, in the squarest blocks that this number allows (a prime makes strips).
    landmarks : tuple of arrays, shapes (..., C, D), optional
        ``(q_landmarks, k_landmarks)`` of the caller's own, in the units of `q` and `k`. By default the
        means of C segments (the last ones longer by one token where C does not divide; on a grid of
        two or three axes those of adaptive pooling, which overlap there).
    weighting : {"optimal", "balance", "biased"}, default "optimal"
        How the proposals share the work for a query: the balance heuristic; moved from there towards
        the landmarks near the query; or the balance heuristic times ``exp(q . mu)``.
    alpha : float, default 1.0
        How far "optimal" moves.
    normalize : {"queries", "landmarks"}, default "queries"
        What the query's nearness to landmarks, in "optimal", adds up to one over. Over the queries, as
        in the published results, an output depends on the other queries; over landmarks it does not.
    mix_keys : bool, default False
        Mix the key landmarks by softmax attention among themselves first.
    antithetic : bool, default False
        Use both ``mu + eps`` and ``mu - eps``: 2 C frequencies.
    noise_scale : float, default 1.0
        Factor of the draws. The authors' code has ``D ** -0.25``, which is not what the weights assume
        but trains well.
    rng : int, numpy.random.Generator, torch.Generator, cupy.random.Generator or JAX key, optional
        Where the draws come from. One int gives the same draws on every library. With neither `rng` nor
        `noise` the frequencies are the means of the proposals: deterministic, for inference.
    noise : array, shape (..., C, D), optional
        The standard normal draws themselves; broadcasts.
    query_mask : boolean array, shape (..., N), optional
        False keeps a query out of the landmarks; by default `key_mask` where N = M.
    grid : tuple of int, optional
        One, two or three sizes of the grid, in row-major order, that the tokens lie on; N = M.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (..., M), optional
        True = attend. What lies under False is never read, whatever it holds; a landmark of padding
        alone has no weight. Padding may move the borders of the segments, nothing else.
    is_causal : bool, default False
        Not there yet.
    enable_gqa : bool, default False
        Let `q` have a multiple of the heads (axis -3) of `k` and `v`.

    Returns
    -------
    array, shape (..., N, E)
        Of the inputs' library, dtype and device; half precision is summed in float32. A query with
        no key left gets zeros.

    Raises
    ------
    TypeError
        Not arrays, or of different libraries or dtypes, or not floating; a generator of another library.
    ValueError
        Shapes, devices, counts or options that do not fit; both `rng` and `noise`.
    NotImplementedError
        ``is_causal=True``.

    Notes
    -----
    With f and Z as in `rfa`, :math:`w_c \sim N(\mu_c, I)` and :math:`r_c` its density over that of
    N(0, I), the self-normalized multiple importance sampler ([1]_, section 4)

    .. math::

        \mathrm{out}_n = \frac{\sum_c h_{nc}\, f(w_c)}{\sum_c h_{nc}}, \qquad
        h_{nc} = \frac{\alpha_{nc}}{r_c}\, \xi(q_n, w_c)\, Z(w_c), \qquad
        \mu_c = \tilde q_c + \tilde k_c,

    in O(C (N + M)) time.

    References
    ----------
    .. [1] L. Zheng, C. Wang, L. Kong, "Linear Complexity Randomized Self-attention Mechanism",
       ICML 2022, arXiv 2204.04667.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import lara
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 36, 4))
    >>> lara(q, k, v, num_landmarks=9, rng=0).shape
    (2, 36, 4)
    >>> lara(q, k, v, num_landmarks=(3, 3), grid=(6, 6), weighting="balance").shape
    (2, 36, 4)
    """
    check_option("weighting", weighting, ("optimal", "balance", "biased"))
    check_option("normalize", normalize, ("queries", "landmarks"))
    alpha, noise_scale = check_real("alpha", alpha), check_real("noise_scale", noise_scale)
    check_flags(mix_keys=mix_keys, antithetic=antithetic)
    refuse_causal("lara", is_causal)
    also = pooling_ranks(landmarks, noise, query_mask)
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, enable_gqa=enable_gqa, also=also)
    query_mask = resolve_query_mask(x, query_mask)
    qt, kt, there = _landmarks(x, num_landmarks, landmarks, noise, query_mask, grid)

    if mix_keys:
        kt, _ = attend(kt, kt, kt, log_mask(there, kt))
    mu = qt + kt
    eps = normal_draws(x, tuple(mu.shape[-2:]), rng=rng, noise=noise, axes="C, D", lead=mu.shape[:-2])
    w = mu if eps is None else mu + noise_scale * eps
    if antithetic and eps is not None:
        xp = x.xp
        w = xp.concat([w, mu - noise_scale * eps], axis=-2)
        mu = xp.concat([mu, mu], axis=-2)
        there = None if there is None else xp.concat([there, there], axis=-1)

    f, log_z = attend(w, x.k, x.v, x.kappa)
    log_r, log_mixture = _log_densities(w, mu, there)
    if weighting == "optimal":
        balance = _probability(log_r - log_mixture)
        log_alpha = _optimal(x, qt, there, query_mask, balance, alpha, normalize)
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
    count = num_landmarks
    if not isinstance(count, tuple | list):
        count = resolve_count("num_landmarks", count, 64, landmarks=(given, -2), noise=(noise, -2))
    if landmarks is not None:
        total = math.prod(count) if isinstance(count, tuple | list) else count
        return *given_landmarks(x, landmarks, total), None
    how: How = "segments" if len(sizes) == 1 else "cells"
    counts = check_sizes("num_landmarks", count, sizes)
    keys = blocks(sizes, how, counts)
    queries = blocks_of_queries(x, keys)
    qt, log_queries = pool(x.q, queries, query_mask)
    kt, log_keys = pool(x.k, keys, x.key_mask)
    if query_mask is None and x.key_mask is None:
        return qt, kt, None
    return qt, kt, (log_queries > -math.inf) | (log_keys > -math.inf)


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
            t = _probability(log_t)
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


def _probability(log_p: Array) -> Array:
    """At most one, also where the terms of `log_p` are so large that rounding alone says otherwise."""
    xp = namespace(log_p)
    return xp.exp(xp.where(log_p > 0, 0.0, log_p))


def _only(there: Array | None, log_weight: Array) -> Array:
    """No weight for a landmark that is made of padding alone."""
    if there is None:
        return log_weight
    return namespace(there).where(there, log_weight, -math.inf)
