"""Group the keys of adaptive EVA; the control variate of a group is the tangent at the mean query.

Let mu be the mean query, Z_c(q) the sum of ``exp(q.k)`` over the keys of group c, and p_m the share of key m
in it, ``exp(mu.k_m) / Z_c(mu)``. Then

    exp(q.k_m) ~ p_m exp(log Z_c(mu) + (q - mu).kt_c),   kt_c = sum_m p_m k_m,   beta_c = sum_m p_m v_m.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core.average import average, average_of_all, finite
from randattn._core.indexing import entries, rows
from randattn._core.inputs import log_mask
from randattn._core.library import namespace, placement
from randattn._tokens.grids import Blocks
from randattn._tokens.tree import covariance, halves, stride_of

from .adaptive_eva_keys import Compared
from .options import depth_of

if TYPE_CHECKING:
    from .options import Choice

    Array = Any


class Tokens(NamedTuple):
    """The tokens of all heads, with the leading axes flattened to one, scaled.

    Attributes
    ----------
    mean_query : array, shape (L, D)
        The point mu of the tangents.
    k : array, shape (L, M, D)
        Keys.
    v : array, shape (L, M, E)
        Values.
    key_mask : boolean array, shape (L, M), or None
        False for padding.
    sketch_q, sketch_k : arrays, shapes (L, N, r), (L, M, r)
        Coordinates in which keys are grouped and chosen.
    """

    mean_query: Array
    k: Array
    v: Array
    key_mask: Array | None
    sketch_q: Array
    sketch_k: Array


class Groups(NamedTuple):
    """The C groups, and S slots for their keys, sorted by group; a slot may be empty.

    Attributes
    ----------
    group : array of int, shape (L, S)
        Group of each slot.
    is_key : array of bool, shape (L, S)
        False for an empty slot, and for padding.
    tokens : array, shape (L, S + C, D + E)
        Keys and values of the slots, then ``kt`` and ``beta`` of the groups.
    weighed : array, shape (L, S + 1, E + 1)
        ``p_m`` times value and one of each slot, then a row of zeros.
    sketch : array, shape (L, S, r)
        Coordinates of the keys.
    along_mu, share : arrays, shape (L, S)
        ``mu.k_m`` and ``p_m``.
    log_z : array, shape (L, C)
        ``log Z_c(mu)``.
    lowest, highest : arrays, shape (L, 1, 1, E)
        Range of all values.
    kt, beta, kt_sketch : arrays, shapes (L, C, D), (L, C, E), (L, C, r)
        Averages of keys, values and coordinates by the shares.
    """

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


def group_keys(choice: Choice, x: Tokens, labels: Array | None) -> Groups:
    """Group the keys, by `labels` (L, M) or else as `choice` says, and average each group."""
    k, v, mask, mu = x.k, x.v, x.key_mask, x.mean_query
    xp, own, (heads, m, d) = namespace(k), backend_of(k), k.shape
    count, device = choice.num_groups, placement(k)
    # Slots are sorted by group, so that a group's sums are differences of a running sum.
    if labels is not None:
        key = xp.argsort(labels, axis=-1)
        group = entries(labels, key)
    else:
        index = _laid(choice, x)
        count, size = index.shape[1:]
        key = xp.reshape(index, (heads, count * size))
        group = xp.broadcast_to(xp.arange(count * size, device=device)[None, :] // size, key.shape)
    # An empty slot has a number from M on, which is out of range: it reads key 0, and `is_key` hides it.
    is_key, real = key < m, xp.where(key < m, key, 0)
    if mask is not None:
        is_key = is_key & entries(mask, real)
    e, r = v.shape[-1], x.sketch_k.shape[-1]
    tokens = rows(xp.concat([k, v, xp.ones_like(k[..., :1]), x.sketch_k], axis=-1), real)
    along_mu = xp.where(is_key, xp.matmul(tokens[..., :d], mu[..., None])[..., 0], -math.inf)
    # Equation: [kt_c ; beta_c], log Z_c(mu) = average of [k ; v] with the logits mu.k over the group.
    if labels is not None:
        # Labelled groups differ in size: a row of logits for each, -inf outside, instead of a reshape.
        number = xp.arange(count, dtype=group.dtype, device=device)[None, :, None]
        by_group = xp.where(group[:, None, :] == number, along_mu[:, None, :], -math.inf)
        means, log_z = average(by_group, tokens)
    else:
        shape = (heads, count, size)
        in_groups = xp.reshape(tokens, (*shape, tokens.shape[-1]))
        means, log_z = average_of_all(xp.reshape(along_mu, shape), in_groups)
    v = tokens[..., None, :, d : d + e]
    # Equation: p_m = exp(mu.k_m - log Z_c(mu)). An empty group has log Z = -inf: `finite` keeps NaN out.
    share = xp.exp(along_mu - entries(finite(log_z), group))
    none = xp.zeros((heads, 1, e + 1), dtype=k.dtype, device=device)
    return Groups(
        group=group,
        is_key=is_key,
        tokens=xp.concat([tokens[..., : d + e], means[..., : d + e]], axis=1),
        weighed=xp.concat([share[..., None] * tokens[..., d : d + e + 1], none], axis=1),
        sketch=tokens[..., d + e + 1 :],
        along_mu=along_mu,
        share=share,
        log_z=log_z,
        lowest=own.constant(xp.min(v, axis=-2, keepdims=True)),
        highest=own.constant(xp.max(v, axis=-2, keepdims=True)),
        kt=means[..., :d],
        beta=means[..., d : d + e],
        kt_sketch=means[..., d + e + 1 : d + e + 1 + r],
    )


def _laid(choice: Choice, x: Tokens) -> Array:
    """Return the keys (L, C, s) of groups of one size; numbers from M on fill groups up."""
    xp, (heads, m, _) = namespace(x.k), x.k.shape
    if not isinstance(choice.groups, Blocks):
        # Keys are far apart where logits differ: the covariance of the queries measures their distance.
        of_q = x.sketch_q[:, :: stride_of(x.sketch_q.shape[1]), :]
        return halves(x.sketch_k, covariance(of_q), x.key_mask, depth_of(choice.num_groups, m))
    own, at = backend_of(x.k), choice.groups
    index = own.beside(at.index, x.k)
    if at.valid is not None:
        index = xp.where(own.beside(at.valid, x.k), index, index + m)
    return xp.broadcast_to(index[None, ...], (heads, *index.shape))


def compared(groups: Groups) -> Compared:
    """Return the numbers by which keys are chosen, without gradients."""
    xp, values = namespace(groups.sketch), groups.beta.shape[-1]
    v = groups.tokens[:, : groups.is_key.shape[1], -values:]
    given = (groups.sketch, groups.kt_sketch, groups.along_mu, groups.share, groups.log_z, v)
    of_k, of_groups, along_mu, share, log_z, v = map(backend_of(v).constant, given)
    # Padding is zero, not a value: the mean leaves it out.
    v = v - average_of_all(log_mask(groups.is_key, v), v).out[:, None, :]
    lengths = (xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True)) for x in (of_k, v))
    keys = xp.concat([of_k, along_mu[..., None], share[..., None], *lengths], axis=-1)
    return Compared(keys, groups.group, of_groups, log_z)
