"""Pooling, grouping and windows on a grid of tokens.

Tokens lie in row-major order on a grid of one, two or three sizes; segments, groups and windows are
blocks of it. The plans are plain NumPy indices, made once for each shape; NumPy is imported late,
so that `import randattn` stays light.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from ._attend import Average, average
from ._fused import chunked, mean_of_rows, take
from ._inputs import check_broadcast, check_count, hide, log_mask, namespace, placement, with_rank
from ._regroup import union
from ._static import plain, static

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._inputs import Inputs

    Array = Any
    Sizes = tuple[int, ...]
    How = Literal["segments", "cells", "tiles"]


class Blocks(NamedTuple):
    """Blocks of tokens, each filled up to one length by repeating a token of its own.

    Attributes
    ----------
    index : ndarray of int, shape (B, L)
        The tokens of each block.
    valid : ndarray of bool, shape (B, L), or None
        False where a block is filled up; None where none is.
    place : ndarray of int, shape (N,)
        Where each token stands among the B x L (the last place, where it stands in several).
    in_order : bool
        The blocks are the tokens as they stand: a reshape will do.
    """

    index: Any
    valid: Any
    place: Any
    in_order: bool


class Cuts(NamedTuple):
    """How windows cut groups of keys, by their common refinement into atoms.

    Attributes
    ----------
    atoms : Blocks
        A atoms of tokens: what a window and a group share.
    group_of_atom : ndarray of int, shape (A,)
    members, is_member : ndarrays of int and bool, shape (C, r)
        The atoms of each group, filled up.
    inside, is_cut : ndarrays of int and bool, shape (B, R)
        For each window the groups that it cuts: where, among all members, the atom inside it stands.
    group_of_cut : ndarray of int, shape (B, R)
    outside : ndarray of bool, shape (B, C)
        Whether a group has no token in a window.
    """

    atoms: Blocks
    group_of_atom: Any
    members: Any
    is_member: Any
    inside: Any
    is_cut: Any
    group_of_cut: Any
    outside: Any


@static
def blocks(grid: Sizes, how: How, sizes: Sizes) -> Blocks:
    """Lay blocks over a grid.

    "segments": so many on each axis, of equal sizes, or the last ones by one token longer.
    "cells": so many on each axis, overlapping by a token where they do not divide it, repeating
    tokens where they are more; those of adaptive pooling.
    "tiles": of that size on each axis, the last one cut off by the border.
    """
    return _blocks(grid, how, sizes)


@functools.lru_cache(maxsize=64)
def _blocks(grid: Sizes, how: How, sizes: Sizes) -> Blocks:
    import numpy as np

    rank = len(grid)
    index = np.zeros((1,) * 2 * rank, dtype=np.int64)
    valid = np.ones((1,) * 2 * rank, dtype=bool)
    for axis, (n, size) in enumerate(zip(grid, sizes, strict=True)):
        starts, stops = _borders(n, how, size)
        steps = np.arange(np.max(stops - starts))
        tokens = starts[:, None] + steps
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = tokens.shape
        inside = tokens < stops[:, None]
        tokens = np.where(inside, tokens, starts[:, None])
        index = index * n + tokens.reshape(shape)
        valid = valid & inside.reshape(shape)
    count = math.prod(index.shape[:rank])
    return _finish_blocks(index.reshape(count, -1), valid.reshape(count, -1), math.prod(grid))


def _borders(n: int, how: How, size: int) -> tuple[Any, Any]:
    import numpy as np

    if how == "tiles":
        starts = np.arange(0, n, size)
        return starts, np.minimum(starts + size, n)
    i = np.arange(size)
    if how == "cells":
        return i * n // size, -((i + 1) * -n // size)
    short, longer = divmod(n, size)
    stops = np.cumsum(short + (i >= size - longer))
    return np.concatenate([[0], stops[:-1]]), stops


def _finish_blocks(index: Any, valid: Any, n: int) -> Blocks:
    import numpy as np

    place = np.zeros(n, dtype=np.int64)
    place[index[valid]] = np.flatnonzero(valid)
    in_order = index.size == n and bool(np.all(index.ravel() == np.arange(n)))
    return Blocks(index, None if valid.all() else valid, place, in_order)


@static
def cuts(grid: Sizes, groups: tuple[How, Sizes], window: Sizes) -> Cuts:
    """How windows of a size cut groups of keys."""
    return _cuts(grid, groups, window)


@functools.lru_cache(maxsize=64)
def _cuts(grid: Sizes, groups: tuple[How, Sizes], window: Sizes) -> Cuts:
    import numpy as np

    (by_group, by_window), n = (_blocks(grid, *groups), _blocks(grid, "tiles", window)), math.prod(grid)
    group_count, window_count = len(by_group.index), len(by_window.index)
    group = by_group.place // by_group.index.shape[1]
    window_of_token = by_window.place // by_window.index.shape[1]

    pairs, atom = np.unique(window_of_token * group_count + group, return_inverse=True)
    atom_window, atom_group = pairs // group_count, pairs % group_count
    atoms = _finish_blocks(*_list_by(atom, len(pairs)), n)
    members, is_member = _list_by(atom_group, group_count)

    cut = np.flatnonzero(np.bincount(atom) < np.bincount(group)[atom_group])
    of_window, is_cut = _list_by(atom_window[cut], window_count)
    inside = cut[of_window] if cut.size else np.zeros_like(of_window)
    place = np.zeros(len(pairs), dtype=np.int64)
    place[members[is_member]] = np.flatnonzero(is_member)

    outside = np.ones((window_count, group_count), dtype=bool)
    outside[atom_window, atom_group] = False
    return Cuts(
        *(atoms, atom_group, members, is_member),
        *(place[inside], is_cut, atom_group[inside], outside),
    )


@static
def blocks_over(grid: Sizes, of: tuple[How, Sizes], window: Sizes) -> Any:
    """Whether a block of tokens in a row is over where a window begins: bools, (windows, blocks)."""
    ends, starts = _blocks(grid, *of).index.max(axis=1), _blocks(grid, "tiles", window).index[:, 0]
    return ends[None, :] < starts[:, None]


def _list_by(label: Any, count: int) -> tuple[Any, Any]:
    """The positions (count, L) at which each label stands, filled up, and where they are real."""
    import numpy as np

    sizes = np.bincount(label, minlength=count)
    length = int(sizes.max(initial=0))
    starts = np.cumsum(sizes) - sizes
    step = np.arange(length)
    valid = step < sizes[:, None]
    order = np.append(np.argsort(label, kind="stable"), 0)
    return order[starts[:, None] + np.where(valid, step, 0)], valid


def over_blocks(function: Callable[[Blocks, Any], Average], x: Array, at: Blocks) -> Average:
    """``function(at, None)``, an average over each block of tokens.

    Where the chunks of `x` are shorter than a block, over parts of blocks first: ``function(parts,
    block_of_part)``.
    """
    chunks = chunked(x)
    if chunks is None:
        return function(at, None)
    parts, of_block = _divided(at, chunks.most_tokens(x))
    if of_block is None:
        return cast("Average", chunks.in_one(*function(at, None)))
    averages = function(parts, of_block // of_block.shape[1])
    return union(averages, of_block, of_block >= 0)


def _divided(at: Blocks, most: int) -> tuple[Blocks, Any]:
    """Parts of at most so many tokens, as many of each block, and which they are, (B, parts)."""
    import numpy as np

    count, length = at.index.shape
    if length <= most:
        return at, None
    size = -(-length // -(-length // most))
    parts = -(-length // size)
    fill = ((0, 0), (0, parts * size - length))
    index = np.pad(at.index, fill, mode="edge").reshape(-1, size)
    valid = np.ones_like(at.index, dtype=bool) if at.valid is None else at.valid
    valid = np.pad(valid, fill).reshape(-1, size)
    return _finish_blocks(index, valid, at.place.size), np.arange(count * parts).reshape(count, parts)


def pool(x: Array, at: Blocks, mask: Array | None) -> Average:
    """The mean token (..., B, D) of each block and the logarithm of its size, padding left out.

    A block of padding alone has a mean of zero and the size's logarithm -inf.
    """
    return over_blocks(lambda at, _: _pool(x, at, mask), x, at)


def _pool(x: Array, at: Blocks, mask: Array | None) -> Average:
    bias = gather_bias(x, mask, at)
    tokens = gather(hide(x, mask), at)
    if bias is None:
        xp, length = namespace(x), at.index.shape[1]
        mean = mean_of_rows(tokens)
        return Average(mean, xp.full(mean.shape[:-1], math.log(length), dtype=x.dtype, device=placement(x)))
    mean, log_size = average(bias[..., None, :], tokens)
    return Average(mean[..., 0, :], log_size[..., 0])


def gather(x: Array, at: Blocks) -> Array:
    """(..., N, D) -> (..., B, L, D)."""
    xp = namespace(x)
    if not at.in_order:
        x = take(x, at.index, axis=-2)
    chunks = chunked(x)
    if chunks is not None:
        x = chunks.cut_between_blocks(x, at.index.shape[1])
    *lead, _, d = x.shape
    return xp.reshape(x, (*lead, *at.index.shape, d))


def gather_bias(x: Array, mask: Array | None, at: Blocks) -> Array | None:
    """0 for the tokens of each block, -inf for padding and what fills it up: (..., B, L); None for all 0."""
    if mask is None and at.valid is None:
        return None
    keep: Array = None
    if at.valid is not None:
        keep = with_rank(along(at.valid, x), x.ndim)
    if mask is not None:
        tokens = gather(mask[..., None], at)[..., 0]
        keep = tokens if keep is None else tokens & keep
    return log_mask(keep, x)


def scatter(x: Array, at: Blocks, like: Array) -> Array:
    """(..., B, L, E) -> (..., N, E), cut as `like` where that is chunked."""
    *lead, b, length, e = x.shape
    x = namespace(x).reshape(x, (*lead, b * length, e))
    x = x if at.in_order else take(x, at.place, axis=-2)
    chunks = chunked(x)
    return x if chunks is None else chunks.cut_as(x, like)


def along(rows: Any, tokens: Array) -> Array:
    """A NumPy array of many rows as one beside `tokens`, in as many chunks."""
    chunks = chunked(tokens)
    if chunks is not None:
        return chunks.along(rows, tokens)
    return namespace(tokens).asarray(rows, device=placement(tokens))


def blocks_of_queries(x: Inputs, keys: Blocks) -> Blocks:
    """As many blocks of queries as of keys, the very same ones where N = M."""
    n, m = plain((x.q.shape[-2], x.k.shape[-2]))
    if n == m:
        return keys
    count = keys.index.shape[0]
    return blocks((n,), "segments" if n >= count else "cells", (count,))


def pooling_ranks(landmarks: Any, noise: Any, query_mask: Any) -> list[tuple[Any, int]]:
    """The further arrays of an estimator that pools, with the number of their trailing axes."""
    pair = landmarks if isinstance(landmarks, tuple | list) else ()
    return [(noise, 2), (query_mask, 1), *[(array, 2) for array in pair]]


def given_landmarks(x: Inputs, landmarks: Any, count: int) -> tuple[Array, Array]:
    """The caller's own landmarks (..., C, D)."""
    if not isinstance(landmarks, tuple | list) or len(landmarks) != 2:
        raise TypeError(
            f"landmarks: expected a pair (q_landmarks, k_landmarks), got {type(landmarks).__name__}"
        )
    names = ("landmarks[0]", "landmarks[1]")
    pair = [x.match(name, array, 2) for name, array in zip(names, landmarks, strict=True)]
    for name, array, ours in zip(names, landmarks, pair, strict=True):
        if array.ndim < 2 or tuple(ours.shape[-2:]) != (count, x.q.shape[-1]):
            raise ValueError(
                f"{name}: expected shape (..., {count}, {x.q.shape[-1]}), got {tuple(array.shape)}"
            )
    check_broadcast(
        q=(x.q, 2), k=(x.k, 2), v=(x.v, 2), **{n: (a, 2) for n, a in zip(names, pair, strict=True)}
    )
    return pair[0], pair[1]


