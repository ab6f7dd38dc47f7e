"""EVA for trained models: any groups of keys, and for each block of queries the keys that groups miss most.

A group is one control variate, the tangent at the mean query mu to the convex ``log Z_c(q)``, Z_c the sum of
``exp(q.k)`` over its keys: with ``p_m = exp(mu.k_m) / Z_c(mu)``,

    exp(q.k_m) ~ p_m exp(log Z_c(mu) + (q - mu).kt_c),   kt_c = sum_m p_m k_m,   beta_c = sum_m p_m v_m,

never too much in sum. A block of queries takes the keys where this is furthest from ``exp(q.k_m)`` exactly,
and of each group what they leave: ``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log Z_c - mu.kt_c]).out``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ._attend import Keys, average, average_of_all, finite
from ._checks import is_array
from ._conclude import conclude
from ._eva_choice import depth_of, rank_of
from ._eva_keys import AT_HAND, Compared, chosen
from ._fused import beside, by_rows, chunked, constant, in_order, order_of, sums_by_group, with_last
from ._inputs import hide, log_mask, placement
from ._plans import Blocks
from ._tracing import check_known, hint, namespace
from ._tree import covariance, entries, halves, rows, sketch, stride_of

if TYPE_CHECKING:
    from ._eva_choice import Choice
    from ._inputs import Inputs

    Array = Any


class _Grouped(NamedTuple):
    """S places for keys, listed by group, some of them empty, and the C groups.

    Attributes
    ----------
    key, group : arrays of int, shape (L, S)
        Which key stands there, in which group; of an empty place M and more.
    is_key : array of bool, shape (L, S)
    tokens : array, shape (L, S + C, D + E)
        Keys and values, and the groups'.
    weighed : array, shape (L, S + 1, E + 1)
        Values and ones times their shares, and zeros.
    sketch : array, shape (L, S, r)
    along_mu, share : arrays, shape (L, S)
        ``mu.k_m`` and ``p_m``.
    log_z : array, shape (L, C)
        ``log Z_c(mu)``.
    lowest, highest : arrays, shape (L, 1, 1, E)
        Of all values.
    kt, beta, kt_sketch, variance : arrays, shapes (L, C, D), (L, C, E), (L, C, r), (L, C, D)
        Averages by the shares; the last one of squares, less the average's.
    """

    key: Array
    group: Array
    is_key: Array
    tokens: Array
    weighed: Array
    sketch: Array
    along_mu: Array
    share: Array
    log_z: Array
    lowest: Array
    highest: Array
    kt: Array
    beta: Array
    kt_sketch: Array
    variance: Array | None


def corrected(x: Inputs, choice: Choice) -> Array:
    """The results (..., N, E)."""
    if 0 in x.lead:
        return x.xp.zeros((*x.lead, x.q.shape[-2], x.v.shape[-1]), dtype=x.q.dtype, device=x.device)
    chunks = chunked(x.q)
    if chunks is None:
        return _corrected(x, choice)
    # Which token is near which is for all of them to tell.
    labels = choice.groups if is_array(choice.groups) else None

    def of_chunks(q: Array, k: Array, v: Array, mask: Array, query_mask: Array, labels: Array) -> Array:
        part = replace(x, q=q, k=k, v=v, key_mask=mask, query_mask=query_mask)
        return _corrected(part, choice if labels is None else choice._replace(groups=labels))

    given = ((x.q, 2), (x.k, 2), (x.v, 2), (x.key_mask, 1), (x.query_mask, 1), (labels, 1))
    return chunks.with_whole_tokens(of_chunks, x.v.shape[-1], *given)


def _corrected(x: Inputs, choice: Choice) -> Array:
    xp, lead = x.xp, x.lead
    q, k, v = (_one_lead(y, lead) for y in (x.root * x.q, x.root * x.k, x.v))
    is_key, is_query = (
        None if y is None else _one_lead(y[..., None], lead)[..., 0] for y in (x.key_mask, x.query_mask)
    )
    (lanes, n, features), values = q.shape, v.shape[-1]
    check_known("q", "blocks of queries that are laid by their number", n)
    mu = _mean(q, is_query)
    near_mu = hide(constant(q - mu[:, None, :]), is_query)
    of_q, of_k = sketch(
        near_mu,
        hide(constant(k - _mean(k, is_key)[:, None, :]), is_key),
        rank_of(features),
    )
    grouped = _group(choice, lead, mu, k, v, is_key, of_q, of_k)

    # Of n and more, which fill blocks up, the first query stands in.
    if choice.windows is None:
        index = halves(
            of_q,
            covariance(of_k[:, :: stride_of(of_k.shape[1]), :]),
            is_query,
            depth_of(choice.num_blocks, n),
        )
    else:
        at = choice.windows
        index = _filled_up(at, n, q)[None, ...]
    count, size = index.shape[1:]
    exact = []
    if choice.num_keys:
        exact.append(chosen(choice, _compared(grouped), index, of_q, is_query))
    if choice.windows is not None:
        place = order_of(grouped.key)[:, :n]
        exact.append(entries(place, xp.where(index < n, index, index[..., :1])))
    slots = in_order(exact[0] if len(exact) == 1 else xp.concat(exact, axis=-1))

    of_blocks = xp.reshape(rows(q, xp.where(index < n, index, 0)), (lanes, count, size * features))
    out = by_rows(
        lambda q, slots: _attended(q, slots, grouped, mu, size, second_order=choice.second_order),
        max(1, AT_HAND // hint(lanes * slots.shape[-1] * (features + values))),
        (of_blocks, -2),
        (slots, -2),
    )
    place = order_of(xp.reshape(index, (index.shape[0], count * size)))[:, :n]
    columns = out.shape[-1] // size
    out = rows(xp.reshape(out, (lanes, count * size, columns)), place)
    return xp.reshape(out, (*lead, n, columns))


def _group(
    choice: Choice,
    lead: tuple[int, ...],
    mu: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    of_q: Array,
    of_k: Array,
) -> _Grouped:
    xp, (lanes, m, _) = namespace(k), k.shape
    device, groups, count = placement(k), choice.groups, choice.num_groups
    by_label = groups is not None and not isinstance(groups, Blocks)
    if by_label:
        labels = _one_lead(groups[..., None], lead)[..., 0]
        key = xp.argsort(labels, axis=-1)
        group = entries(labels, key)
    else:
        if groups is None:
            index = halves(
                of_k, covariance(of_q[:, :: stride_of(of_q.shape[1]), :]), mask, depth_of(count, m)
            )
        else:
            index = _filled_up(groups, m, k)[None, ...]
            index = xp.broadcast_to(index, (lanes, *index.shape[1:]))
        count, size = index.shape[1:]
        key = xp.reshape(index, (lanes, count * size))
        group = xp.broadcast_to(xp.arange(count * size, device=device)[None, :] // size, key.shape)
    is_key, real = key < m, xp.where(key < m, key, 0)
    if mask is not None:
        is_key = is_key & entries(mask, real)
    d, e, r = k.shape[-1], v.shape[-1], of_k.shape[-1]
    tokens = rows(xp.concat([k, v, xp.ones_like(k[..., :1]), of_k], axis=-1), real)
    k = tokens[..., :d]
    along_mu = xp.where(is_key, xp.matmul(k, mu[..., None])[..., 0], -math.inf)
    averaged = xp.concat([tokens, k * k], axis=-1) if choice.second_order else tokens
    if by_label:
        number = xp.arange(count, dtype=group.dtype, device=device)[None, :, None]
        group_of = group[:, None, :]
        means, log_z = average(xp.where(group_of == number, along_mu[:, None, :], -math.inf), averaged)
    else:
        shape = (lanes, count, size)
        means, log_z = average_of_all(
            xp.reshape(along_mu, shape), xp.reshape(averaged, (*shape, averaged.shape[-1]))
        )
    kt, beta = means[..., :d], means[..., d : d + e]
    v = tokens[..., None, :, d : d + e]
    share = xp.exp(along_mu - entries(finite(log_z), group))
    none = xp.zeros((lanes, 1, e + 1), dtype=k.dtype, device=device)
    return _Grouped(
        key=key,
        group=group,
        is_key=is_key,
        tokens=xp.concat([tokens[..., : d + e], means[..., : d + e]], axis=1),
        weighed=xp.concat([share[..., None] * tokens[..., d : d + e + 1], none], axis=1),
        sketch=tokens[..., d + e + 1 :],
        along_mu=along_mu,
        share=share,
        log_z=log_z,
        lowest=constant(xp.min(v, axis=-2, keepdims=True)),
        highest=constant(xp.max(v, axis=-2, keepdims=True)),
        kt=kt,
        beta=beta,
        kt_sketch=means[..., d + e + 1 : d + e + 1 + r],
        variance=means[..., d + e + 1 + r :] - kt * kt if choice.second_order else None,
    )


def _filled_up(at: Blocks, n: int, like: Array) -> Array:
    """Return the tokens (B, L) of blocks, numbers from n on where a block is filled up."""
    index = beside(at.index, like)
    return index if at.valid is None else namespace(like).where(beside(at.valid, like), index, index + n)


def _compared(grouped: _Grouped) -> Compared:
    """What keys are chosen by, without gradients."""
    xp, values = namespace(grouped.sketch), grouped.beta.shape[-1]
    of_k, of_groups, along_mu, share, log_z, v = (
        constant(y)
        for y in (
            grouped.sketch,
            grouped.kt_sketch,
            grouped.along_mu,
            grouped.share,
            grouped.log_z,
            grouped.tokens[:, : grouped.is_key.shape[1], -values:],
        )
    )
    v = v - average_of_all(log_mask(grouped.is_key, v), v).out[:, None, :]
    lengths = (xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True)) for x in (of_k, v))
    keys = xp.concat([of_k, along_mu[..., None], share[..., None], *lengths], axis=-1)
    return Compared(keys, grouped.group, of_groups, log_z)


def _attended(
    q: Array, slots: Array, grouped: _Grouped, mu: Array, size: int, *, second_order: bool
) -> Array:
    """Of some blocks of queries (L, B, size * D), with their exact keys (L, B, T): (L, B, size * E)."""
    xp, (lanes, count, _) = namespace(q), q.shape
    q = xp.reshape(q, (lanes, count, size, mu.shape[-1]))
    # A place that stands there twice is there once.
    first = xp.ones_like(slots[..., :1], dtype=xp.bool)
    is_exact = xp.concat([first, slots[..., 1:] != slots[..., :-1]], axis=-1) & entries(grouped.is_key, slots)
    d, groups = mu.shape[-1], grouped.tokens.shape[1] - grouped.is_key.shape[1]
    of_groups = xp.arange(groups, dtype=slots.dtype, device=placement(q)) + grouped.is_key.shape[1]
    of_groups = xp.broadcast_to(of_groups, (lanes, count, groups))
    tokens = rows(grouped.tokens, xp.concat([slots, of_groups], axis=-1))
    beta, bias = _rest(grouped, mu, slots, is_exact)
    tokens = with_last(tokens, beta)
    keys = Keys(tokens[..., :d], tokens[..., d:], xp.concat([log_mask(is_exact, tokens), bias], axis=-1))
    if not second_order:
        out = conclude(q, keys)
    else:
        near, far = keys.of(slice(None, -groups)), keys.of(slice(-groups, None))
        curved = xp.matmul(
            (q - mu[:, None, None, :]) ** 2, xp.matrix_transpose(grouped.variance)[:, None, ...] / 2
        )
        out = conclude(q, near, far, pair_bias=curved)
    return xp.reshape(out, (lanes, count, size * out.shape[-1]))


def _rest(grouped: _Grouped, mu: Array, slots: Array, is_exact: Array) -> tuple[Array, Array]:
    """What exact keys (L, B, T), in order, leave of the groups: values (L, B, C, E), biases (L, B, C)."""
    xp = namespace(slots)
    index = xp.where(is_exact, slots, grouped.weighed.shape[1] - 1)
    taken = sums_by_group(grouped.weighed, index, entries(grouped.group, slots), grouped.log_z.shape[-1])
    left = 1 - taken[..., -1:]
    # As much as sums of shares are rounded by is nothing.
    is_left = left > 64 * xp.finfo(taken.dtype).eps
    left = xp.where(is_left, left, 1.0)
    beta = (grouped.beta[:, None, ...] - taken[..., :-1]) / left
    # Rounding must not take the average of what is left out of the values' range.
    beta = beta + constant(xp.minimum(xp.maximum(beta, grouped.lowest), grouped.highest) - beta)
    bias = (grouped.log_z - xp.matmul(grouped.kt, mu[..., None])[..., 0])[:, None, :] + xp.log(left[..., 0])
    return beta, xp.where(is_left[..., 0], bias, -math.inf)


def _one_lead(x: Array, lead: tuple[int, ...]) -> Array:
    """(..., N, X) -> (L, N, X)."""
    xp, shape = namespace(x), tuple(x.shape[-2:])
    return xp.reshape(xp.broadcast_to(x, (*lead, *shape)), (math.prod(lead), *shape))


def _mean(x: Array, mask: Array | None) -> Array:
    """(L, N, D) -> (L, D); zero of nothing."""
    if mask is None:
        return namespace(x).mean(x, axis=1)
    return average_of_all(log_mask(mask, x), hide(x, mask)).out
