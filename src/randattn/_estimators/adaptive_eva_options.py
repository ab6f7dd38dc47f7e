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

# A block computes one key of so many exactly, and at least `LEAST_EXACT` keys. Fewer are enough in a causal
# call, where the heads that err most are exact.
EXACT_SHARE, _CAUSAL_EXACT_SHARE, LEAST_EXACT = 8, 16, 128
# Keys of a group; with 16 the error was 4% smaller and the time 3% longer (docs/notes/adaptive_eva.md).
GROUP_SIZE = 32
# Queries of a block: of a call without causality, and the least of a causal call, whose blocks grow with the
# number of keys since the exact square of each block is a share of the time.
BLOCK, _CAUSAL_BLOCK, _BLOCKS = 128, 512, 8
# One head of so many is exact in a causal call. With a third, the perplexity of a language model rose by less
# than a percent, with two ninths by 7%.
_HEADS_SHARE = 3
# The last keys before a causal block, which it computes exactly.
_RECENT = 64
# Queries that a causal call computes exactly first: to the end of the first quarter of the keys, at most to
# the 2,048th, and a 16th of the keys, at most 128, where all queries are later.
_FIRST_SHARE, _FIRST_KEYS, _FIRST_QUERIES = 4, 2048, 128


# The most runs of queries whose means choose for a block, and the least queries of a run. With 8 runs for 128
# queries the error was larger by a fifth; in blocks of 16, runs of 4 took a quarter more than runs of 8 and
# gained 2%.
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
        share = max(LEAST_EXACT, -(-keys // (_CAUSAL_EXACT_SHARE if self.is_causal else EXACT_SHARE)))
        return min(keys, max(self.recent, share if self.num_exact is None else self.num_exact))


def adaptive_options(
    x: Inputs, num_exact: Any, group_size: Any, block_size: Any, exact_heads: Any, *, is_causal: bool
) -> Options | None:
    """Resolve and check the caller's options; None where exact attention is to be computed."""
    check_last(x, is_causal)
    n, m = x.q.shape[-2], x.k.shape[-2]
    check_known("k", "groups and blocks that are laid by the number of tokens", m, n)
    n, m = plain((n, m))
    heads = math.prod(x.lead[len(x.lead) - axes_of_heads(x) :])
    given = {"num_exact": num_exact, "group_size": group_size, "block_size": block_size}
    exact, size, block = (None if one is None else as_count(name, one) for name, one in given.items())
    of_heads = heads // _HEADS_SHARE if is_causal else 0
    if exact_heads is not None:
        of_heads = min(heads, as_count("exact_heads", exact_heads, minimum=0))
    first, width = _causal_blocks(n, m, block) if is_causal else (0, min(n, block or BLOCK))
    options = Options(
        num_exact=exact,
        group_size=min(m, size or GROUP_SIZE),
        block_size=width,
        exact_heads=of_heads,
        is_causal=is_causal,
        first=first,
        # A group that a block may see in part alone is exact in that part.
        recent=max(min(_RECENT, width), min(m, size or GROUP_SIZE)) if is_causal else 0,
    )
    is_default = all(one is None for one in (*given.values(), exact_heads))
    is_short = is_default and m <= block_sizes.ADAPTIVE_KEYS
    # An empty array has nothing to choose from, and indices into all heads would divide by zero.
    if is_short or of_heads == heads or 0 in (*x.lead, n) or first == n > 0:
        return None
    return options


def axes_of_heads(x: Inputs) -> int:
    """Return the number of leading axes that count heads: two for grouped queries, none without any axis."""
    return min(len(x.lead), 1 if x.heads is None else 2)


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
