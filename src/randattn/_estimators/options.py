"""Options of EVA and of adaptive EVA, resolved and checked."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core.average import past
from randattn._core.checks import as_count, check_broadcast, check_like, check_option, resolve_count
from randattn._core.describe import shown
from randattn._core.library import check_known
from randattn._core.tracing import plain
from randattn._tokens.grids import blocks, number_on_grid, size_on_grid, tokens_on_grid

if TYPE_CHECKING:
    from randattn._core.inputs import Inputs
    from randattn._tokens.grids import Blocks, How, Sizes

    Array = Any

# Groups of EVA and of adaptive EVA where the caller does not give them.
NUM_GROUPS = 64
# Of the keys, the share that a block of queries computes exactly by default.
_EXACT_SHARE = 8
# By default a block has 8 queries, which is most accurate, or 128 where the call is long enough for its time to matter;
# and there are at most 64 blocks.
_SHORT, _SMALL_BLOCK, _LARGE_BLOCK, _MOST_BLOCKS = 2048, 8, 128, 64
# Coordinates that keys are chosen by: a third of the features, and not fewer than these.
_LEAST_RANK = 8
# So many blocks of queries choose from one shortlist.
FAMILY = 4


class Layout(NamedTuple):
    """How EVA lays tokens out.

    Attributes
    ----------
    tokens : tuple of int
        The grid that they lie on.
    how, sizes
        The groups, as `grids.blocks` takes them.
    groups : Blocks
    window : tuple of int, or None
        Sizes of the window on the grid.
    """

    tokens: Sizes
    how: How
    sizes: Sizes
    groups: Blocks
    window: Sizes | None


def eva_layout(
    n: int,
    m: int,
    *,
    grid: Any,
    window: Any,
    num_groups: Any,
    group_size: Any,
    is_causal: bool,
    like: tuple[Any, Any] = (None, None),
) -> Layout:
    """Lay out n queries and m keys; `like` are landmarks and noise, whose axis -2 counts the groups."""
    tokens = tokens_on_grid(grid, n, m)
    if is_causal:
        tile, sizes = _causal_sizes(tokens, window, num_groups, group_size, grid)
        return Layout(tokens, "tiles", sizes, blocks(tokens, "tiles", sizes), tile)
    how, sizes = _groups_of(tokens, num_groups, group_size, *like)
    return Layout(tokens, how, sizes, blocks(tokens, how, sizes), _window_of(n, m, window, tokens))


def _groups_of(
    tokens: Sizes, num_groups: Any, group_size: Any, landmarks: Any, noise: Any
) -> tuple[How, Sizes]:
    """Return how the keys are laid in groups: so many, or of that size."""
    if group_size is not None:
        if num_groups is not None:
            raise ValueError("group_size: expected either num_groups or group_size, got both")
        return "tiles", size_on_grid("group_size", group_size, tokens)
    given = landmarks[-1] if isinstance(landmarks, tuple | list) and landmarks else None
    count = num_groups
    if not isinstance(count, tuple | list):
        count = resolve_count("num_groups", count, NUM_GROUPS, landmarks=(given, -2), noise=(noise, -2))
    return "segments", number_on_grid("num_groups", count, tokens)


def _window_of(n: int, m: int, window: Any, tokens: Sizes) -> Sizes | None:
    """Return the window's sizes; None for none."""
    if isinstance(window, numbers.Integral) and as_count("window", window, minimum=0) == 0:
        return None
    if n != m:
        raise ValueError(
            f"window: expected 0 where there are not as many queries ({n}) as keys ({m}), got {shown(window)}"
        )
    return size_on_grid("window", window, tokens)


def _causal_sizes(
    tokens: Sizes, window: Any, num_groups: Any, group_size: Any, grid: Any
) -> tuple[Sizes, Sizes]:
    """Return the sizes of the window and of groups that are over where one begins."""
    if window == 0 or len(tokens) != 1:
        raise ValueError(
            "is_causal: eva expects a window and tokens in a row, "
            f"got window {shown(window)}, grid {shown(grid)}"
        )
    if num_groups is not None:
        raise ValueError("is_causal: expected group_size, not num_groups")
    sizes = [
        as_count(name, *size) if isinstance(size, tuple | list) and len(size) == 1 else as_count(name, size)
        for name, size in (("window", window), ("group_size", window if group_size is None else group_size))
    ]
    if sizes[0] % sizes[1]:
        raise ValueError(
            f"group_size: expected a divisor of the window ({sizes[0]}) where is_causal, got {sizes[1]}"
        )
    return (sizes[0],), (sizes[1],)