def resolve_query_mask(x: Inputs, query_mask: Array | None) -> Array | None:
    """The queries that take part in pooling; those of the key mask where N = M."""
    n, m = x.q.shape[-2], x.k.shape[-2]
    if query_mask is None:
        return x.key_mask if n == m else None
    return x.match_mask("query_mask", query_mask, n)


def check_grid(grid: Any, n: int, m: int) -> Sizes:
    """The caller's grid, or a row of all keys."""
    if grid is None:
        return plain((m,))
    if not isinstance(grid, tuple | list) or not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: expected a tuple of one, two or three sizes, got {grid!r}")
    sizes = tuple(check_count("grid", size) for size in grid)
    if not math.prod(sizes) == n == m:
        raise ValueError(f"grid: expected as many places as queries ({n}) and keys ({m}), got {sizes}")
    return sizes


def check_sizes(name: str, value: Any, grid: Sizes) -> Sizes:
    """A number on the grid as sizes on its axes: the caller's own, or the best that fit."""
    if isinstance(value, numbers.Integral):
        return _factors(grid, check_count(name, value), name in ("window", "group_size"))
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: expected an integer or one for each axis of the grid, got {value!r}")
    sizes = tuple(check_count(name, size) for size in value)
    if len(sizes) != len(grid) or any(size > n for size, n in zip(sizes, grid, strict=False)):
        raise ValueError(f"{name}: expected a size for each axis that fits the grid {grid}, got {sizes}")
    return sizes


@static
def _factors(grid: Sizes, total: int, cubes: bool) -> Sizes:
    """Sizes that fit the grid with the largest product up to `total`.

    Of several, those that are nearest to cubes themselves (`cubes`) or that cut the grid into
    blocks nearest to cubes.
    """
    return _best_factors(grid, total, cubes)


@functools.lru_cache(maxsize=256)
def _best_factors(grid: Sizes, total: int, cubes: bool) -> Sizes:
    def preference(sizes: Sizes) -> tuple[int, float]:
        edges = sizes if cubes else [n / size for n, size in zip(grid, sizes, strict=True)]
        return math.prod(sizes), -max(edges) / min(edges)

    return max(_sizes_within(grid, total), key=preference)


def _sizes_within(grid: Sizes, total: int) -> Iterator[Sizes]:
    *others, last = grid
    for sizes in itertools.product(*(range(1, min(n, total) + 1) for n in others)):
        rest = total // math.prod(sizes)
        if rest:
            yield (*sizes, min(last, rest))
