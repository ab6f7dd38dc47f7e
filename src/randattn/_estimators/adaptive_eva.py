"""Adaptive EVA: exact keys chosen by each block of queries, and control variates for groups of the others.

The control variate of a group is the tangent at the mean query mu to the convex ``log Z_c(q)``
(`adaptive_eva_groups`): its weight is never more than that of its keys. A block of queries computes exactly
the keys for which the tangent is furthest from ``exp(q.k_m)`` (`adaptive_eva_keys`), and takes their shares
out of the groups: ``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log Z_c - mu.kt_c]).out``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from randattn._backends.dispatch import backend_of, undisturbed
from randattn._core import block_sizes
from randattn._core.average import Keys, average_of_all
from randattn._core.indexing import entries, rows
from randattn._core.inputs import hide, log_mask, prepare, refuse_causal
from randattn._core.library import hint, namespace, placement
from randattn._tokens.grids import Blocks
from randattn._tokens.tree import covariance, halves, sketch, stride_of

from .adaptive_eva_groups import Groups, Tokens, compared, group_keys
from .adaptive_eva_keys import chosen
from .final_average import final_average
from .options import adaptive_choice, depth_of, rank_of

if TYPE_CHECKING:
    from randattn._core.inputs import Inputs

    from .options import Choice

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
    groups: Any = "tree",
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    enable_gqa: bool = False,
) -> Array:
    r"""Attend exactly to the keys that matter to each block of queries, and to the others by groups.

    This estimator is for models that were trained with softmax attention. The other estimators are for models
    that are trained with them.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. The leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_exact : int, optional
        Number of keys that a block of queries computes exactly, by default M / 8, rounded up.
    group_size : int, optional
        Keys of a group, by default M / 64, rounded up. With "tree" the number of groups is rounded down to a
        power of two.
    block_size : int, optional
        Queries that choose keys together: by default 8, or 128 for more than 2,048 queries, and at least a
        64th of the queries. The number of blocks is rounded down to a power of two. Smaller blocks are more
        accurate and slower.
    groups : {"tree", "segments"} or array of int, shape (..., M), default "tree"
        "tree": groups of keys to which these queries give similar logits, found by halving the keys along
        their main directions. "segments": groups of consecutive keys. An array gives the label of each key's
        group, which is less than M / `group_size`, rounded up.
    is_causal : bool, default False
        Not available yet: a block's queries choose keys together, and would see later ones.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (..., M), optional
        True = attend. Masked keys and values are never read, even where they hold NaN. Padding may move the
        borders of the groups and has no other effect.
    query_mask : boolean array, shape (..., N), optional
        False = padding: the output row is zero, whatever the query holds, and no gradient passes through it.
        Where N = M the default is `key_mask`, as in self-attention. Pass a mask of True for N queries of
        another sequence.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.

    Returns
    -------
    array, shape (..., N, E)
        The output, of the inputs' library, dtype and device; half precision is summed in float32. A query
        without keys gets zeros.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and one real floating dtype.
    ValueError
        Shapes, devices, counts or options that do not fit.
    NotImplementedError
        ``is_causal=True``.

    See Also
    --------
    eva : The published estimator.

    Notes
    -----
    Let :math:`\mu` be the mean query, :math:`Z_c(q) = \sum_{m \in P_c} \exp(q \cdot k_m)` the weight of a
    group and :math:`p_m = \exp(\mu \cdot k_m) / Z_c(\mu)` the share of a key in it. The control variate of
    the group is

    .. math::

        \exp(q \cdot k_m) \approx p_m \exp(\log Z_c(\mu) + (q - \mu) \cdot \tilde k_c), \qquad
        \tilde k_c = \sum_m p_m k_m, \quad \beta_c = \sum_m p_m v_m,

    in place of the published one, which is the tangent at zero ([1]_, section 4). The result is exact where
    all keys are computed exactly, or where every group is one key. Groups and keys are chosen without
    gradients. The mathematics, and errors on inputs of trained models, are in docs/adaptive.md.

    References
    ----------
    .. [1] L. Zheng, J. Yuan, C. Wang, L. Kong, "Efficient Attention via Control Variates", ICLR 2023,
       arXiv 2302.04542.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import adaptive_eva, softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 36, 4))
    >>> adaptive_eva(q, k, v, num_exact=4, group_size=6).shape
    (2, 36, 4)
    >>> np.allclose(adaptive_eva(q, k, v, num_exact=36), softmax_attention(q, k, v))
    True
    """
    refuse_causal("adaptive_eva", is_causal)
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, also=[(groups, 1)], **masks)
    choice = adaptive_choice(x, groups, group_size, num_exact, block_size)
    if 0 in x.lead:
        # Without heads there is nothing to choose from, and indices into all heads would divide by zero.
        shape = (*x.lead, x.q.shape[-2], x.v.shape[-1])
        return x.finish(x.xp.zeros(shape, dtype=x.q.dtype, device=x.device))

    def of_tokens(q: Array, k: Array, v: Array, mask: Array, query_mask: Array, labels: Array) -> Array:
        # A lazy library gives chunks, which are arrays of another one.
        part = replace(x, q=q, k=k, v=v, key_mask=mask, query_mask=query_mask, xp=namespace(q))
        return _estimate(part, choice, labels)

    # A group may hold any keys, and a block any queries: chunks and shards of tokens are gathered first.
    labels = None if choice.groups is None or isinstance(choice.groups, Blocks) else choice.groups
    given = ((x.q, 2), (x.k, 2), (x.v, 2), (x.key_mask, 1), (x.query_mask, 1), (labels, 1))
    return x.finish(backend_of(x.q).with_whole_tokens(of_tokens, x.v.shape[-1], *given))


def _estimate(x: Inputs, choice: Choice, labels: Array | None) -> Array:
    """Return the results (..., N, E)."""
    xp, own, lead = x.xp, backend_of(x.q), x.lead
    q, k, v = (_one_lead(y, lead) for y in (x.root * x.q, x.root * x.k, x.v))
    is_key, is_query, labels = (
        None if y is None else _one_lead(y[..., None], lead)[..., 0]
        for y in (x.key_mask, x.query_mask, labels)
    )
    (heads, n, features), values = q.shape, v.shape[-1]
    mu = _mean(q, is_query)
    # Coordinates of the tokens about their means. They only choose, and a choice has no gradient.
    of_q, of_k = sketch(
        hide(own.constant(q - mu[:, None, :]), is_query),
        hide(own.constant(k - _mean(k, is_key)[:, None, :]), is_key),
        rank_of(features),
    )
    groups = group_keys(choice, Tokens(mu, k, v, is_key, of_q, of_k), labels)

    # Blocks of queries near each other. Numbers from N on fill the blocks up: they would be out of range, so
    # that they read query 0, and their rows are dropped at the end.
    metric = covariance(of_k[:, :: stride_of(of_k.shape[1]), :])
    index = halves(of_q, metric, is_query, depth_of(choice.num_blocks, n))
    count, size = index.shape[1:]
    # Sorted slots are sorted by group, as the sums by group need, and have duplicates side by side.
    slots = own.in_order(chosen(choice, compared(groups), index, of_q, is_query))
    of_blocks = xp.reshape(rows(q, xp.where(index < n, index, 0)), (heads, count, size * features))
    out = own.by_rows(
        lambda q, slots: _attended(q, slots, groups, mu, size),
        max(1, block_sizes.CHOICE_NUMBERS // hint(heads * slots.shape[-1] * (features + values))),
        (of_blocks, -2),
        (slots, -2),
    )
    # The order of a permutation is its inverse: it brings the rows of blocks back to their queries.
    place = own.order_of(xp.reshape(index, (index.shape[0], count * size)))[:, :n]
    columns = out.shape[-1] // size
    out = rows(xp.reshape(out, (heads, count * size, columns)), place)
    return xp.reshape(out, (*lead, n, columns))


def _attended(q: Array, slots: Array, groups: Groups, mu: Array, size: int) -> Array:
    """Attend from blocks of queries (L, B, size * D) with their exact keys (L, B, T): (L, B, size * E)."""
    xp, (heads, count, _) = namespace(q), q.shape
    q = xp.reshape(q, (heads, count, size, mu.shape[-1]))
    # Where a block may choose more keys than there are, padding is among them.
    is_exact = entries(groups.is_key, slots)
    d, places = mu.shape[-1], groups.is_key.shape[1]
    number = groups.tokens.shape[1] - places
    of_groups = xp.arange(number, dtype=slots.dtype, device=placement(q)) + places
    of_groups = xp.broadcast_to(of_groups, (heads, count, number))
    # Equation: attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log Z_c - mu.kt_c]). One gather takes the exact
    # keys and the groups; beta of each block then replaces that of the whole group.
    tokens = rows(groups.tokens, xp.concat([slots, of_groups], axis=-1))
    beta, bias = _rest(groups, mu, slots, is_exact)
    tokens = backend_of(tokens).with_last(tokens, beta)
    keys = Keys(tokens[..., :d], tokens[..., d:], xp.concat([log_mask(is_exact, tokens), bias], axis=-1))
    out = final_average(q, keys)
    return xp.reshape(out, (heads, count, size * out.shape[-1]))


def _rest(groups: Groups, mu: Array, slots: Array, is_exact: Array) -> tuple[Array, Array]:
    """Return values (L, B, C, E) and biases (L, B, C) of the groups without the exact keys (L, B, T)."""
    xp, own = namespace(slots), backend_of(groups.weighed)
    # A duplicate, an empty slot and padding read the row of zeros: they take nothing from a group.
    index = xp.where(is_exact, slots, groups.weighed.shape[1] - 1)
    taken = own.sums_by_group(groups.weighed, index, entries(groups.group, slots), groups.log_z.shape[-1])
    left = 1 - taken[..., -1:]
    # Shares sum to one up to rounding: a share of 64 eps or less that is left is an empty group.
    is_left = left > 64 * xp.finfo(taken.dtype).eps
    left = xp.where(is_left, left, 1.0)
    # Equation: beta_c = (beta_c - sum of p_m v_m over exact keys) / (1 - sum of p_m over exact keys).
    beta = (groups.beta[:, None, ...] - taken[..., :-1]) / left
    # A small divisor enlarges rounding: the average is clipped to the range of the values. The correction is
    # a constant, so that gradients pass as through the average itself.
    beta = beta + own.constant(xp.minimum(xp.maximum(beta, groups.lowest), groups.highest) - beta)
    # Equation: log Z_c(mu) - mu.kt_c, and the logarithm of the share that is left.
    bias = (groups.log_z - xp.matmul(groups.kt, mu[..., None])[..., 0])[:, None, :] + xp.log(left[..., 0])
    return beta, xp.where(is_left[..., 0], bias, -math.inf)


def _one_lead(x: Array, lead: tuple[int, ...]) -> Array:
    """Flatten the leading axes to one: (..., N, X) -> (L, N, X)."""
    xp, shape = namespace(x), tuple(x.shape[-2:])
    return xp.reshape(xp.broadcast_to(x, (*lead, *shape)), (math.prod(lead), *shape))


def _mean(x: Array, mask: Array | None) -> Array:
    """Return the mean of the tokens under the mask, (L, N, D) -> (L, D); zero where there is none."""
    if mask is None:
        return namespace(x).mean(x, axis=1)
    return average_of_all(log_mask(mask, x), hide(x, mask)).out
