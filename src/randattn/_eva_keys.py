"""Which keys a block of queries has exactly: those that its groups miss most.

How far a key's weight is from what its group gives it, at queries half of which lie on either side of the
block's mean c by its deviation s, times how far its value is from the mean value:

    | exp(c.k_m) cosh(s |k_m|) - p_m exp(log Z_c(mu) + (c - mu).kt_c) |  |v_m - mean(v)|,

all in the few coordinates that `_tree.sketch` finds. What several blocks near each other miss most is a list,
from which each of them chooses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ._attend import average_of_all, finite
from ._eva_choice import FAMILY, list_of
from ._fused import by_rows, largest
from ._inputs import log_mask, placement
from ._tracing import hint, namespace
from ._tree import entries, rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._eva_choice import Choice

    Array = Any

# Numbers that are at hand at a time: of scores, of gathered keys and values.
AT_HAND = 1 << 21


class Compared(NamedTuple):
    """Keys and groups, as far as they are compared.

    Attributes
    ----------
    keys : array, shape (L, S, r + 4)
        Coordinates, ``mu.k_m``, ``p_m``, and two lengths: of the coordinates, of the value about their mean.
    group : array of int, shape (L, S)
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
    """Of sets of queries: their sizes, means (..., r), and variances in any direction (..., 1)."""

    log_count: Array
    centre: Array
    variance: Array

    def together(self) -> _Moments:
        """Of all along the last axis but that of coordinates."""
        centre, log_count = average_of_all(self.log_count, self.centre)
        aside = (self.centre - centre[..., None, :]) ** 2
        variance = self.variance + namespace(centre).mean(aside, axis=-1, keepdims=True)
        return _Moments(log_count, centre, average_of_all(self.log_count, variance).out)


def chosen(choice: Choice, compared: Compared, index: Array, of_q: Array, is_query: Array | None) -> Array:
    """Places (L, B, T) of the keys that each block's queries weigh most otherwise than their groups do."""
    xp, lanes, blocks, run = namespace(of_q), of_q.shape[0], index.shape[1], 1
    if choice.windows is not None:
        # Windows that follow each other choose together.
        run = -(-blocks // choice.num_blocks)
        index = _joined(index, run, of_q.shape[1])
    keys, group, of_groups, log_z = compared
    listed = list_of(choice.num_keys, keys.shape[1], index.shape[1])
    has_lists = listed < keys.shape[1]
    if has_lists:
        index = _joined(index, FAMILY, of_q.shape[1])
        index = xp.reshape(index, (index.shape[0], -1, index.shape[2] // FAMILY))
    of_blocks = _of_blocks(index, of_q, is_query)

    def of_each(moments: _Moments) -> tuple[Array, ...]:
        # Of a block of padding alone, any query's.
        is_empty = moments.log_count[..., None] == -math.inf
        spread = xp.sqrt(
            xp.where(is_empty, xp.mean(of_q * of_q, axis=(1, 2))[:, None, None], moments.variance)
        )
        to_groups = xp.matmul(moments.centre, xp.matrix_transpose(of_groups)) + log_z[:, None, :]
        return moments.centre, spread, to_groups

    def among_all(moments: _Moments, count: int) -> Array:
        return by_rows(
            lambda *blocks: _most_missed(blocks, keys, group, count),
            max(1, AT_HAND // hint(lanes * keys.shape[1])),
            *((x, -2) for x in of_each(moments)),
        )

    if not has_lists:
        found = among_all(of_blocks, choice.num_keys)
    else:
        # Blocks that are next to each other choose from one list.
        families = index.shape[1] // FAMILY
        parts = (xp.reshape(x, (lanes, families, FAMILY, *x.shape[2:])) for x in of_blocks)
        lists = among_all(_Moments(*parts).together(), listed)

        def among_listed(*of_families: Array) -> Array:
            *blocks, lists = of_families
            nodes = lanes * lists.shape[1]
            near = xp.reshape(rows(keys, lists), (nodes, listed, keys.shape[2]))
            blocks = [xp.reshape(x, (nodes, FAMILY, x.shape[2] // FAMILY)) for x in blocks]
            of_near = xp.reshape(entries(group, lists), (nodes, listed))
            found = _most_missed(blocks, near, of_near, choice.num_keys)
            found = entries(xp.reshape(lists, (nodes, listed)), found)
            return xp.reshape(found, (lanes, lists.shape[1], FAMILY * choice.num_keys))

        found = by_rows(
            among_listed,
            max(1, AT_HAND // hint(lanes * listed * (keys.shape[2] + FAMILY))),
            *((xp.reshape(x, (lanes, families, FAMILY * x.shape[2])), -2) for x in of_each(of_blocks)),
            (lists, -2),
        )
        found = xp.reshape(found, (lanes, families * FAMILY, choice.num_keys))
    if run > 1:
        found = xp.broadcast_to(found[:, :, None, :], (lanes, found.shape[1], run, found.shape[2]))
        found = xp.reshape(found, (lanes, found.shape[1] * run, found.shape[3]))
    return found[:, :blocks, :]


def _joined(index: Array, run: int, n: int) -> Array:
    """So many blocks of queries (L or 1, B, s) that follow each other in one: (L or 1, B / run, run s)."""
    xp, (lanes, blocks, size) = namespace(index), index.shape
    fill = xp.full((lanes, -blocks % run, size), n, dtype=index.dtype, device=placement(index))
    return xp.reshape(xp.concat([index, fill], axis=1), (lanes, -(-blocks // run), run * size))


def _of_blocks(index: Array, of_q: Array, is_query: Array | None) -> _Moments:
    xp, (lanes, n, _) = namespace(of_q), of_q.shape
    real = xp.where(index < n, index, 0)
    is_there = xp.broadcast_to(index < n, (lanes, *index.shape[1:]))
    if is_query is not None:
        is_there = is_there & entries(is_query, real)
    tokens = rows(of_q, real)
    return _Moments(log_mask(is_there, tokens), tokens, xp.zeros_like(tokens[..., :1])).together()


def _most_missed(of_blocks: Sequence[Array], keys: Array, group: Array, count: int) -> Array:
    """So many of the keys (L, K, r + 4) and their groups, for each block of queries (L, B, T).

    Of blocks: their mean (L, B, r), how far they are from it (L, B, 1), what groups weigh there (L, B, C).
    """
    (centre, spread, to_groups), xp, of_k = of_blocks, namespace(keys), keys[..., :-4]
    along_mu, share, length, weight = (keys[..., None, :, column] for column in (-4, -3, -2, -1))
    # q.k less what all keys have; half of a block's queries on this side of its mean, half on the other.
    exact = xp.matmul(centre, xp.matrix_transpose(of_k)) + along_mu
    aside = spread * length
    top = finite(xp.max(exact + aside, axis=-1, keepdims=True))
    exactly = (xp.exp(exact + aside - top) + xp.exp(exact - aside - top)) / 2
    # No more than its keys, so that this is finite.
    by_group = xp.matrix_transpose(rows(xp.matrix_transpose(xp.exp(to_groups - top)), group)) * share
    missed = xp.abs(exactly - by_group) * weight
    return largest(xp.where(along_mu == -math.inf, -1.0, missed), count)
