"""Adaptive EVA: exact keys chosen by each block of queries, and the means of groups for the others.

``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log size_c]).out`` as in EVA, with an exact set E that each
block of queries chooses (`adaptive_eva_keys`) and groups of consecutive keys that are not in E. A causal call
chooses by the queries before the block, is exact within the block, and computes the heads that err most
exactly (`adaptive_eva_heads`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from randattn._backends.dispatch import backend_of, undisturbed
from randattn._core.average import Average
from randattn._core.checks import check_flags
from randattn._core.inputs import Inputs, prepare
from randattn._core.library import namespace

from .adaptive_eva_blocks import estimate
from .adaptive_eva_options import adaptive_options, axes_of_heads
from .adaptive_eva_state import state_after
from .final_average import is_watched
from .softmax import exact_attention

if TYPE_CHECKING:
    from .adaptive_eva_options import Options

    Array = Any


@undisturbed
def adaptive_eva(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_exact: int | None = None,
    group_size: int | None = None,
    block_size: int | None = None,
    exact_heads: int | None = None,
    is_causal: bool = False,
    return_state: bool = False,
    max_tokens: int | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    enable_gqa: bool = False,
    layout: str = "heads_first",
) -> Any:
    r"""Attend exactly to the keys that matter to each block of queries, and to the others by groups.

    This estimator is for models that were trained with softmax attention. The other estimators are for models
    that are trained with them. Without options, up to 4,096 keys, the call is exact attention:
    PyTorch's kernel is faster to that length. NumPy and JAX are faster with ``num_exact=M // 16`` from 2,048
    keys on, the shortest length that was measured.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. The leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_exact : int, optional
        Number of keys that a block of queries computes exactly: by default a sixth of the keys and at
        least 128, in a causal call a 16th of the keys before the block and at least 512.
    group_size : int, optional
        Consecutive keys of a group, by default 64.
    block_size : int, optional
        Queries that choose keys together, by default 384. In a causal call, which is exact within a block, an
        eighth of the keys and at least 512.
    exact_heads : int, optional
        Number of heads (axis -3 of `q`) that are computed exactly: those that err most on a block of the
        queries. By default a quarter of the heads of a causal call, rounded down, and none of another.
    is_causal : bool, default False
        Query n of the N sees the keys up to M - N + n: the queries are the last N of M tokens. Requires N <=
        M. No later token changes a result or a gradient.
    return_state : bool, default False
        With ``is_causal=True``: also return the state after the last token, for `adaptive_eva_step`.
    max_tokens : int, optional
        With ``return_state=True``: number of tokens that the state has places for, by default M.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (M,) or (..., M), optional
        True = attend. Axes before M are those of `k`, each of its size or 1. Masked keys and values are never
        read, even where they hold NaN. Padding may move the borders of the groups and has no other effect.
    query_mask : boolean array, shape (N,) or (..., N), optional
        False = padding: the output row is zero, whatever the query holds, and no gradient passes through it.
        Where N = M the default is `key_mask`, as in self-attention. Pass a mask of True for N queries of
        another sequence. Axes before N are those of `q`, each of its size or 1.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v` and the result: (..., H, N, D), or (..., N, H, D). Masks of tokens-first arrays
        may leave the axis of heads out. Other arguments are heads first.

    Returns
    -------
    array, shape (..., N, E), or a pair of it and an `AdaptiveEVAState` with ``return_state=True``
        The output, of the inputs' library, dtype and device; half precision is summed in float32. A query
        without keys gets zeros. The state is in float32 at least, and has half as many numbers again as the
        keys and values of its places.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and one real floating dtype.
    ValueError
        Shapes, devices, counts or options that do not fit.
    NotImplementedError
        ``return_state=True`` for a Dask array.

    See Also
    --------
    adaptive_eva_step : The next tokens.
    eva : The published estimator.

    Notes
    -----
    With the exact keys E of a block, and :math:`\tilde k_c, \beta_c` the mean key and the mean value of the
    :math:`n_c` keys of group c that are not in E, the result is the average of :math:`v_m`, for the keys in
    E, with the weights :math:`\exp(q \cdot k_m)`, and of :math:`\beta_c` with the weights :math:`n_c \exp(q
    \cdot \tilde k_c)`. The control variates are those of EVA ([1]_, section 4) without a draw.

    A block chooses the keys with the largest share of the weight of one of its *choosers*, the means of up
    to 16 runs of its queries. In a causal call the queries before the block choose: by later queries a token
    to come would change earlier results. A head whose queries look keys up one by one (copying, retrieval) is
    not served by the choice of other queries. Such heads are found by their error on 64 queries: at the end
    of the first quarter of the keys, at most 2,048, which are exact for all heads, and again at half of the
    keys. From there on the heads with the largest errors are exact. Keys and heads are chosen without
    gradients.

    The result is exact where all keys are computed exactly, or where every group is one key. Errors, times
    and the perplexity of a language model are in docs/adaptive.md.

    References
    ----------
    .. [1] L. Zheng, J. Yuan, C. Wang, L. Kong, "Efficient Attention via Control Variates", ICLR 2023,
       arXiv 2302.04542.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import adaptive_eva, softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 36, 4))
    >>> adaptive_eva(q, k, v, num_exact=4, group_size=6, is_causal=True).shape
    (2, 36, 4)
    >>> np.allclose(adaptive_eva(q, k, v, num_exact=36), softmax_attention(q, k, v))
    True
    """
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask, "is_whole": not return_state}
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, layout=layout, **masks)
    check_flags(return_state=return_state, is_causal=is_causal)
    if return_state and not is_causal:
        raise ValueError("return_state: expected is_causal=True with it")
    if max_tokens is not None and not return_state:
        raise ValueError("max_tokens: expected return_state=True with it")
    counts = {
        "num_exact": num_exact,
        "group_size": group_size,
        "block_size": block_size,
        "exact_heads": exact_heads,
    }
    options = adaptive_options(x, counts, is_causal=is_causal)
    state = state_after(x, max_tokens) if return_state else None
    out = x.finish(exact_attention(x, is_causal=is_causal) if options is None else _estimated(x, options))
    return (out, state) if return_state else out


def _estimated(x: Inputs, options: Options) -> Array:
    """Return the results of a call that is not exact attention."""
    own, given = backend_of(x.q), ((x.q, 2), (x.k, 2), (x.v, 2), (x.key_mask, 1))
    if own.is_sharded(x.k) and not (options.is_causal or options.exact_heads or is_watched()):
        rule = (options, x.scale, x.heads, x.k.shape[-2])
        return own.over_shards(_of_shard, rule, x.v.shape[-1], *given)
    # A block may choose any key, and heads are ranked among all heads of a sequence: tokens, and with exact
    # heads also heads, are gathered first.
    heads = axes_of_heads(x) if options.exact_heads else 0
    # A program that is kept for a call of `diagnose` has three more columns, and must serve no other call.
    whole = (options, x.scale, x.heads, is_watched())
    return own.with_whole_tokens(_of_tokens, whole, x.v.shape[-1], heads, *given, (x.query_mask, 1))


def _of_tokens(
    rule: tuple[Options, float, int | None, bool], q: Array, k: Array, v: Array, *masks: Array
) -> Array:
    """Return the results of whole tokens, which may be chunks of a lazy library."""
    options, scale, heads, _ = rule
    key_mask, query_mask = masks
    return estimate(Inputs(q, k, v, key_mask, scale, q.dtype, heads, namespace(q), query_mask), options).out


def _of_shard(
    rule: tuple[Options, float, int | None, int], q: Array, k: Array, v: Array, key_mask: Array | None
) -> Average:
    """Return the averages over a shard of the keys, which has its share of the exact keys."""
    options, scale, heads, tokens = rule
    n, m = q.shape[-2], k.shape[-2]
    number = -(-options.exact_of(tokens) * m // tokens)
    sizes = {"group_size": min(m, options.group_size), "block_size": min(n, options.block_size)}
    x = Inputs(q, k, v, key_mask, scale, q.dtype, heads, namespace(q))
    return estimate(x, options._replace(num_exact=number, **sizes), is_part=True)
