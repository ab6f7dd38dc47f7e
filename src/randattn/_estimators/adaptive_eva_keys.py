"""Choose the keys that blocks of queries compute exactly, and average over them and the groups of the others.

The score of a key for a block is the largest share of the weight that it has for a chooser (the mean of a run
of queries), times the distance of its value from the mean value, in logarithms:

    max over choosers c of (c.k_m - max_j c.k_j) + log |v_m - mean(v)|
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core.average import Average, Keys, finite
from randattn._core.indexing import rows
from randattn._core.inputs import with_rank
from randattn._core.library import namespace, placement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Array = Any


class Index(NamedTuple):
    """The keys of all heads and the sums of their groups, which are the same for all queries.

    B counts the leading axes but heads, H the heads of keys; M' is M, filled up to whole groups.

    Attributes
    ----------
    k : array, shape (B H, M, D)
        Keys, without gradients, to choose from.
    weight : array, shape (B, H, M)
        ``log |v - mean(v)|`` in nats, without gradients; -inf for padding.
    tokens : array, shape (B, H M', D + E + 1)
        Keys, values and a one; zeros for padding.
    sums : array, shape (B, H, C, D + E + 1)
        Sums of the tokens of each group.
    group_size : int
        Consecutive keys of a group.
    is_masked : bool
        Whether there is padding.
    """

    k: Array
    weight: Array
    tokens: Array
    sums: Array
    group_size: int
    is_masked: bool


class Heads(NamedTuple):
    """The heads of queries that an average is over: A of G H heads.

    Attributes
    ----------
    of_queries, of_keys : arrays of int, shape (B or 1, A)
        Their numbers, and the numbers of the heads of their keys.
    is_all : bool
        Whether these are all heads, in order.
    """

    of_queries: Array
    of_keys: Array
    is_all: bool

    def take(self, x: Array) -> Array:
        """Return the entries of these heads of an array of queries (B, H G, ...): (B, A, ...)."""
        return x if self.is_all else _of_heads(x, self.of_queries)

    def take_keys(self, x: Array) -> Array:
        """Return the entries of the heads of their keys (B, H, ...): (B, A, ...)."""
        return x if self.is_all and self.of_keys.shape[-1] == x.shape[1] else _of_heads(x, self.of_keys)


def _of_heads(x: Array, index: Array) -> Array:
    xp, (batch, heads, *rest) = namespace(x), x.shape
    found = rows(xp.reshape(x, (batch, heads, math.prod(rest))), index)
    return xp.reshape(found, (batch, index.shape[-1], *rest))


def index_keys(k: Array, v: Array, mask: Array | None, group_size: int, known: int) -> Index:
    """Index the keys (B, H, M, D), once for all queries.

    The mean value is that of the first `known` keys, which no query of a causal call is before.
    """
    xp, own, (batch, heads, m, _) = namespace(k), backend_of(k), k.shape
    ones = xp.ones((batch, heads, m, 1), dtype=k.dtype, device=placement(k))
    if mask is not None:
        ones = xp.astype(mask, k.dtype)[..., None]
    tokens = xp.concat([k, v, ones], axis=-1)
    if m % group_size:
        fill = xp.zeros_like(tokens[..., : group_size - m % group_size, :])
        tokens = xp.concat([tokens, fill], axis=-2)
    size, width = tokens.shape[-2:]
    sums = xp.sum(xp.reshape(tokens, (batch, heads, size // group_size, group_size, width)), axis=-2)
    v, count = own.constant(v), xp.sum(ones[:, :, :known, :], axis=-2, keepdims=True)
    aside = v - xp.sum(v[:, :, :known, :], axis=-2, keepdims=True) / xp.where(count == 0, 1.0, count)
    # The smallest normal number is for a value at the mean: its key comes after all others, before padding.
    tiny = xp.finfo(v.dtype).smallest_normal
    weight = xp.log(xp.sqrt(xp.sum(aside * aside, axis=-1)) + tiny)
    if mask is not None:
        weight = xp.where(mask, weight, -math.inf)
    flat = xp.reshape(own.constant(k), (batch * heads, m, k.shape[-1]))
    tokens = xp.reshape(tokens, (batch, heads * size, width))
    return Index(flat, weight, tokens, sums, group_size, mask is not None)


def choosers(q: Array, count: int) -> Array:
    """Return means of `count` runs of the queries (..., n, D): (..., count D), without gradients."""
    xp, (*lead, n, d) = namespace(q), q.shape
    q = backend_of(q).constant(q)
    return xp.reshape(xp.mean(xp.reshape(q, (*lead, count, n // count, d)), axis=-2), (*lead, count * d))


class Choice(NamedTuple):
    """The keys before blocks of queries that may be chosen, and by whom.

    Attributes
    ----------
    keys, num_exact, recent : int
        Number of keys to choose from, of exact keys, and of the last keys, which are exact.
    choosers : array, shape (B, H G, b, c D)
        The choosers of each block.
    start : array of int, shape (b,), or None
        Number of keys before each block, which attends to none beyond; None for all of them.
    """

    keys: int
    num_exact: int
    recent: int
    choosers: Array
    start: Array | None


def attend_adaptively(
    x: Index,
    heads: Heads,
    q: Array,
    choice: Choice,
    own_tokens: Sequence[Array],
    average: Callable[..., Average],
) -> Average:
    """Average the keys before blocks of queries (B, A, b, n, D), and the blocks' own tokens: (B, A, b, n, E).

    `own_tokens` has keys, values and perhaps a bias of each block (B, A, b, n, .): a query sees those up to
    itself. `average` is `attend`, or has more columns of values.
    """
    xp, own, (batch, count, blocks, n, d) = namespace(q), backend_of(q), q.shape
    keys, recent, start = choice.keys, choice.recent, choice.start
    size, values = x.group_size, x.tokens.shape[-1] - d - 1
    # Keys after the last whole group are recent, so that a causal block does not need a part of a group.
    groups = keys // size if recent else -(-keys // size)
    slots = _chosen(x, heads, choice)
    number = xp.astype(heads.of_keys, slots.dtype)[..., None, None] * (x.tokens.shape[1] // x.weight.shape[1])
    in_table = xp.reshape(slots + number, (batch, count * blocks, slots.shape[-1]))
    tokens = rows(x.tokens, in_table)
    # Equation: a group keeps its sums less those of its exact keys.
    of_group = xp.reshape(slots // size, in_table.shape)
    taken = own.sums_by_group(x.tokens, in_table, of_group, groups + 1)[:, :, :groups, :]
    left = heads.take_keys(x.sums[:, :, :groups, :])[:, :, None, ...] - xp.reshape(
        taken, (batch, count, blocks, groups, x.tokens.shape[-1])
    )
    # Sums of ones are exact integers, so that a group without keys is known by less than a half.
    sizes = own.constant(left[..., -1])
    is_left, is_exact = sizes > 0.5, xp.reshape(tokens[..., -1] > 0.5, slots.shape)
    if start is not None:
        number = xp.arange(groups, dtype=slots.dtype, device=placement(q))[None, :]
        is_left = is_left & with_rank(number < start[:, None] // size, 4)
        is_exact = is_exact & (slots < with_rank(start[:, None], 4))
    sizes = xp.where(is_left, sizes, 1.0)
    # Equation: attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log size_c]).
    bias = xp.concat([_log(is_exact, xp.ones_like(slots, dtype=q.dtype)), _log(is_left, sizes)], axis=-1)
    means = xp.reshape(left / sizes[..., None], (batch, count * blocks, groups, x.tokens.shape[-1]))
    tokens = xp.concat([tokens, means], axis=-2)
    bias = xp.reshape(bias, tokens.shape[:-1])
    sets = [Keys(tokens[..., :d], tokens[..., d : d + values], bias)]
    if own_tokens:
        k, v, *rest = (xp.reshape(y, (batch, count * blocks, n, y.shape[-1])) for y in own_tokens)
        sets.append(Keys(k, v, rest[0][..., 0] if rest else None, is_causal=True))
    out, log_norm = average(xp.reshape(q, (batch, count * blocks, n, d)), *sets)
    shape = (batch, count, blocks, n)
    return Average(xp.reshape(out, (*shape, out.shape[-1])), xp.reshape(log_norm, shape))


def _log(keep: Array, sizes: Array) -> Array:
    return namespace(sizes).where(keep, namespace(sizes).log(sizes), -math.inf)


def _chosen(x: Index, heads: Heads, choice: Choice) -> Array:
    """Return the keys (B, A, b, num_exact) that each block computes exactly, in ascending order."""
    keys, num_exact, recent, choosing, start = choice
    xp, own = namespace(choosing), backend_of(choosing)
    (batch, all_heads, blocks, width), d = choosing.shape, x.k.shape[-1]
    of_heads = xp.reshape(choosing, (x.k.shape[0], -1, d))
    logits = xp.matmul(of_heads, xp.matrix_transpose(x.k[:, :keys, :]))
    logits = xp.reshape(logits, (batch, x.weight.shape[1], -1, blocks, width // d, keys))
    weight = x.weight[:, :, None, None, :keys]
    number = xp.arange(keys, device=placement(choosing))[None, :]
    if start is not None:
        # Hidden before the maximum too: a key to come would change the choice.
        weight = xp.where(with_rank(number < start[:, None], 5), weight, -math.inf)
    if x.is_masked or start is not None:
        logits = xp.where((weight == -math.inf)[..., None, :], -math.inf, logits)
    share = logits - finite(xp.max(logits, axis=-1, keepdims=True))
    score = xp.max(share, axis=-2) + weight
    if recent:
        end = start[:, None] if start is not None else keys
        is_recent = with_rank((number >= end - recent) & (number < end), 5)
        score = xp.where(is_recent & (weight > -math.inf), xp.finfo(score.dtype).max, score)
    score = heads.take(xp.reshape(score, (batch, all_heads, blocks, keys)))
    found = own.largest(own.constant(score), min(num_exact, keys))
    return own.in_order(found)
