"""Random-feature attention: ``attend(q, W, f(W), log Z(W)).out`` with ``W ~ N(0, I)``.

A causal call goes along the tokens a block at a time, and carries f(W) and log Z(W) of all keys before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from randattn._backends.dispatch import attend, undisturbed
from randattn._core import block_sizes
from randattn._core.average import Average, Keys, finite, nonzero, past
from randattn._core.checks import check_effect, check_flags, check_option, resolve_count
from randattn._core.draws import no_draws, normal_draws
from randattn._core.inputs import Inputs, check_causal, dot, prepare, with_rank
from randattn._core.library import Array, namespace, placement

from .causal_scan import Block, nothing, scan
from .final_average import final_average
from .rfa_features import optimal_spread, preconditioned, trigonometric
from .states import match_state


class RFAState(NamedTuple):
    """The state of causal `rfa` after the tokens so far; its size does not depend on their number.

    Attributes
    ----------
    frequencies : array, shape (..., S, D)
        The frequencies w.
    out : array, shape (..., S, E)
        The average f(w) of the values so far, for each frequency w.
    log_norm : array, shape (..., S)
        ``log Z(w)``, in nats; -inf before the first key.
    scale : array, shape ()
        Factor of the logits.
    """

    frequencies: Array
    out: Array
    log_norm: Array
    scale: Array


@undisturbed
def rfa(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_samples: int | None = None,
    features: str = "positive",
    draws: str = "iid",
    precondition: bool = False,
    rng: Any = None,
    noise: Array | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
    return_state: bool = False,
    enable_gqa: bool = False,
    layout: str = "heads_first",
) -> Any:
    r"""Attend by random features (RFA, Performer): linear time, consistent.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. The leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_samples : int, optional
        Number S of frequencies, by default 64, or as many as `noise` has.
    features : {"positive", "optimal", "trigonometric"}, default "positive"
        "positive": ``exp(w.x - |x|^2/2)`` (FAVOR+); the result is an average of the values. "optimal":
        positive features with frequencies from ``N(0, s I)``, weighted to the same kernel, with the s of
        least variance at the mean of ``|q + k|^2`` (FAVOR++). "trigonometric": cosines and sines; their signs
        can take the estimate out of the range of the values, and it is clipped to this range.
    draws : {"iid", "orthogonal", "simplex", "antithetic", "qmc"}, default "iid"
        Dependence of the frequencies, each of which is standard normal. "iid": independent. "orthogonal":
        orthogonal within each D of them. "simplex": to the corners of a simplex within each D of them.
        "antithetic": each with its negative. "qmc": scrambled Sobol points (for an int seed or NumPy's
        generator; needs SciPy).
    precondition : bool, default False
        Multiply each feature of the queries, and divide that of the keys, by one factor that makes their mean
        squares equal (the diagonal form of SADERF), to lower the variance of the estimated products. The
        products themselves stay as they are.
    rng : int, numpy.random.Generator, torch.Generator, cupy.random.Generator or JAX key, optional
        Source of the draws. One int gives the same draws on every library. `rng` or `noise` is required.
    noise : array, shape (..., S, D), optional
        The frequencies, standard normal draws, in place of `rng`; the leading axes broadcast.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (M,) or (..., M), optional
        True = attend. Axes before M are those of `k`, each of its size or 1. Masked keys and values are never
        read, even where they hold NaN. Padding leaves the other outputs unchanged up to rounding.
    query_mask : boolean array, shape (N,) or (..., N), optional
        False = padding: the output row is zero, whatever the query holds, and no gradient passes through it.
        Where N = M the default is `key_mask`, as in self-attention. Pass a mask of True for N queries of
        another sequence. Axes before N are those of `q`, each of its size or 1.
    is_causal : bool, default False
        Query n sees the keys up to n. Requires N = M and positive features. Within a block of 64 tokens the
        kernel of a pair has a least value in float32, 87 nats below the bound that the norms of query and key
        set. Where the norms of ``sqrt(scale) q`` are in the tens, single rows may be off by as much as the
        values.
    return_state : bool, default False
        With ``is_causal=True``: also return the state after the last token, for `rfa_step`.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v` and the result: (..., H, N, D), or (..., N, H, D). Masks of tokens-first arrays
        may leave the axis of heads out. Other arguments are heads first.

    Returns
    -------
    array, shape (..., N, E)
        The output, of the inputs' library, dtype and device; half precision is summed in float32. A query
        without keys gets zeros. With ``return_state=True``, a pair of this array and an `RFAState`.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and one real floating dtype; a generator of another library.
    ValueError
        Shapes, devices, counts or options that do not fit; both or neither of `rng` and `noise`;
        ``is_causal=True`` with N != M.
    NotImplementedError
        ``is_causal=True`` with features other than positive ones, or with `precondition`: both depend on
        statistics of all tokens.

    See Also
    --------
    rfa_step : The call for the next tokens.

    Notes
    -----
    Let :math:`\xi(x, w) = \exp(w \cdot x - |x|^2/2)` and :math:`w_s \sim N(0, I)`. The result is

    .. math::

        f(w) = \frac{\sum_m \xi(k_m, w)\, v_m}{Z(w)}, \quad Z(w) = \sum_m \xi(k_m, w), \qquad
        \mathrm{out}_n = \frac{\sum_s \xi(q_n, w_s) Z(w_s) f(w_s)}{\sum_s \xi(q_n, w_s) Z(w_s)},

    the self-normalized importance sampler of [1]_ with the proposal N(0, I). Time is O(S (N + M)). The
    positive features and orthogonal draws are those of [2]_, the trigonometric features those of [3]_, the
    optimal features those of [4]_, the preconditioning that of [5]_ and the simplex draws those of [6]_.

    The sums are computed in log space, without an additive epsilon, without a maximum over the sequence and
    without overflow. The variance grows as :math:`\exp(|q + k|^2)`: on inputs of a trained model the error is
    often larger than that of the mean of the values.

    References
    ----------
    .. [1] L. Zheng, C. Wang, L. Kong, "Linear Complexity Randomized Self-attention Mechanism",
       ICML 2022, arXiv 2204.04667.
    .. [2] K. Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, arXiv 2009.14794.
    .. [3] H. Peng et al., "Random Feature Attention", ICLR 2021, arXiv 2103.02143.
    .. [4] V. Likhosherstov et al., "Chefs' Random Tables", arXiv 2205.15317.
    .. [5] V. Likhosherstov et al., "FAVOR#", arXiv 2302.00787.
    .. [6] I. Reid et al., "Simplex Random Features", arXiv 2301.13856.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import rfa, softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    >>> estimate = rfa(q, k, v, num_samples=4096, draws="orthogonal", rng=0)
    >>> bool(np.max(np.abs(estimate - softmax_attention(q, k, v))) < 0.2)
    True
    """
    check_option("features", features, ("positive", "optimal", "trigonometric"))
    check_option("draws", draws, ("iid", "orthogonal", "simplex", "antithetic", "qmc"))
    check_flags(return_state=return_state, precondition=precondition)
    check_effect("rng, not noise,", is_met=noise is None, draws=draws != "iid")
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask, "is_whole": not return_state}
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, layout=layout, also=[(noise, 2)], **masks)
    check_causal(x, is_causal)
    if return_state and not is_causal:
        raise ValueError("return_state: expected is_causal=True with it")
    if is_causal and (features != "positive" or precondition):
        raise NotImplementedError(
            "is_causal: only features='positive' without precondition have a causal form"
        )
    count = resolve_count("num_samples", num_samples, 64, noise=(noise, -2))
    w = normal_draws(x, (count, x.q.shape[-1]), rng=rng, noise=noise, axes="S, D", kind=draws)
    if w is None:
        raise no_draws("rfa")
    if precondition:
        x = preconditioned(x)
    if features == "trigonometric":
        return x.finish(trigonometric(x, w))
    if is_causal:
        state, out = _causal(x, w, nothing(x, w), x.root)
        scale = x.xp.asarray(x.scale, dtype=x.q.dtype, device=x.device)
        return (x.finish(out), _given_back(x, w, state, scale)) if return_state else x.finish(out)
    if features == "optimal":
        spread = optimal_spread(x)
        w = w * x.xp.sqrt(spread)
        # Equation: the density of N(0, I) over that of N(0, s I) is exp((1/s - 1) |w|^2 / 2) up to a
        # constant, which cancels in the average.
        log_weight = (1 / spread - 1)[..., 0] / 2 * dot(w, w)
    # Equation: f(w), log Z(w) = attend(w, k, v, kappa).
    f, log_z = attend(w, Keys(x.k, x.v, x.key_bias, x.scale), scale=x.root)
    if features == "optimal":
        log_z = log_z + log_weight
    # Equation: out = attend(q, W, f(W), log Z(W)).
    return x.finish(final_average(x.q, Keys(w, f, log_z), scale=x.root))


@undisturbed
def rfa_step(
    q: Array,
    k: Array,
    v: Array,
    state: RFAState,
    /,
    *,
    key_mask: Array | None = None,
    enable_gqa: bool = False,
    layout: str = "heads_first",
) -> tuple[Array, RFAState]:
    """Continue causal `rfa` with the next tokens.

    Parameters
    ----------
    q : array, shape (..., T, D)
        Queries of the next T tokens, at least one, heads first.
    k : array, shape (..., T, D)
        Keys of these tokens.
    v : array, shape (..., T, E)
        Values of these tokens.
    state : RFAState
        State after all earlier tokens, from `rfa` with ``return_state=True`` or from this function.
    key_mask : boolean array, shape (T,) or (..., T), optional
        True = attend, in this step and in later ones. Axes before T are those of `k`, each of its size or 1.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v` and the result: (..., H, T, D), or (..., T, H, D). Masks of tokens-first arrays
        may leave the axis of heads out. Other arguments are heads first.

    Returns
    -------
    out : array, shape (..., T, E)
        The rows that one call of `rfa` on all tokens gives for these tokens.
    state : RFAState
        State after these tokens.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and dtype; a state that is no `RFAState` of such arrays.
    ValueError
        Shapes or devices that do not fit each other or the state.

    See Also
    --------
    rfa : The call on all tokens.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import rfa, rfa_step
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 4))
    >>> prefill, state = rfa(q[:, :5], k[:, :5], v[:, :5], rng=0, is_causal=True, return_state=True)
    >>> step, state = rfa_step(q[:, 5:], k[:, 5:], v[:, 5:], state)
    >>> bool(np.allclose(step, rfa(q, k, v, rng=0, is_causal=True)[:, 5:]))
    True
    """
    also = [(getattr(state, "out", None), 2)]
    given: dict[str, Any] = {"key_mask": key_mask, "enable_gqa": enable_gqa, "layout": layout}
    x = prepare(q, k, v, scale=1.0, is_whole=False, also=also, **given)
    check_causal(x, is_causal=True)
    sizes = {
        "frequencies": (None, x.q.shape[-1]),
        "out": (None, x.v.shape[-1]),
        "log_norm": (None,),
        "scale": (),
    }
    w, f, log_z, scale = match_state("rfa", RFAState, state, x, sizes, shared=("frequencies",))
    after, out = _causal(x, w, Average(f, log_z), x.xp.sqrt(scale))
    return x.finish(out), _given_back(x, w, after, scale)


def _given_back(x: Inputs, w: Array, state: Average, scale: Array) -> RFAState:
    return RFAState(x.merge_heads(w, 2), x.merge_heads(state.out, 2), x.merge_heads(state.log_norm, 1), scale)


def _causal(x: Inputs, w: Array, before: Average, root: Any) -> tuple[Average, Array]:
    """Return the state after the last token, and the outputs of all tokens."""

    def results(block: Block, q: Array) -> Array:
        if q.shape[-2] == 1:
            # The state after a single token has its key: no kernel within the block is needed.
            return attend(root * q, Keys(w, *block.after)).out
        along_q = x.xp.matmul(root * q, x.xp.matrix_transpose(w))
        return _by_kernel(along_q, block, is_masked=x.key_mask is not None)

    size = block_sizes.CAUSAL_TOKENS
    return scan(x, w, before, results, size, (x.q, size), root=root)


def _by_kernel(along_q: Array, block: Block, *, is_masked: bool) -> Array:
    """Attend to the keys before the block through the state, and to the block's own keys by their kernel."""
    xp, (before, _, log_xi, v) = namespace(along_q), block
    # Equation: the kernel of a pair is sum_s xi(q, w_s) xi(k, w_s). Each factor is taken over its maximum, or
    # it would overflow; before that a level for each frequency moves from the keys' factor to the queries'.
    # The level is that of the past and the block's first key: with a later key in it, the features of earlier
    # keys would fall below the smallest float.
    level = xp.logaddexp(before.log_norm, _of_first(log_xi, before) if is_masked else log_xi[..., 0])
    along_q, log_xi = along_q + level[..., None, :], log_xi - level[..., None]
    top_k = xp.max(log_xi, axis=-2, keepdims=True)
    features_q = xp.exp(along_q - xp.max(along_q, axis=-1, keepdims=True))
    # The maximum of a padded key is -inf: `finite` keeps -inf - -inf = NaN out.
    kernel = xp.matmul(features_q, xp.exp(log_xi - finite(top_k)))
    smallest = xp.asarray(xp.finfo(kernel.dtype).smallest_normal, dtype=kernel.dtype, device=placement(v))
    # The logarithm of a kernel that underflows would be -inf, with a gradient of NaN: hence a least value.
    seen = xp.matrix_transpose(past(along_q, v.shape[-2], 0, 0))
    log_weights = xp.where(seen, xp.log(xp.maximum(kernel, smallest)) + top_k, -math.inf)
    # In these units the past and the first key together weigh at least one. A negative maximum is not
    # subtracted: exp(-top) would overflow.
    top = xp.max(log_weights, axis=-1, keepdims=True)
    top = xp.where(top > 0, top, 0.0)
    weights = xp.exp(log_weights - top)
    share = features_q * xp.exp(before.log_norm - level)[..., None, :] * xp.exp(-top)
    total = xp.sum(weights, axis=-1, keepdims=True) + xp.sum(share, axis=-1, keepdims=True)
    return (xp.matmul(weights, v) + xp.matmul(share, before.out)) / nonzero(total)


def _of_first(log_xi: Array, before: Average) -> Array:
    """Return `log_xi` (..., S) of the first key of a block, or of its first real key if nothing precedes."""
    xp, n = namespace(log_xi), log_xi.shape[-1]
    order = with_rank(xp.arange(n, device=placement(log_xi)), log_xi.ndim)
    is_real = log_xi > -math.inf
    number = xp.min(xp.where(is_real, order, n), axis=-1, keepdims=True)
    found = xp.sum(xp.where(is_real & (order == number), log_xi, 0.0), axis=-1)
    first = log_xi[..., 0]
    # Padding before all keys has the level -inf, from which a difference is NaN: a real key stands in.
    return xp.where((first == -math.inf) & (before.log_norm == -math.inf), found, first)
