"""Causal LARA: exact attention to a query's window, importance sampling for the keys before the window.

A proposal serves the windows that begin after its segment ends. Draws from N(0, I) serve all windows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from randattn._backends.dispatch import attend, backend_of
from randattn._core.average import Average, Keys, merge
from randattn._core.inputs import Inputs, dot, with_rank
from randattn._core.library import Array
from randattn._core.tracing import plain
from randattn._tokens.grids import blocks, blocks_before, blocks_over
from randattn._tokens.pooling import gather, gather_bias, scatter

from .causal_scan import Block, nothing, scan
from .lara_weights import only, optimal, probability


class Proposals(NamedTuple):
    """The proposals ``N(mu_c, I)`` of all segments, and their draws.

    Attributes
    ----------
    qt : array, shape (..., C, D)
        Query landmarks.
    mu : array, shape (..., C, D)
        Means of the proposals.
    there : boolean array, shape (..., C), or None
        False for a proposal of padding alone; None where each has a token.
    draws : tuple of arrays, shapes (..., C, D)
        One draw of each proposal, or two (antithetic).
    standard : array, shape (..., S, D)
        Draws from N(0, I).
    """

    qt: Array
    mu: Array
    there: Array | None
    draws: tuple[Array, ...]
    standard: Array


def causal(x: Inputs, proposals: Proposals, window: int, *, weighting: str, alpha: float) -> Array:
    """Return the average (..., N, E) of each query over the keys up to it."""
    xp, (qt, mu, _, draws, standard) = x.xp, proposals
    w = xp.concat([*draws, standard], axis=-2)
    # Equation: log r_c = w_c.mu_c - |mu_c|^2/2, the density over that of N(0, I); 0 for a draw from N(0, I).
    half_norm = dot(mu, mu) / 2
    log_r = xp.concat(
        [*(dot(one, mu) - half_norm for one in draws), xp.zeros_like(standard[..., 0])], axis=-1
    )
    log_mixtures, are_there = _log_mixtures(x, proposals, w, window)

    def before_window(q: Array, before: Average, log_mixture: Array, there: Array) -> Average:
        # Equation: alpha_c / r_c = 1 / R_u(w_c) for the balance heuristic; R_u is the window's mixture.
        log_density = log_mixture if weighting == "balance" else log_r
        pair_weight = None
        if weighting == "optimal":
            pair_weight = optimal(
                x.root * qt,
                only(there, xp.zeros_like(log_mixture))[..., : qt.shape[-2]],
                probability(log_r - log_mixture),
                mask=None,
                alpha=alpha,
                over_queries=False,
                copies=len(draws),
            )
        log_weight = only(there, before.log_norm - log_density)
        keys = Keys(w, before.out, log_weight, pair_weight=pair_weight)
        out, log_norm = attend(q, keys, scale=x.root)
        # Equation: exp(q.k) = E xi(q, w) xi(k, w). Here exp(w.q) stands for xi(q, w): |q|^2/2 comes off now,
        # or the weight would have another unit than the exact weight of the window.
        return Average(out, log_norm - x.scale / 2 * dot(q, q))

    def results(
        block: Block, q: Array, out: Array, log_norm: Array, log_mixture: Array, there: Array
    ) -> Array:
        far = before_window(q, block.before, log_mixture[..., 0, :], there[..., 0, :])
        return merge(Average(out, log_norm[..., 0]), far).out

    # A block of the scan is a window: it has `window` rows of tokens and one row of mixtures.
    tokens = ((y, window) for y in (x.q, *_windows(x, window)))
    rows = ((log_mixtures, 1), (are_there, 1))
    return scan(x, w, nothing(x, w), results, window, *tokens, *rows, root=x.root)[1]


def _windows(x: Inputs, window: int) -> tuple[Array, Array]:
    """Return each query's average over its window up to itself, (..., N, E), and its log norm (..., N, 1)."""
    at = blocks(plain(x.q.shape[-2:-1]), "tiles", (window,))
    keys = Keys(gather(x.k, at), gather(x.v, at), gather_bias(x.k, x.key_mask, at), is_causal=True)
    out, log_norm = attend(gather(x.q, at), keys, scale=x.scale)
    return scatter(out, at, x.q), scatter(log_norm[..., None], at, x.q)


def _log_mixtures(x: Inputs, proposals: Proposals, w: Array, window: int) -> tuple[Array, Array]:
    """Return the log mixture of each window at each draw, and a mask of the draws that serve it: (..., B, K).

    The mixture is the sum of the densities of all proposals that serve the window, over that of N(0, I).
    """
    xp, (_, mu, there, draws, standard) = x.xp, proposals
    copies, others = len(draws), standard.shape[-2]
    # Equation: log p_c(w) = w.mu_c - |mu_c|^2/2; a proposal with antithetic draws counts twice.
    log_p = xp.matmul(mu, xp.matrix_transpose(w)) + (math.log(copies) - dot(mu, mu) / 2)[..., None]
    if there is not None:
        log_p = xp.where(there[..., None], log_p, -math.inf)

    def add(before: Array, one: Array) -> tuple[Array, Array]:
        return xp.logaddexp(before, one), before

    # Equation: R_u(w) = S + sum of p_c(w) over the segments c that end before u. The running sum has each
    # prefix of the segments: a maximum over all of them would let a later one change the rounding.
    own = backend_of(log_p)
    _, log_mixtures = own.carry(add, xp.full_like(log_p[..., :1, :], math.log(others)), (log_p, 1))
    tokens, segments = plain(x.q.shape[-2:-1]), plain(mu.shape[-2:-1])
    before = blocks_before(tokens, ("segments", segments), (window,))
    log_mixtures = own.take(log_mixtures, before, axis=-2)
    over = blocks_over(tokens, ("segments", segments), (window,))
    is_there = with_rank(own.beside(over, x.q), log_p.ndim)
    if there is not None:
        is_there = is_there & there[..., None, :]
    always = xp.ones_like(is_there[..., :1])
    return log_mixtures, xp.concat([is_there] * copies + [always] * others, axis=-1)
