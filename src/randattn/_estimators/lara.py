"""LARA: multiple importance sampling, one proposal ``N(mu_c, I)`` for each pair of landmarks.

``attend(q, W, f(W), log Z(W) + log alpha_nc - log r_c).out`` with ``w_c ~ N(mu_c, I)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from randattn._backends.dispatch import attend, undisturbed
from randattn._core.average import Keys, finite
from randattn._core.checks import as_count, as_real, broadcast_shapes, check_effect, check_flags, check_option
from randattn._core.describe import shown
from randattn._core.draws import normal_draws
from randattn._core.inputs import Inputs, check_causal, log_mask, prepare
from randattn._core.library import Array
from randattn._tokens.grids import How, blocks, number_on_grid, tokens_on_grid
from randattn._tokens.pooling import blocks_of_queries, count_of_blocks, given_landmarks, pool, pooling_ranks

from .final_average import final_average
from .lara_causal import Proposals, causal
from .lara_weights import only, optimal, probability


@undisturbed
def lara(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_landmarks: int | tuple[int, ...] | None = None,
    landmarks: tuple[Array, Array] | None = None,
    weighting: str = "optimal",
    alpha: float = 1,
    normalize: str | None = None,
    mix_keys: bool = False,
    antithetic: bool = False,
    # Not 1.0: Dynamo would trace twice, with a symbolic float and without.
    noise_scale: float = 1,
    rng: Any = None,
    noise: Array | None = None,
    query_mask: Array | None = None,
    grid: tuple[int, ...] | None = None,
    window: int | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    layout: str = "heads_first",
) -> Array:
    r"""Attend by linear randomized attention (LARA): multiple importance sampling in linear time, consistent.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. The leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_landmarks : int or tuple of int, optional
        Number C of proposals, at most M; by default 64, or as many as `landmarks` or `noise` has. On a
        `grid`, a tuple gives the number on each axis, and an int gives the largest number up to it that fits,
        in blocks as square as that number allows (a prime number gives strips).
    landmarks : tuple of arrays, shapes (..., C, D), optional
        The caller's ``(q_landmarks, k_landmarks)``, in the units of `q` and `k`. By default these are the
        means of C segments; the last segments are one token longer where C does not divide the number of
        tokens. On a grid of two or three axes segments are the cells of adaptive pooling, which overlap in
        that case.
    weighting : {"optimal", "balance", "biased"}, default "optimal"
        Weights of the proposals for a query. "balance": the balance heuristic. "optimal": the balance
        heuristic, moved towards the landmarks near the query. "biased": the balance heuristic times
        ``exp(q . mu)``.
    alpha : float, default 1.0
        Factor of the move in "optimal".
    normalize : {"queries", "landmarks"}, optional
        Axis over which the nearness of queries to landmarks, in "optimal", adds up to one. "queries": as in
        the published results, the default; an output depends on the other queries. "landmarks": an output
        does not depend on other queries; the default and the only choice with ``is_causal=True``.
    mix_keys : bool, default False
        Mix the key landmarks by softmax attention among themselves first.
    antithetic : bool, default False
        Use both ``mu + eps`` and ``mu - eps``: 2 C frequencies.
    noise_scale : float, default 1.0
        Factor of the draws. The authors' code uses ``D ** -0.25``, which trains well although the weights
        assume 1.
    rng : int, numpy.random.Generator, torch.Generator, cupy.random.Generator or JAX key, optional
        Source of the draws. One int gives the same draws on every library. Without `rng` and `noise` each
        frequency is the mean of its proposal: a deterministic form, for inference.
    noise : array, shape (..., C, D), optional
        The standard normal draws, in place of `rng`; the array broadcasts.
    query_mask : boolean array, shape (N,) or (..., N), optional
        False = padding: the output row is zero, whatever the query holds, no gradient passes through it, and
        no landmark includes it. Where N = M the default is `key_mask`, as in self-attention. Pass a mask of
        True for N queries of another sequence. Axes before N are those of `q`, each of its size or 1.
    grid : tuple of int, optional
        One, two or three sizes of the grid on which the tokens lie in row-major order. Requires N = M.
    window : int, optional
        With ``is_causal=True``: tokens of the window that a query sees exactly, by default 64.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (M,) or (..., M), optional
        True = attend. Axes before M are those of `k`, each of its size or 1. Masked keys and values are never
        read, even where they hold NaN. A landmark of padding alone has no weight. Padding may move the
        borders of the segments and has no other effect.
    is_causal : bool, default False
        Query n sees the keys of its window up to n exactly. The proposals whose segments end before the
        window begins, and draws from N(0, I), estimate the keys before the window. Requires N = M and the
        weighting "optimal" or "balance".
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v` and the result: (..., H, N, D), or (..., N, H, D). Masks of tokens-first arrays
        may leave the axis of heads out. Other arguments are heads first.

    Returns
    -------
    array, shape (..., N, E)
        The output, of the inputs' library, dtype and device; half precision is summed in float32. A query
        without keys gets zeros.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and one real floating dtype; a generator of another library.
    ValueError
        Shapes, devices, counts or options that do not fit; both `rng` and `noise`; ``is_causal=True``
        with N != M, ``normalize="queries"`` or ``weighting="biased"``.

    Notes
    -----
    Let f and Z be those of `rfa`, :math:`w_c \sim N(\mu_c, I)` a draw and :math:`r_c` the ratio of its
    density to that of N(0, I). The result is the self-normalized multiple importance sampler
    ([1]_, section 4)

    .. math::

        \mathrm{out}_n = \frac{\sum_c h_{nc}\, f(w_c)}{\sum_c h_{nc}}, \qquad
        h_{nc} = \frac{\alpha_{nc}}{r_c}\, \xi(q_n, w_c)\, Z(w_c), \qquad
        \mu_c = \tilde q_c + \tilde k_c,

    in O(C (N + M)) time.

    In a causal call, let the segments 1, ..., b end before a window begins. The proposals for this window are
    those of these segments, and N(0, I) once for each of its draws. The sum over all draws then estimates the
    absolute weight :math:`\sum_m \exp(q_n \cdot k_m)` of the keys before the window, which merges with the
    weight of the window's keys.

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
    check_flags(mix_keys=mix_keys, antithetic=antithetic, is_causal=is_causal)
    alpha, noise_scale = as_real("alpha", alpha), as_real("noise_scale", noise_scale)
    is_optimal, is_near = weighting == "optimal", normalize is not None
    check_effect("weighting='optimal'", is_met=is_optimal, alpha=alpha != 1, normalize=is_near)
    if normalize is None:
        normalize = "landmarks" if is_causal else "queries"
    check_option("normalize", normalize, ("queries", "landmarks"))
    _check_causal_options(is_causal, window, weighting, normalize, grid)
    has_draws = rng is not None or noise is not None
    check_effect("rng or noise", is_met=has_draws, antithetic=antithetic, noise_scale=noise_scale != 1)
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
    also = pooling_ranks(landmarks, noise)
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, layout=layout, also=also, **masks)
    check_causal(x, is_causal)
    qt, kt, there = landmarks_of(x, num_landmarks, landmarks, noise, grid)
    qt, kt = x.root * qt, x.root * kt
    if mix_keys:
        # Equation: kt = attend(kt, kt, kt). In a causal call a landmark must not see those of later segments.
        kt, _ = attend(kt, Keys(kt, kt, log_mask(there, kt), is_causal=is_causal))
    # Equation: w_c ~ N(mu_c, I) with mu_c = qt_c + kt_c.
    mu = qt + kt
    eps = normal_draws(x, tuple(mu.shape[-2:]), rng=rng, noise=noise, axes="C, D", lead=mu.shape[:-2])
    if eps is None:
        noises = [x.xp.zeros_like(mu[..., :1, :])]
    else:
        eps = noise_scale * x.xp.broadcast_to(eps, broadcast_shapes(eps.shape, mu.shape))
        noises = [eps, -eps] if antithetic else [eps]
    draws = [mu + one for one in noises]
    if is_causal:
        # Draws from N(0, I): the same noise, negated, so that it adds no point near a proposal's own draw.
        standard = x.xp.concat([-one for one in noises], axis=-2)
        proposals = Proposals(qt, mu, there, tuple(draws), standard)
        size = as_count("window", 64 if window is None else window)
        return x.finish(causal(x, proposals, size, weighting=weighting, alpha=alpha))
    proposals = Proposals(qt, mu, there, tuple(draws), mu[..., :0, :])
    return x.finish(_weighed(x, proposals, weighting=weighting, alpha=alpha, normalize=normalize))


def _weighed(x: Inputs, proposals: Proposals, *, weighting: str, alpha: float, normalize: str) -> Array:
    """Return the average (..., N, E) over all draws, weighted by their proposals' shares of the work."""
    xp, (qt, mu, there, draws, _) = x.xp, proposals
    w = xp.concat(draws, axis=-2)
    mu = xp.concat([mu] * len(draws), axis=-2)
    present = None if there is None else xp.concat([there] * len(draws), axis=-1)
    # Equation: f(w), log Z(w) = attend(w, k, v, kappa).
    f, log_z = attend(w, Keys(x.k, x.v, x.key_bias, x.scale), scale=x.root)
    # Densities are ratios to N(0, I). Equation: log mixture(w) = logsumexp_c (w.mu_c - |mu_c|^2/2).
    half_norm = xp.sum(mu * mu, axis=-1) / 2
    _, log_mixture = attend(w, Keys(mu, mu, only(present, -half_norm)))
    # Where all tokens are padding the mixture is -inf, and a difference of two -inf would be NaN.
    log_mixture = finite(log_mixture)
    if weighting != "optimal":
        # Equation: bh_c = r_c / mixture, so that bh_c / r_c = 1 / mixture: the proposal's own density
        # cancels. The factor exp(q.mu) of "biased" joins exp(q.w) in one product.
        towards = w + mu if weighting == "biased" else w
        return final_average(x.q, Keys(towards, f, only(present, log_z - log_mixture)), scale=x.root)
    # Equation: log r_c = w_c.mu_c - |mu_c|^2/2.
    log_r = xp.sum(w * mu, axis=-1) - half_norm
    over_queries = normalize == "queries"
    offset = _over_queries(x, qt) if over_queries else xp.zeros_like(qt[..., 0])
    alpha_nc = optimal(
        x.root * qt,
        only(there, offset),
        probability(log_r - log_mixture),
        mask=x.query_mask,
        alpha=alpha,
        over_queries=over_queries,
        copies=len(draws),
    )
    # Equation: out = attend(q, W, f(W), log Z(W) + log alpha_nc - log r_c). As a factor alpha is made a block
    # of queries at a time; as a bias of pairs it would be N x C numbers in memory.
    keys = Keys(w, f, only(present, log_z - log_r), pair_weight=alpha_nc)
    return final_average(x.q, keys, scale=x.root)


def _check_causal_options(is_causal: bool, window: Any, weighting: str, normalize: str, grid: Any) -> None:
    if not is_causal:
        if window is not None:
            raise ValueError("window: lara has one where is_causal=True")
        return
    if isinstance(grid, tuple | list) and len(grid) > 1:
        raise ValueError(f"is_causal: expected tokens in a row, got grid {shown(grid)}")
    if normalize == "queries":
        raise ValueError("is_causal: expected normalize='landmarks': a sum over queries includes later ones")
    if weighting == "biased":
        raise ValueError(
            "is_causal: expected weighting 'optimal' or 'balance': 'biased' weights have no scale in common "
            "with the weights of the window"
        )


def landmarks_of(
    x: Inputs,
    num_landmarks: int | tuple[int, ...] | None,
    landmarks: tuple[Array, Array] | None,
    noise: Array | None,
    grid: tuple[int, ...] | None,
) -> tuple[Array, Array, Array | None]:
    """Return the landmarks of queries and keys (..., C, D), and a mask (..., C) of landmarks with a token."""
    sizes = tokens_on_grid(grid, x.q.shape[-2], x.k.shape[-2])
    count = count_of_blocks("num_landmarks", num_landmarks, landmarks, noise)
    if landmarks is not None:
        total = math.prod(count) if isinstance(count, tuple | list) else count
        return *given_landmarks(x, landmarks, total), None
    how: How = "segments" if len(sizes) == 1 else "cells"
    counts = number_on_grid("num_landmarks", count, sizes)
    keys = blocks(sizes, how, counts)
    queries = blocks_of_queries(x, keys)
    qt, log_queries = pool(x.q, queries, x.query_mask)
    kt, log_keys = pool(x.k, keys, x.key_mask)
    if x.query_mask is None and x.key_mask is None:
        return qt, kt, None
    # A landmark counts if either side has a token: masked queries must not remove the keys of their segment.
    return qt, kt, (log_queries > -math.inf) | (log_keys > -math.inf)


def lara_landmarks(x: Inputs, options: Mapping[str, Any], is_causal: bool) -> tuple[Array, Array]:  # noqa: ARG001
    """Return the mean queries and mean keys (..., C, D) of the segments."""
    qt, kt, _ = landmarks_of(x, options.get("num_landmarks"), None, None, options.get("grid"))
    return qt, kt


def _over_queries(x: Inputs, qt: Array) -> Array:
    """Return the log factor (..., C) with which the queries' weights ``exp(q . qt)`` add up to one."""
    # The sum of the weights alone: values without features.
    _, log_norm = attend(qt, Keys(x.q, x.q[..., :0], log_mask(x.query_mask, x.q)), scale=x.root)
    return -finite(log_norm)
