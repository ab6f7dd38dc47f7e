"""Choose the keys that a block of queries computes exactly: the keys that its groups miss most.

How far a key's weight is from what its group gives it, at queries half of which lie on either side of the
block's mean c by its deviation s, times how far its value is from the mean value:

    | exp(c.k_m) cosh(s |k_m|) - p_m exp(log Z_c(mu) + (c - mu).kt_c) |  |v_m - mean(v)|,

all in the few coordinates that `_tree.sketch` finds. The keys that several blocks near each
other miss most are a shortlist, from which each of them chooses.
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
    """Keys and groups, by the numbers that are compared.

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
    """Moments of sets of queries: their sizes, means (..., r), and variances in any direction (..., 1)."""

    log_count: Array
    centre: Array
    variance: Array

    def together(self) -> _Moments:
        """Join the sets along the last axis but that of coordinates."""
        centre, log_count = average_of_all(self.log_count, self.centre)
        aside = (self.centre - centre[..., None, :]) ** 2
        variance = self.variance + namespace(centre).mean(aside, axis=-1, keepdims=True)
        return _Moments(log_count, centre, average_of_all(self.log_count, variance).out)


def chosen(choice: Choice, compared: Compared, index: Array, of_q: Array, is_query: Array | None) -> Array:
    """Return the places (L, B, T) of the keys that each block's queries weigh most unlike their groups do."""
    xp, own, lanes, blocks = namespace(of_q), backend_of(of_q), of_q.shape[0], index.shape[1]
    keys, group, of_groups, log_z = compared
    listed = shortlist_of(choice.num_exact, keys.shape[1], index.shape[1])
    has_lists = listed < keys.shape[1]
    if has_lists:
        index = _joined(index, FAMILY, of_q.shape[1])
        index = xp.reshape(index, (index.shape[0], -1, index.shape[2] // FAMILY))
    of_blocks = _of_blocks(index, of_q, is_query)

    def of_each(moments: _Moments) -> tuple[Array, ...]:
        # A block of padding alone has the deviation of all queries.
        is_empty = moments.log_count[..., None] == -math.inf
        spread = xp.sqrt(
            xp.where(is_empty, xp.mean(of_q * of_q, axis=(1, 2))[:, None, None], moments.variance)
        )
        to_groups = xp.matmul(moments.centre, xp.matrix_transpose(of_groups)) + log_z[:, None, :]
        return moments.centre, spread, to_groups

    def among_all(moments: _Moments, count: int) -> Array:
        return own.by_rows(
            lambda *blocks: _most_missed(blocks, keys, group, count),
            max(1, block_sizes.CHOICE_NUMBERS // hint(lanes * keys.shape[1])),
            *((x, -2) for x in of_each(moments)),
        )

    if not has_lists:
        found = among_all(of_blocks, choice.num_exact)
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
            found = _most_missed(blocks, near, of_near, choice.num_exact)
            found = entries(xp.reshape(lists, (nodes, listed)), found)
            return xp.reshape(found, (lanes, lists.shape[1], FAMILY * choice.num_exact))

        found = own.by_rows(
            among_listed,
            max(1, block_sizes.CHOICE_NUMBERS // hint(lanes * listed * (keys.shape[2] + FAMILY))),
            *((xp.reshape(x, (lanes, families, FAMILY * x.shape[2])), -2) for x in of_each(of_blocks)),
            (lists, -2),
        )
        found = xp.reshape(found, (lanes, families * FAMILY, choice.num_exact))
    return found[:, :blocks, :]


def _joined(index: Array, run: int, n: int) -> Array:
    """Join so many successive blocks of queries (L or 1, B, s) in one: (L or 1, B / run, run s)."""
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
    """Return the places of so many of the keys (L, K, r + 4), for each block of queries (L, B, T).

    `of_blocks`: their means (L, B, r), deviations from it (L, B, 1), and log weights of groups there (L, B, C).
    """
    (centre, spread, to_groups), xp, of_k = of_blocks, namespace(keys), keys[..., :-4]
    along_mu, share, length, weight = (keys[..., None, :, column] for column in (-4, -3, -2, -1))
    # q.k less a part that all keys share; half of a block's queries on this side of its mean, half on the other.
    exact = xp.matmul(centre, xp.matrix_transpose(of_k)) + along_mu
    aside = spread * length
    top = finite(xp.max(exact + aside, axis=-1, keepdims=True))
    exactly = (xp.exp(exact + aside - top) + xp.exp(exact - aside - top)) / 2
    # No more than its keys, so that this is finite.
    by_group = xp.matrix_transpose(rows(xp.matrix_transpose(xp.exp(to_groups - top)), group)) * share
    missed = xp.abs(exactly - by_group) * weight
    return backend_of(missed).largest(xp.where(along_mu == -math.inf, -1.0, missed), count)
