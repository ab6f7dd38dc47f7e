"""Lay tokens out in blocks on a grid: segments, groups and windows, as plain NumPy indices.

Tokens lie in row-major order on a grid of one, two or three sizes. Indices are made once for each shape, on
the host; NumPy is imported late, so that `import randattn` stays light. `device_parts` lays the same blocks
over devices.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from randattn._core.checks import as_count
from randattn._core.describe import shown
from randattn._core.library import check_known
from randattn._core.tracing import plain, static

Sizes = tuple[int, ...]
How = Literal["segments", "cells", "tiles"]


class Blocks(NamedTuple):
    """Blocks of tokens of one length; tokens of a block are repeated as its padding.

    Attributes
    ----------
    index : ndarray of int, shape (B, L)
        The tokens of each block; with lanes, the places of the tokens in lanes with edges.
    valid : ndarray of bool, shape (B, L), or None
        False for padding; None without padding.
    place : ndarray of int, shape (N,)
        The place of each token among the B x L; the last place of a token that is in several blocks.
    in_order : bool
        True where the blocks have all tokens in their order: a reshape makes the blocks.
    lanes : int
        The number of lanes that the tokens are cut in; 1 without lanes.
    edge : int
        The number of tokens of the next lane that a lane has too.
    own : ndarray of bool, shape (lanes, N / lanes), or None
        True for a token in a block of the lane that the token lies in; None where all tokens are.
    laid : tuple (grid, how, sizes), or None
        The arguments of `blocks`; None for blocks that other functions made.
    """

    index: Any
    valid: Any
    place: Any
    in_order: bool
    lanes: int = 1
    edge: int = 0
    own: Any = None
    laid: tuple[Sizes, How, Sizes] | None = None


# The cache keeps 64 layouts, which bounds host memory: a layout has indices of all tokens. The layers of a
# model share these arrays, so that no caller may write to them.
@functools.lru_cache(maxsize=64)
def host_blocks(grid: Sizes, how: How, sizes: Sizes) -> Blocks:
    """Lay blocks over a grid.

    "segments": `sizes` are numbers of blocks on each axis; the last blocks may be longer by a token.
    "cells": `sizes` are numbers of blocks on each axis, as in adaptive pooling: blocks overlap by a token
    where their number does not divide the axis, and repeat tokens where there are more blocks than tokens.
    "tiles": `sizes` are sizes of blocks on each axis; the border cuts the last block.
    """
    import numpy as np

    rank = len(grid)
    index = np.zeros((1,) * 2 * rank, dtype=np.int64)
    valid = np.ones((1,) * 2 * rank, dtype=bool)
    for axis, (n, size) in enumerate(zip(grid, sizes, strict=True)):
        starts, stops = _borders(n, how, size)
        # Blocks are on the first `rank` axes of `index`, the tokens of a block on the last `rank` axes.
        steps = np.arange(np.max(stops - starts))
        tokens = starts[:, None] + steps
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = tokens.shape
        inside = tokens < stops[:, None]
        # Padding repeats the block's first token: a gather reads no token of another block.
        tokens = np.where(inside, tokens, starts[:, None])
        index = index * n + tokens.reshape(shape)
        valid = valid & inside.reshape(shape)
    count = math.prod(index.shape[:rank])
    index, valid, n = index.reshape(count, -1), valid.reshape(count, -1), math.prod(grid)
    return listed(index, valid, n)._replace(laid=(grid, how, sizes))


# For code that may be traced; functions that are `static` themselves call `host_blocks`.
blocks = static(host_blocks)


def listed(index: Any, valid: Any, n: int) -> Blocks:
    """Return blocks of n tokens from their indices (B, L)."""
    import numpy as np

    place = np.zeros(n, dtype=np.int64)
    place[index[valid]] = np.flatnonzero(valid)
    in_order = index.size == n and bool(np.all(index.ravel() == np.arange(n)))
    return Blocks(index, None if valid.all() else valid, place, in_order)


def _borders(n: int, how: How, size: int) -> tuple[Any, Any]:
    import numpy as np

    if how == "tiles":
        starts = np.arange(0, n, size)
        return starts, np.minimum(starts + size, n)
    i = np.arange(size)
    if how == "cells":
        # From the floor of i n / size to the ceiling of (i + 1) n / size, in whole numbers.
        return i * n // size, -((i + 1) * -n // size)
    short, longer = divmod(n, size)
    stops = np.cumsum(short + (i >= size - longer))
    return np.concatenate([[0], stops[:-1]]), stops


@static
def blocks_over(grid: Sizes, of: tuple[How, Sizes], window: Sizes) -> Any:
    """Tell for each window and block of consecutive tokens whether the block ends before the window begins.

    The result is (windows, blocks).
    """
    ends, starts = host_blocks(grid, *of).index.max(axis=1), host_blocks(grid, "tiles", window).index[:, 0]
    return ends[None, :] < starts[:, None]


@static
def blocks_before(grid: Sizes, of: tuple[How, Sizes], window: Sizes) -> Any:
    """Return the number of blocks that end before each window begins: (windows,)."""
    return blocks_over(grid, of, window).sum(axis=1)


def tokens_on_grid(grid: Any, n: int, m: int) -> Sizes:
    """Return the caller's grid, or without one a row of all keys."""
    if grid is None:
        check_known("k", "segments and windows that are laid by the number of tokens", m)
        return plain((m,))
    if not isinstance(grid, tuple | list) or not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: expected a tuple of one, two or three sizes, got {shown(grid)}")
    sizes = tuple(as_count("grid", size) for size in grid)
    if not math.prod(sizes) == n == m:
        raise ValueError(f"grid: expected as many places as queries ({n}) and keys ({m}), got {shown(sizes)}")
    return sizes


