"""Resolve and check the options of adaptive EVA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._core import block_sizes
from randattn._core.checks import as_count
from randattn._core.inputs import check_last
from randattn._core.library import check_known
from randattn._core.tracing import plain

if TYPE_CHECKING:
    from randattn._core.inputs import Inputs

# A block computes one key of so many exactly, and at least so many keys: of a call without causality, and of
# the keys before a block of a causal call, where the heads that err most are exact.
_EXACT_SHARE, _LEAST_EXACT = 6, 128
_CAUSAL_EXACT_SHARE, _CAUSAL_LEAST_EXACT = 16, 512
# Keys of a group. With 32 the error was smaller by a fiftieth, for twice as many groups in the average
# (docs/notes/adaptive_eva.md has the measurements behind all of these numbers).
_GROUP_SIZE = 64
# Queries of a block: of a call without causality, and the least of a causal call, whose blocks are an eighth
# of the keys. Longer blocks have fewer choices, and in a causal call more pairs in the square of each block.
_BLOCK, _CAUSAL_BLOCK, _BLOCKS = 384, 512, 8
# One head of so many is exact in a causal call. Three of nine instead of two gain a half of a percent of a
# language model's perplexity, for a tenth of exact attention's time.
_HEADS_SHARE = 4
# The last keys before a causal block, which it computes exactly.
_RECENT = 64
# Queries that a causal call computes exactly first: to the end of the first quarter of the keys, at most to
# the 2,048th, and a 16th of the keys, at most 128, where all queries are later.
_FIRST_SHARE, _FIRST_KEYS, _FIRST_QUERIES = 4, 2048, 128
# The most runs of queries whose means choose for a block, and the least queries of a run. With 8 runs for 128
# queries the error was larger by a fifth. In blocks of 16, runs of 4 gained 2% over runs of 8, for a quarter
# more multiply-adds.
_CHOOSERS, _RUN = 16, 8


class Options(NamedTuple):
    """The resolved options.

    Attributes
    ----------
    num_exact : int or None
        Exact keys of a block; None for a share of the keys that it may see.
    group_size, block_size : int
        Keys of a group, and queries of a block.
    exact_heads : int
        Heads that are computed exactly.
    is_causal : bool
    first : int
        Queries of a causal call that are computed exactly, before the first block.
    recent : int
        The last keys before a causal block, which are exact.
    """

    num_exact: int | None
    group_size: int
    block_size: int
    exact_heads: int
    is_causal: bool
    first: int
    recent: int

    def exact_of(self, keys: int) -> int:
        """Return the number of exact keys of a block that may see so many."""
        share, least = _EXACT_SHARE, _LEAST_EXACT
        if self.is_causal:
            share, least = _CAUSAL_EXACT_SHARE, _CAUSAL_LEAST_EXACT
        number = max(least, -(-keys // share)) if self.num_exact is None else self.num_exact
        return min(keys, max(self.recent, number))


def adaptive_options(x: Inputs, counts: dict[str, Any], *, is_causal: bool) -> Options | None:
    """Check the caller's options and resolve them; None where exact attention is to be computed.

    `counts` has the keywords of `resolved` that count something.
    """
    check_last(x, is_causal)
    n, m = x.q.shape[-2], x.k.shape[-2]
    check_known("k", "groups and blocks that are laid by the number of tokens", m, n)
    n, m = plain((n, m))
    least = {"exact_heads": 0}
    counts = {
        name: None if count is None else as_count(name, count, minimum=least.get(name, 1))
        for name, count in counts.items()
    }
    heads = math.prod(x.lead[len(x.lead) - axes_of_heads(x) :])
    # An empty array has nothing to choose from, and indices into all heads would divide by zero.
    return None if 0 in (*x.lead, n) else resolved(n, m, heads, is_causal=is_causal, **counts)


def resolved(
    n: int,
    m: int,
    heads: int,
    *,
    num_exact: int | None,
    group_size: int | None,
    block_size: int | None,
    exact_heads: int | None,
    is_causal: bool,
) -> Options | None:
    """Resolve the options for n queries and m keys; None where exact attention is to be computed."""
    given = (num_exact, group_size, block_size, exact_heads)
    if m <= block_sizes.ADAPTIVE_KEYS and all(one is None for one in given):
        return None
    if exact_heads is None:
        exact_heads = heads // _HEADS_SHARE if is_causal else 0
    first, block = _causal_blocks(n, m, block_size) if is_causal else (0, min(n, block_size or _BLOCK))
    if exact_heads >= heads or first == n:
        return None
    group = min(m, group_size or _GROUP_SIZE)
    # A group that a block may see in part alone is exact in that part.
    recent = max(min(_RECENT, block), group) if is_causal else 0
    return Options(num_exact, group, block, exact_heads, is_causal, first, recent)


def axes_of_heads(x: Inputs) -> int:
    """Return the number of leading axes that count heads: two for grouped queries, none without any axis."""
    return min(len(x.lead), 1 if x.heads is None else 2)


def lead_of_keys(x: Inputs) -> tuple[int, ...]:
    """Return the leading axes of the keys, which query heads may share: the last axis is then one."""
    masks = () if x.key_mask is None else (x.key_mask.shape[:-1],)
    is_shared = all(lead[-1] == 1 for lead in (x.k.shape[:-2], x.v.shape[:-2], *masks)) if x.lead else False
    return (*x.lead[:-1], 1) if x.heads is not None and is_shared else x.lead


def _causal_blocks(n: int, m: int, block: int | None) -> tuple[int, int]:
    """Return the queries before the first block, of the last n of m tokens, and the queries of a block.

    The first queries are those to the end of the first share of the keys, and the remainder of the blocks.
    """
    until = min(_FIRST_KEYS, -(-m // _FIRST_SHARE))
    first = min(n, max(min(_FIRST_QUERIES, -(-m // _CAUSAL_EXACT_SHARE)), until - (m - n)))
    if block is None:
        block = max(_CAUSAL_BLOCK, -(-m // _BLOCKS))
        # Blocks of nearly this size, in whole units of `_RECENT`, leave a small remainder.
        if n - first > block:
            block = (n - first) // ((n - first) // block) // _RECENT * _RECENT
    block = max(1, min(n - first, block))
    return first + (n - first) % block, block


def number_of_choosers(queries: int) -> int:
    """Return the number of runs of one length that choose, which divides the number of queries."""
    return next(count for count in range(most_choosers(queries), 0, -1) if queries % count == 0)


def most_choosers(queries: int) -> int:
    """Return the number of runs for about so many queries."""
    return min(_CHOOSERS, max(1, queries // _RUN))
