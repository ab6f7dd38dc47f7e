"""Adaptive EVA, a token at a time: each query chooses groups of keys for itself.

A step reads a few features of all keys, whole groups with the largest logits in these features, and the means
of the other groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from randattn._backends.dispatch import attend, backend_of, undisturbed
from randattn._core import block_sizes
from randattn._core.average import Keys, finite
from randattn._core.checks import as_count
from randattn._core.indexing import rows
from randattn._core.inputs import check_causal, prepare, with_rank
from randattn._core.library import namespace, placement

from .adaptive_eva_options import lead_of_keys
from .adaptive_eva_state import (
    GROUP,
    RECENT,
    AdaptiveEVAState,
    axes_of,
    by_key_head,
    given_back,
    lead_of_queries,
    refuse_lazy,
    with_groups,
)
from .states import match_state

if TYPE_CHECKING:
    Array = Any

# A query computes one key of so many exactly, and at least `_LEAST_EXACT`. With a 16th the error was 0.11.
_EXACT_SHARE, _LEAST_EXACT = 8, 128


@undisturbed
def adaptive_eva_step(
    q: Array,
    k: Array,
    v: Array,
    state: AdaptiveEVAState,
    /,
    *,
    num_exact: int | None = None,
    key_mask: Array | None = None,
    enable_gqa: bool = False,
    layout: str = "heads_first",
) -> tuple[Array, AdaptiveEVAState]:
    r"""Continue causal `adaptive_eva` with the next tokens.

    Each query computes the last 128 to 256 tokens exactly, and chooses groups of 16 of the other keys for
    itself. In `adaptive_eva` a block of queries chooses together and some heads are exact: docs/adaptive.md
    has the errors and times of both.

    Parameters
    ----------
    q : array, shape (..., T, D)
        Queries of the next T tokens, at least one, heads first.
    k : array, shape (..., T, D)
        Keys of these tokens.
    v : array, shape (..., T, E)
        Values of these tokens.
    state : AdaptiveEVAState
        State after all earlier tokens, from `adaptive_eva` with ``return_state=True`` or from this function.
    num_exact : int, optional
        Number of keys in groups that a query computes exactly, rounded up to whole groups; the query heads
        that share a key head share them. By default an eighth of the places of the state, and at least 128.
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
        The output; NaN for tokens beyond the places of the state, `max_tokens` of the call that made it.
    state : AdaptiveEVAState
        State after these tokens.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and dtype; a state that is no `AdaptiveEVAState` of such
        arrays.
    ValueError
        Shapes, devices or counts that do not fit each other or the state.
    NotImplementedError
        A Dask array: a step is computed at once.

    See Also
    --------
    adaptive_eva : The call on all tokens.

    Notes
    -----
    The result is ``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log size_c])``, as that of `adaptive_eva`
    with whole groups in E. It is exact where E has all groups. The score of a group for a query is the
    largest logit of its keys, by a quarter of the features: those in which the logits of the last queries of
    the first call vary most. SparQ ([1]_, section 4) chooses features for each query, and double sparsity
    ([2]_, section 3) once by other data.

    A state is a large array that each step returns. Under `jax.jit` pass ``donate_argnums`` for it, or each
    step copies it.

    References
    ----------
    .. [1] L. Ribar, I. Chelombiev, L. Hudlass-Galley, C. Blake, C. Luschi, D. Orr, "SparQ Attention:
       Bandwidth-Efficient LLM Inference", ICML 2024, arXiv 2312.04985.
    .. [2] S. Yang, Y. Sheng, J. E. Gonzalez, I. Stoica, L. Zheng, "Post-Training Sparse Attention with Double
       Sparsity", arXiv 2408.07092.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import adaptive_eva, adaptive_eva_step, softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 4))
    >>> prefill, state = adaptive_eva(
    ...     q[:, :290], k[:, :290], v[:, :290], is_causal=True, return_state=True, max_tokens=300
    ... )
    >>> step, state = adaptive_eva_step(q[:, 290:], k[:, 290:], v[:, 290:], state)
    >>> bool(np.allclose(step, softmax_attention(q, k, v, is_causal=True)[:, 290:], atol=0.02))
    True
    """
    also = [(getattr(state, "tokens", None), 2)]
    given: dict[str, Any] = {"key_mask": key_mask, "enable_gqa": enable_gqa, "layout": layout}
    x = prepare(q, k, v, scale=1.0, is_whole=False, also=also, **given)
    check_causal(x, is_causal=True)
    refuse_lazy(x)
    d, e = x.q.shape[-1], x.v.shape[-1]
    own = match_state(
        "adaptive_eva",
        AdaptiveEVAState,
        state,
        x,
        axes_of(d, e),
        whole=("features", "indexed", "number"),
        lead=lead_of_keys(x),
    )
    places = own.means.shape[-2]
    if num_exact is None:
        num_exact = max(_LEAST_EXACT, places * GROUP // _EXACT_SHARE)
    groups = min(places, -(-as_count("num_exact", num_exact, minimum=1) // GROUP))

    lead = tuple(own.tokens.shape[:-2])
    q = by_key_head(x, x.q, lead)

    def flat(y: Array, trailing: int) -> Array:
        rest = tuple(y.shape[y.ndim - trailing :])
        return x.xp.reshape(x.xp.broadcast_to(y, (*lead, *rest)), (math.prod(lead), *rest))

    bias = x.xp.zeros_like(x.k[..., 0]) if x.key_bias is None else x.key_bias
    axes = axes_of(d, e).values()
    inner = AdaptiveEVAState(*(flat(y, len(a)) if a else y for y, a in zip(own, axes, strict=True)))

    def block(state: AdaptiveEVAState, *tokens: Array) -> tuple[AdaptiveEVAState, Array]:
        return _next(state, groups, *tokens)

    tokens = (own.scale * q, *(flat(y, 2) for y in (x.k, x.v, bias[..., None])))
    after, out = backend_of(x.q).carry(block, inner, *((y, RECENT // 2) for y in tokens))
    out = x.xp.reshape(out, (*lead_of_queries(x, lead), *out.shape[-2:]))
    return x.finish(out), given_back(x, after, lead)


def _next(
    state: AdaptiveEVAState, groups: int, q: Array, k: Array, v: Array, bias: Array
) -> tuple[AdaptiveEVAState, Array]:
    """Return the state after T tokens, at most half of the recent ones, and their outputs (L, G, T, E).

    L counts the heads of keys of all sequences: k (L, T, D), q (L, G, T, D).
    """
    xp, own, device = namespace(q), backend_of(q), placement(q)
    length, integer = k.shape[-2], state.number.dtype
    is_full = state.number - state.indexed > RECENT - length
    state = own.when(is_full, with_groups, state)
    before = state.number - state.indexed
    slots = xp.arange(RECENT, dtype=integer, device=device)
    is_new = (slots >= before) & (slots < before + length)
    # Not an assignment: `before` is an array, and JAX's arrays are constants.
    new = xp.where(is_new, slots - before, 0)
    recent, recent_bias = (
        xp.where(is_new[None, :, None], xp.take(y, new, axis=1), old)
        for y, old in ((xp.concat([k, v], axis=-1), state.recent), (bias, state.recent_bias[..., None]))
    )
    state = state._replace(recent=recent, recent_bias=recent_bias[..., 0], number=state.number + length)
    # The numbers of the queries among the recent tokens, which hide the keys to come.
    own_slots = before + xp.arange(length, dtype=integer, device=device)
    arrays = (q, own_slots, *state[:8])
    out = own.as_program(_average, groups, *arrays)
    fits = state.indexed + own_slots < state.tokens.shape[-2]
    # Beyond the places of the state no group is made. A traced program cannot raise: the output is NaN.
    return state, xp.where(with_rank(fits[:, None], 4), out, math.nan)


def _average(groups: int, q: Array, own_slots: Array, *fields: Array) -> Array:
    """Return the outputs (L, G, T, E) of queries, each with keys of its own from so many groups."""
    xp, own, (heads, _, length, d) = namespace(q), backend_of(q), q.shape
    features, by_feature, tokens, bias, means, sizes, recent, recent_bias = fields
    count = sizes.shape[-1]
    rest = means[:, None, :, :], xp.log(xp.where(sizes > 0, sizes, 1.0))[:, None, :]
    slots = xp.arange(RECENT, dtype=own_slots.dtype, device=placement(q))
    by_group = xp.reshape(tokens, (heads, count, -1))

    def of_queries(q: Array, own_slots: Array) -> Array:
        q = xp.permute_dims(q, (0, 2, 1, 3))
        score = _scores(own.constant(q), features, own.constant(by_feature), sizes)
        chosen = own.largest(score, groups)
        exact = xp.reshape(rows(by_group, chosen), (heads, q.shape[1], -1, tokens.shape[-1]))
        exact_bias = xp.reshape(rows(bias, chosen), exact.shape[:-1])
        is_left = ~own.marked(chosen, count) & (sizes > 0)[:, None, :]
        is_past = slots[None, :] <= xp.reshape(own_slots, (-1, 1))
        parts = (
            (exact, exact_bias),
            (recent[:, None, :, :], xp.where(is_past[None, ...], recent_bias[:, None, :], -math.inf)),
            (rest[0], xp.where(is_left, rest[1], -math.inf)),
        )
        out, _ = attend(q, *(Keys(y[..., :d], y[..., d:], b) for y, b in parts))
        return xp.permute_dims(out, (0, 2, 1, 3))

    # The exact keys of a block of queries stay in the cache.
    numbers = heads * groups * GROUP * tokens.shape[-1]
    own_slots = xp.reshape(own_slots, (1, 1, length, 1))
    return own.by_rows(of_queries, max(1, block_sizes.CHOICE_NUMBERS // numbers), (q, -2), (own_slots, -2))


def _scores(q: Array, features: Array, by_feature: Array, sizes: Array) -> Array:
    """Return the score (L, T, C) of each group for the queries (L, T, G, D) that share their keys."""
    xp, (heads, length, shared, d), number = namespace(q), q.shape, features.shape[-1]
    q = xp.reshape(q, (heads, length * shared, d))
    q = xp.matrix_transpose(rows(xp.matrix_transpose(q), features))
    logits = xp.matmul(q, xp.reshape(by_feature, (heads, number, -1)))
    logits = xp.max(xp.reshape(logits, (heads, length, shared, GROUP, -1)), axis=-2)
    logits = xp.where((sizes > 0)[:, None, None, :], logits, -math.inf)
    return xp.max(logits - finite(xp.max(logits, axis=-1, keepdims=True)), axis=-2)