def groups_to_draw(max_tokens: Any, n: int, layout: Layout, *, is_causal: bool) -> int:
    """Return the number of groups of `max_tokens` tokens, by default of these."""
    if max_tokens is None:
        return int(layout.groups.index.shape[0])
    if not is_causal:
        raise ValueError("max_tokens: expected is_causal=True with it")
    return -(-as_count("max_tokens", max_tokens, minimum=n) // layout.sizes[0])


def bias_of_window(x: Inputs, bias: Any, window: Sizes | None, *, is_causal: bool) -> Array | None:
    """Return the bias of the pairs of a window, (..., 1, W, W)."""
    if bias is None:
        return None
    if window is None:
        raise ValueError("window_bias: expected a window with it")
    size = math.prod(window)
    own = x.match("window_bias", bias, 2)
    if len(window) == 1 and own.shape[-2] == own.shape[-1] >= x.q.shape[-2] <= size:
        # A window longer than the sequence is the sequence.
        size = x.q.shape[-2]
        own = bias = own[..., :size, :size]
    if bias.ndim < 2 or tuple(own.shape[-2:]) != (size, size):
        raise ValueError(f"window_bias: expected shape (..., {size}, {size}), got {tuple(bias.shape)}")
    check_broadcast(q=(x.q, 2), k=(x.k, 2), v=(x.v, 2), window_bias=(own, 2))
    if is_causal:
        own = x.xp.where(x.xp.matrix_transpose(past(own, size, 0, 0)), own, -math.inf)
    return own[..., None, :, :]


class Choice(NamedTuple):
    """How adaptive EVA groups keys and how many of them it computes exactly.

    Attributes
    ----------
    groups : Blocks, array of int (..., M), or None
        Consecutive keys; labels; or, for None, by a tree.
    num_groups : int
        Groups C, of the tree and of labels.
    num_exact : int
        Keys that a block of queries computes exactly.
    num_blocks : int
        Blocks of queries that choose keys together.
    """

    groups: Any
    num_groups: int
    num_exact: int
    num_blocks: int


def adaptive_choice(x: Inputs, groups: Any, group_size: Any, num_exact: Any, block_size: Any) -> Choice:
    """Resolve the caller's options."""
    n, m = x.q.shape[-2], x.k.shape[-2]
    check_known("k", "groups and blocks that are laid by the number of tokens", m, n)
    n, m = plain((n, m))
    size = -(-m // NUM_GROUPS) if group_size is None else min(m, as_count("group_size", group_size))
    count = -(-m // size)
    exact, num_blocks = resolved(n, m, num_exact, block_size)
    if isinstance(groups, str):
        check_option("groups", groups, ("segments", "tree"))
        if groups == "tree":
            return Choice(None, 2 ** depth_of(count, m), exact, num_blocks)
        laid = blocks(tokens_on_grid(None, n, m), "tiles", (size,))
        return Choice(laid, laid.index.shape[0], exact, num_blocks)
    return Choice(_labels_of(x, groups, count, m), count, exact, num_blocks)


def resolved(n: int, m: int, num_exact: Any, block_size: Any) -> tuple[int, int]:
    """Return the exact keys of a block of queries, and the number of blocks."""
    exact = -(-m // _EXACT_SHARE) if num_exact is None else min(m, as_count("num_exact", num_exact))
    if block_size is not None:
        return exact, -(-n // as_count("block_size", block_size))
    queries = _SMALL_BLOCK if n <= _SHORT else _LARGE_BLOCK
    return exact, min(_MOST_BLOCKS, -(-n // queries))


def _labels_of(x: Inputs, labels: Any, count: int, m: int) -> Array:
    check_like("groups", labels, x.q)
    if not x.xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"groups: expected 'segments', 'tree' or integers, got dtype {labels.dtype}")
    if labels.ndim < 1 or labels.shape[-1] != m:
        raise ValueError(f"groups: expected shape (..., {m}), got {tuple(labels.shape)}")
    xp = x.xp
    if xp.iinfo(labels.dtype).bits < 32:
        # Indices are computed from labels: they overflow fewer bits.
        labels = xp.astype(labels, xp.int32)
    if backend_of(labels).is_at_hand(labels) and not xp.all((labels >= 0) & (labels < count)):
        raise ValueError(f"groups: expected labels in range({count}), the keys over group_size")
    # array-api-compat's clip reads masks, for which a GPU waits.
    labels = xp.where(labels < count, xp.where(labels < 0, 0, labels), count - 1)
    return x.with_heads("groups", labels, 1)


def depth_of(count: int, tokens: int) -> int:
    """Return how often tokens are halved, to be in at most so many groups."""
    return min(count, tokens).bit_length() - 1


def rank_of(features: int) -> int:
    """Return the number of coordinates that keys are chosen by."""
    return min(features, max(_LEAST_RANK, features // 3))


def shortlist_of(num_exact: int, keys: int, blocks: int) -> int:
    """Return the keys on a shortlist, or all where shortlists would not make choosing cheaper."""
    listed = max(3 * num_exact, -(-keys // 4))
    return listed if blocks >= FAMILY and FAMILY * listed + keys < FAMILY * keys else keys
