"""Lay blocks of tokens over devices, and cut groups by windows, as plain NumPy indices.

Tokens that are laid over devices are cut in lanes, each lane on one device. Blocks are then listed by lane,
as many in each lane, and a block has tokens of its lane alone. A window belongs to the lane that it begins
in. For windows that end in the next lane, a lane also has the first tokens of the next lane, its edge.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from randattn._core.tracing import static

from .grids import Blocks, How, Sizes, host_blocks, listed


class Members(NamedTuple):
    """The parts of each group, and the places of the windows' own parts among them.

    Attributes
    ----------
    index, valid : ndarrays of int and bool, shape (C, r)
        The parts of each group; `valid` is False for padding.
    inside : ndarray of int, shape (B, R)
        For each window and each group that it cuts, the place of the window's own part among all members.
    lanes : int
        The number of lanes of this level: a group and its parts are in one lane.
    """

    index: Any
    valid: Any
    inside: Any
    lanes: int


class Pieces(NamedTuple):
    """Groups of keys, cut in pieces.

    Attributes
    ----------
    atoms : Blocks
        The smallest pieces.
    group_of_atom : ndarray of int, shape (A,)
    levels : tuple of Members
        The merges from atoms to groups: within each lane first, then across lanes.
    """

    atoms: Blocks
    group_of_atom: Any
    levels: tuple[Members, ...]


class Cuts(NamedTuple):
    """The cuts of groups of keys by windows, from their common refinement into atoms.

    Attributes
    ----------
    pieces : Pieces
        An atom has the tokens that a window and a group share.
    is_cut, group_of_cut : ndarrays of bool and int, shape (B, R)
        For each window the groups that it cuts; `is_cut` is False for padding.
    outside : ndarray of bool, shape (B, C)
        True where a group has no token in a window.
    """

    pieces: Pieces
    is_cut: Any
    group_of_cut: Any
    outside: Any


@static
def windows(grid: Sizes, window: Sizes, lanes: int) -> Blocks:
    """Lay windows of one size over the grid, in lanes."""
    return _windows(grid, window, lanes)[0] if lanes > 1 else host_blocks(grid, "tiles", window)


# Each cache keeps 64 layouts, which bounds host memory. Layers share layouts: no caller may write to them.
@functools.lru_cache(maxsize=64)
def _windows(grid: Sizes, window: Sizes, lanes: int) -> tuple[Blocks, Any]:
    owners, by_window = _owners(grid, window, lanes), host_blocks(grid, "tiles", window)
    laid, of_block, is_block = _lay(owners, *_entries(by_window), len(by_window.index))
    return laid, _inverse(of_block, is_block, len(by_window.index))


@static
def pieces(at: Blocks, lanes: int) -> Pieces:
    """Cut blocks at the borders of lanes."""
    assert at.laid is not None
    return _pieces(*at.laid, lanes)


@functools.lru_cache(maxsize=64)
def _pieces(grid: Sizes, how: How, sizes: Sizes, lanes: int) -> Pieces:
    import numpy as np

    at = host_blocks(grid, how, sizes)
    count = len(at.index)
    atoms, group, is_atom = _lay(_owners(grid, None, lanes), *_entries(at), count)
    members, _ = _members(group, is_atom, count, 1)
    whole = np.array_equal(members.index[:, 0], np.arange(len(group))) and members.valid.all()
    return Pieces(atoms, group, () if whole else (members,))


@static
def divided(at: Blocks, most: int) -> Pieces:
    """Cut each block in the same number of parts, of at most `most` tokens."""
    import numpy as np

    count, length = at.index.shape
    if length <= most:
        return Pieces(at._replace(laid=None), np.arange(count), ())
    size = -(-length // -(-length // most))
    parts = -(-length // size)
    fill = ((0, 0), (0, parts * size - length))
    index = np.pad(at.index, fill, mode="edge").reshape(-1, size)
    valid = np.ones_like(at.index, dtype=bool) if at.valid is None else at.valid
    members = np.arange(count * parts).reshape(count, parts)
    atoms = listed(index, np.pad(valid, fill).reshape(-1, size), at.place.size)
    levels = (Members(members, np.ones_like(members, dtype=bool), None, 1),)
    return Pieces(atoms, members.reshape(-1) // parts, levels)


@static
@functools.lru_cache(maxsize=64)
def cuts(grid: Sizes, groups: tuple[How, Sizes], window: Sizes, lanes: int = 1) -> Cuts:
    """Return the cuts of groups of keys by windows of one size."""
    import numpy as np

    n = math.prod(grid)
    by_group, by_window = host_blocks(grid, *groups), host_blocks(grid, "tiles", window)
    group_count = len(by_group.index)
    group = by_group.place // by_group.index.shape[1]
    window_of_token = by_window.place // by_window.index.shape[1]
    laid_windows, slot_of_window = _windows(grid, window, lanes)

    # Tokens of one label, a pair of a window and a group, are an atom.
    label = window_of_token * group_count + group
    owners = _owners(grid, window, lanes)
    atoms, of_atom, is_atom = _lay(owners, np.arange(n), label, len(by_window.index) * group_count)
    atom_window, atom_group = of_atom // group_count, of_atom % group_count
    # A piece is the part of a group in one lane: atoms merge to pieces within a lane, pieces to groups across
    # lanes, so that averages of pieces alone travel between devices.
    lane = np.arange(len(of_atom)) // (len(of_atom) // lanes)
    piece, piece_group, is_piece = _slots(lane, atom_group, is_atom, group_count, lanes)
    within, place = _members(piece, is_atom, len(piece_group), lanes)
    across, place_of_piece = _members(piece_group, is_piece, group_count, 1)

    tokens_of_atom = np.bincount(label, minlength=len(by_window.index) * group_count)[of_atom]
    # A window cuts a group if their atom has fewer tokens than the group.
    cut = np.flatnonzero(is_atom & (tokens_of_atom < np.bincount(group)[atom_group]))
    of_window, is_cut = _list_by(slot_of_window[atom_window[cut]], len(laid_windows.index))
    chosen = cut[of_window] if cut.size else np.zeros_like(of_window)
    inside = np.where(is_cut, place[chosen], _firsts(of_window.shape, lanes, within.index.size // lanes))
    levels = (within._replace(inside=inside), across._replace(inside=place_of_piece[piece[chosen]]))

    outside = np.ones((len(laid_windows.index), group_count), dtype=bool)
    outside[slot_of_window[atom_window[is_atom]], atom_group[is_atom]] = False
    # With one lane a piece is a whole group, and the second level would merge nothing.
    parts = Pieces(atoms, atom_group, levels if lanes > 1 else levels[:1])
    return Cuts(parts, is_cut, atom_group[chosen], outside)


class _Owners(NamedTuple):
    """The lane of each token, (N,), and the length of an edge; the lane of a token is that of its window."""

    lane: Any
    lanes: int
    edge: int


def _owners(grid: Sizes, window: Sizes | None, lanes: int) -> _Owners:
    import numpy as np

    token = np.arange(math.prod(grid))
    length = len(token) // lanes
    lane = token // length
    if window is None:
        return _Owners(lane, lanes, 0)
    at = host_blocks(grid, "tiles", window)
    lane = lane[at.index[:, 0]][at.place // at.index.shape[1]]
    # The edge is as long as the farthest reach of a window beyond the end of its lane.
    return _Owners(lane, lanes, max(0, int(np.max(token + 1 - (lane + 1) * length))))


@static
def fits_lanes(grid: Sizes, window: Sizes, lanes: int) -> bool:
    """Tell whether every window ends in its own lane or in the next lane."""
    return _owners(grid, window, lanes).edge <= math.prod(grid) // lanes


def _entries(at: Blocks) -> tuple[Any, Any]:
    """Return the tokens of all blocks without padding, and the block of each token."""
    import numpy as np

    block = np.broadcast_to(np.arange(len(at.index))[:, None], at.index.shape)
    keep = np.ones(at.index.shape, dtype=bool) if at.valid is None else at.valid
    return at.index[keep], block[keep]


def _lay(owners: _Owners, tokens: Any, label: Any, count: int) -> tuple[Blocks, Any, Any]:
    """Lay tokens of one lane and label in a block, with as many blocks in each lane.

    Also return the label of each block, and for each block False where it is padding.
    """
    import numpy as np

    lane, lanes, edge = owners
    n = len(lane)
    length, held = n // lanes, n // lanes + edge
    part, label_of_block, is_block = _slots(lane[tokens], label, True, count, lanes)
    listed, valid = _list_by(part, len(label_of_block))
    # In lanes with edges a token stands behind the edges of all lanes before its own.
    position = np.arange(n) + lane * edge
    # Padding is a place of the same lane, so that a gather reads from no other device.
    index = np.where(
        valid.any(axis=1, keepdims=True), position[tokens[listed]], _firsts(valid.shape, lanes, held)
    )
    place = _firsts((lanes * held,), lanes, index.size // lanes)
    place[index[valid]] = np.flatnonzero(valid)
    in_order = not edge and index.size == n and bool(np.all(index.ravel() == np.arange(n)))
    own = (lane == np.arange(n) // length).reshape(lanes, length) if edge else None
    at = Blocks(index, None if valid.all() else valid, place, in_order, lanes, edge, own)
    return at, label_of_block, is_block


def _slots(lane: Any, label: Any, real: Any, count: int, lanes: int) -> tuple[Any, Any, Any]:
    """Give a slot to each pair of lane and label that occurs, with as many slots in each lane.

    Return the slot of each entry, the label of each slot, and for each slot False where it is padding.
    """
    import numpy as np

    real = np.broadcast_to(real, lane.shape)
    pairs, part = np.unique((lane * count + label)[real], return_inverse=True)
    lane_of_pair = pairs // count
    each = np.bincount(lane_of_pair, minlength=lanes)
    width = int(each.max())
    # Pairs are sorted by lane: a slot is the first slot of its lane plus the number of the pair in the lane.
    slot = np.arange(len(pairs)) + (np.arange(lanes) * width - (np.cumsum(each) - each))[lane_of_pair]
    label_of_slot, is_slot = np.zeros(lanes * width, dtype=np.int64), np.zeros(lanes * width, dtype=bool)
    label_of_slot[slot], is_slot[slot] = pairs % count, True
    of_entry = lane * width
    of_entry[real] = slot[part]
    return of_entry, label_of_slot, is_slot


def _members(group: Any, real: Any, count: int, lanes: int) -> tuple[Members, Any]:
    """Return the parts of each group, and the place of each part among all members."""
    import numpy as np

    parts = np.flatnonzero(real)
    listed, valid = _list_by(group[parts], count)
    index = np.where(
        valid.any(axis=1, keepdims=True), parts[listed], _firsts(valid.shape, lanes, len(group) // lanes)
    )
    place = np.zeros(len(group), dtype=np.int64)
    place[index[valid]] = np.flatnonzero(valid)
    return Members(index, valid, None, lanes), place


def _inverse(label: Any, real: Any, count: int) -> Any:
    """Return the slot of each label."""
    import numpy as np

    slot = np.zeros(count, dtype=np.int64)
    slot[label[real]] = np.flatnonzero(real)
    return slot


def _firsts(shape: Sizes, lanes: int, size: int) -> Any:
    """Return for each row of an array the first of the `size` places of its lane."""
    import numpy as np

    lane = np.arange(shape[0]) // (shape[0] // lanes)
    return np.broadcast_to((lane * size).reshape(-1, *[1] * (len(shape) - 1)), shape).copy()


def _list_by(label: Any, count: int) -> tuple[Any, Any]:
    """Return the positions (count, L) of each label, and False for padding."""
    import numpy as np

    sizes = np.bincount(label, minlength=count)
    length = int(sizes.max(initial=0))
    starts = np.cumsum(sizes) - sizes
    step = np.arange(length)
    valid = step < sizes[:, None]
    # One entry more: the positions of a label that does not occur may begin after the last entry.
    order = np.append(np.argsort(label, kind="stable"), 0)
    return order[starts[:, None] + np.where(valid, step, 0)], valid
