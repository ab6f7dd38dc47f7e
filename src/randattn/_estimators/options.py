"""Resolve and check the options of EVA."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

from randattn._core.average import past
from randattn._core.checks import as_count, check_broadcast
from randattn._core.describe import shown
from randattn._core.inputs import Inputs
from randattn._core.library import Array
from randattn._tokens.grids import Blocks, How, Sizes, blocks, number_on_grid, size_on_grid, tokens_on_grid
from randattn._tokens.pooling import count_of_blocks


class Layout(NamedTuple):
    """The layout of tokens in groups and windows of EVA.

    Attributes
    ----------
    tokens : tuple of int
        Sizes of the grid on which the tokens lie.
    how, sizes
        The groups, as arguments of `grids.blocks`.
    groups : Blocks
        The tokens of each group.
    window : tuple of int, or None
        Sizes of the window on the grid; None for no window.
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
    """Lay out n queries and m keys; `like` has landmarks and noise, whose axis -2 counts the groups."""
    tokens = tokens_on_grid(grid, n, m)
    if is_causal:
        tile, sizes = _causal_sizes(tokens, window, num_groups, group_size, grid)
        return Layout(tokens, "tiles", sizes, blocks(tokens, "tiles", sizes), tile)
    how, sizes = _groups_of(tokens, num_groups, group_size, *like)
    return Layout(tokens, how, sizes, blocks(tokens, how, sizes), _window_of(n, m, window, tokens))


def _groups_of(
    tokens: Sizes, num_groups: Any, group_size: Any, landmarks: Any, noise: Any
) -> tuple[How, Sizes]:
    """Return the layout of keys in groups, by the number of groups or by their size."""
    if group_size is not None:
        if num_groups is not None:
            raise ValueError("group_size: expected either num_groups or group_size, got both")
        return "tiles", size_on_grid("group_size", group_size, tokens)
    count = count_of_blocks("num_groups", num_groups, landmarks, noise)
    return "segments", number_on_grid("num_groups", count, tokens)


def _window_of(n: int, m: int, window: Any, tokens: Sizes) -> Sizes | None:
    """Return the sizes of the window; None for no window."""
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
    """Return the sizes of the window and of the groups of a causal call."""
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
    # A group across the border of two windows would hold keys that the queries of the first must not see.
    if sizes[0] % sizes[1]:
        raise ValueError(
            f"group_size: expected a divisor of the window ({sizes[0]}) where is_causal, got {sizes[1]}"
        )
    return (sizes[0],), (sizes[1],)


def groups_to_draw(max_tokens: Any, n: int, layout: Layout, *, is_causal: bool) -> int:
    """Return the number of groups of `max_tokens` tokens, by default of the tokens of this call."""
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
        # A window longer than the sequence is cut to it, and its bias with it.
        size = x.q.shape[-2]
        own = bias = own[..., :size, :size]
    if bias.ndim < 2 or tuple(own.shape[-2:]) != (size, size):
        raise ValueError(f"window_bias: expected shape (..., {size}, {size}), got {tuple(bias.shape)}")
    check_broadcast(q=(x.q, 2), k=(x.k, 2), v=(x.v, 2), window_bias=(own, 2))
    if is_causal:
        # The bias hides the keys to come: a window with a bias needs no causal flag.
        own = x.xp.where(x.xp.matrix_transpose(past(own, size, 0, 0)), own, -math.inf)
    return own[..., None, :, :]