def number_on_grid(name: str, value: Any, grid: Sizes) -> Sizes:
    """Return the numbers of blocks on the axes of a grid: the caller's own, or the best factors of an int."""
    return _on_grid(name, value, grid, by_tokens=False)


def size_on_grid(name: str, value: Any, grid: Sizes) -> Sizes:
    """Return the sizes of a block on the axes of a grid: the caller's own, or the best factors of an int."""
    return _on_grid(name, value, grid, by_tokens=True)


def _on_grid(name: str, value: Any, grid: Sizes, *, by_tokens: bool) -> Sizes:
    if isinstance(value, numbers.Integral):
        return _factors(grid, as_count(name, value), by_tokens)
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: expected an integer or one for each axis of the grid, got {shown(value)}")
    sizes = tuple(as_count(name, size) for size in value)
    if len(sizes) != len(grid) or any(size > n for size, n in zip(sizes, grid, strict=False)):
        raise ValueError(
            f"{name}: expected a size for each axis that fits the grid {grid}, got {shown(sizes)}"
        )
    return sizes


# The cache keeps 256 results, a few numbers each: without it each call would search all sizes.
@static
@functools.lru_cache(maxsize=256)
def _factors(grid: Sizes, total: int, cubes: bool) -> Sizes:
    """Return the sizes that fit the grid and have the largest product up to `total`.

    Among equal products the sizes nearest to a cube win (`cubes`), or the sizes that cut the grid into blocks
    nearest to cubes.
    """

    def preference(sizes: Sizes) -> tuple[int, float]:
        edges = sizes if cubes else [n / size for n, size in zip(grid, sizes, strict=True)]
        return math.prod(sizes), -max(edges) / min(edges)

    return max(_sizes_within(grid, total), key=preference)


def _sizes_within(grid: Sizes, total: int) -> Iterator[Sizes]:
    """Yield sizes that fit the grid with a product up to `total`, the last size as large as it may be."""
    *others, last = grid
    for sizes in itertools.product(*(range(1, min(n, total) + 1) for n in others)):
        rest = total // math.prod(sizes)
        if rest:
            yield (*sizes, min(last, rest))
