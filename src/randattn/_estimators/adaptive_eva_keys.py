"""Choose the keys that a block of queries computes exactly: the keys whose weight in their group errs most.

The score of key m is the error of its weight times the distance of its value from the mean value:

    | exp(b.k_m) cosh(s |k_m|) - p_m exp(log Z_c(mu) + (b - mu).kt_c) |  |v_m - mean(v)|

Here b is the mean of the block's queries and s their deviation: the queries are taken as two halves, at b
plus s and b minus s along the key. Products are those of the coordinates that `_tokens.tree.sketch` finds.
Successive blocks, which are near each other, make one shortlist of keys first, and each chooses from it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core import block_sizes
from randattn._core.average import average_of_all, finite
from randattn._core.indexing import entries, rows
from randattn._core.inputs import log_mask
from randattn._core.library import hint, namespace, placement

from .options import FAMILY, shortlist_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .options import Choice

    Array = Any


class Compared(NamedTuple):
    """The numbers by which keys and groups are compared.

    Attributes
    ----------
    keys : array, shape (L, S, r + 4)
        Coordinates, ``mu.k_m``, ``p_m``, the length of the coordinates, and ``|v_m - mean(v)|``.
    group : array of int, shape (L, S)
        Group of each slot.
    of_groups : array, shape (L, C, r)
        Coordinates of ``kt``.
    log_z : array, shape (L, C)
        ``log Z_c(mu)``.
    """

    keys: Array
    group: Array
    of_groups: Array
    log_z: Array


class _Moments(NamedTuple):
    """Moments of sets of queries: log sizes (...), means (..., r), and variances of a coordinate (..., 1)."""

    log_count: Array
    centre: Array
    variance: Array

    def together(self) -> _Moments:
        """Return the moments of the union of the sets along the axis before that of coordinates."""
        # Equation: variance of a union = mean of the variances + variance of the means.
        centre, log_count = average_of_all(self.log_count, self.centre)
        aside = (self.centre - centre[..., None, :]) ** 2
        variance = self.variance + namespace(centre).mean(aside, axis=-1, keepdims=True)
        return _Moments(log_count, centre, average_of_all(self.log_count, variance).out)


def chosen(choice: Choice, compared: Compared, index: Array, of_q: Array, is_query: Array | None) -> Array:
    """Return the slots (L, B, T) of the keys that each block of queries computes exactly."""
    xp, own, heads, blocks = namespace(of_q), backend_of(of_q), of_q.shape[0], index.shape[1]
    keys, group, of_groups, log_z = compared
    listed = shortlist_of(choice.num_exact, keys.shape[1], index.shape[1])
    has_lists = listed < keys.shape[1]
    if has_lists:
        index = _joined(index, FAMILY, of_q.shape[1])
        index = xp.reshape(index, (index.shape[0], -1, index.shape[2] // FAMILY))
    of_blocks = _of_blocks(index, of_q, is_query)

    def of_each(moments: _Moments) -> tuple[Array, ...]:
        # A block of padding alone has no deviation: that of all queries stands in.
        is_empty = moments.log_count[..., None] == -math.inf
        spread = xp.sqrt(
            xp.where(is_empty, xp.mean(of_q * of_q, axis=(1, 2))[:, None, None], moments.variance)
        )
        to_groups = xp.matmul(moments.centre, xp.matrix_transpose(of_groups)) + log_z[:, None, :]
        return moments.centre, spread, to_groups

    def among_all(moments: _Moments, count: int) -> Array:
        # Scores are numbers for each block and slot: a few blocks at a time keep them in the cache.
        return own.by_rows(
            lambda *blocks: _most_missed(blocks, keys, group, count),
            max(1, block_sizes.CHOICE_NUMBERS // hint(heads * keys.shape[1])),
            *((x, -2) for x in of_each(moments)),
        )

    if not has_lists:
        found = among_all(of_blocks, choice.num_exact)
    else:
        # A family of successive blocks scores all slots once; each of its blocks then scores the shortlist.
        families = index.shape[1] // FAMILY
        parts = (xp.reshape(x, (heads, families, FAMILY, *x.shape[2:])) for x in of_blocks)
        lists = among_all(_Moments(*parts).together(), listed)

        def among_listed(*of_families: Array) -> Array:
            *blocks, lists = of_families
            nodes = heads * lists.shape[1]
            near = xp.reshape(rows(keys, lists), (nodes, listed, keys.shape[2]))
            blocks = [xp.reshape(x, (nodes, FAMILY, x.shape[2] // FAMILY)) for x in blocks]
            of_near = xp.reshape(entries(group, lists), (nodes, listed))
            found = _most_missed(blocks, near, of_near, choice.num_exact)
            found = entries(xp.reshape(lists, (nodes, listed)), found)
            return xp.reshape(found, (heads, lists.shape[1], FAMILY * choice.num_exact))

        found = own.by_rows(
            among_listed,
            max(1, block_sizes.CHOICE_NUMBERS // hint(heads * listed * (keys.shape[2] + FAMILY))),
            *((xp.reshape(x, (heads, families, FAMILY * x.shape[2])), -2) for x in of_each(of_blocks)),
            (lists, -2),
        )
        found = xp.reshape(found, (heads, families * FAMILY, choice.num_exact))
    return found[:, :blocks, :]


def _joined(index: Array, run: int, n: int) -> Array:
    """Join each `run` of successive blocks of queries (L or 1, B, s) to one: (L or 1, B / run, run s)."""
    xp, (heads, blocks, size) = namespace(index), index.shape
    fill = xp.full((heads, -blocks % run, size), n, dtype=index.dtype, device=placement(index))
    return xp.reshape(xp.concat([index, fill], axis=1), (heads, -(-blocks // run), run * size))


def _of_blocks(index: Array, of_q: Array, is_query: Array | None) -> _Moments:
    """Return the moments of blocks of queries, of which `index` (L or 1, B, s) has the numbers."""
    xp, (heads, n, _) = namespace(of_q), of_q.shape
    # Numbers from N on fill blocks up: they are out of range, read query 0 and have no weight.
    real = xp.where(index < n, index, 0)
    is_there = xp.broadcast_to(index < n, (heads, *index.shape[1:]))
    if is_query is not None:
        is_there = is_there & entries(is_query, real)
    tokens = rows(of_q, real)
    return _Moments(log_mask(is_there, tokens), tokens, xp.zeros_like(tokens[..., :1])).together()


def _most_missed(of_blocks: Sequence[Array], keys: Array, group: Array, count: int) -> Array:
    """Return the places (L, B, count) of the keys (L, K, r + 4) with the largest scores for each block.

    `of_blocks` has the means of the blocks (L, B, r), their deviations (L, B, 1), and the log weights of the
    groups at the means (L, B, C).
    """
    (centre, spread, to_groups), xp, of_k = of_blocks, namespace(keys), keys[..., :-4]
    along_mu, share, length, weight = (keys[..., None, :, column] for column in (-4, -3, -2, -1))
    # b.k_m up to a term that all keys and groups share: coordinates are those of tokens about their means.
    exact = xp.matmul(centre, xp.matrix_transpose(of_k)) + along_mu
    aside = spread * length
    # Equation: exp(b.k) cosh(s |k|) = (exp(b.k + s |k|) + exp(b.k - s |k|)) / 2, over the largest of all.
    top = finite(xp.max(exact + aside, axis=-1, keepdims=True))
    exactly = (xp.exp(exact + aside - top) + xp.exp(exact - aside - top)) / 2
    # A tangent lies below log Z_c(b): a group weighs no more than its keys, and its exponential is finite.
    by_group = xp.matrix_transpose(rows(xp.matrix_transpose(xp.exp(to_groups - top)), group)) * share
    missed = xp.abs(exactly - by_group) * weight
    # Padding and empty slots have the score -1, below all keys.
    return backend_of(missed).largest(xp.where(along_mu == -math.inf, -1.0, missed), count)
