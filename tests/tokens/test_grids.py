"""Blocks on grids of tokens: partitions, their sizes, and how they are chosen from one number."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from randattn._tokens.device_parts import cuts, fits_lanes, pieces, windows
from randattn._tokens.grids import blocks, number_on_grid, size_on_grid
from randattn._tokens.pooling import gather, scatter

pytestmark = pytest.mark.mathematics

GRIDS = [(12,), (13,), (1,), (4, 6), (5, 7), (1, 9), (2, 3, 5), (4, 4, 4)]


def tokens_of(at):
    """The tokens of each block."""
    keep = np.ones(at.index.shape, dtype=bool) if at.valid is None else at.valid
    return [row[real] for row, real in zip(at.index, keep, strict=True)]


@pytest.mark.parametrize("how", ["segments", "tiles"])
@pytest.mark.parametrize("grid", GRIDS)
def test_segments_and_tiles_are_partitions(grid, how):
    for sizes in itertools.product(*(sorted({1, n // 2 or 1, n}) for n in grid)):
        at = blocks(grid, how, sizes)
        listed = tokens_of(at)
        assert np.array_equal(np.sort(np.concatenate(listed)), np.arange(np.prod(grid)))
        if how == "segments":
            lengths = list(map(len, listed))
            assert len(listed) == np.prod(sizes)
            assert min(lengths) >= np.prod([n // s for n, s in zip(grid, sizes, strict=True)])


def test_blocks_of_a_grid_are_its_rectangles():
    at = blocks((4, 6), "tiles", (2, 4))
    table = np.arange(24).reshape(4, 6)
    expected = [table[:2, :4], table[:2, 4:], table[2:, :4], table[2:, 4:]]
    assert [sorted(x) for x in tokens_of(at)] == [sorted(x.ravel()) for x in expected]


@pytest.mark.parametrize(("n", "count"), [(50, 7), (48, 6), (5, 5), (100, 33)])
def test_segments_differ_by_one_and_the_longer_ones_are_last(n, count):
    lengths = [len(x) for x in tokens_of(blocks((n,), "segments", (count,)))]
    assert lengths == sorted(lengths)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("n", "count"), [(7, 3), (8, 3), (14, 7), (3, 5)])
def test_cells_are_those_of_adaptive_pooling(n, count):
    """Cell i has the tokens that its share of the line touches."""
    for i, cell in enumerate(tokens_of(blocks((n,), "cells", (count,)))):
        touched = [t for t in range(n) if t + 1 > i * n / count + 1e-9 and t < (i + 1) * n / count - 1e-9]
        assert list(cell) == touched


@pytest.mark.parametrize(
    ("grid", "name", "value", "expected"),
    [
        ((100,), "num_groups", 64, (64,)),
        ((10,), "num_groups", 64, (10,)),
        ((14, 14), "num_landmarks", 49, (7, 7)),
        ((14, 14), "window", 49, (7, 7)),
        ((32, 8), "num_landmarks", 64, (16, 4)),
        ((32, 8), "window", 16, (4, 4)),
        ((5, 7), "num_landmarks", 64, (5, 7)),
        ((8, 8, 8), "window", 64, (4, 4, 4)),
        ((2, 30), "window", 16, (2, 8)),
    ],
)
def test_one_number_is_laid_out_in_cubes(grid, name, value, expected):
    lay = size_on_grid if name == "window" else number_on_grid
    assert lay(name, value, grid) == expected


@pytest.mark.parametrize("grid", [(11,), (16,), (4, 6), (5, 6)])
@pytest.mark.parametrize("groups", [("segments", 3), ("tiles", 2), ("tiles", 5), ("segments", 1)])
def test_cuts_leave_every_key_once_to_every_query(grid, groups):
    """Window, groups outside it, and rests of the groups that it cuts: together all keys, none twice."""
    how, size = groups
    for window in (1, 2, 3, 7):
        sizes = tuple(min(size, n) for n in grid)
        tile = tuple(min(window, n) for n in grid)
        cut, by_window = cuts(grid, (how, sizes), tile), tokens_of(blocks(grid, "tiles", tile))
        by_group, atoms = tokens_of(blocks(grid, how, sizes)), tokens_of(cut.pieces.atoms)
        (level,) = cut.pieces.levels
        for c, group in enumerate(by_group):
            members = [atoms[a] for a in level.index[c][level.valid[c]]]
            assert sorted(np.concatenate(members)) == sorted(group)
        for w, own in enumerate(by_window):
            seen = [own, *(by_group[c] for c in np.flatnonzero(cut.outside[w]))]
            for inside, group in zip(level.inside[w][cut.is_cut[w]], cut.group_of_cut[w], strict=False):
                c, place = divmod(inside, level.index.shape[1])
                assert c == group
                assert set(atoms[level.index[c][place]]) <= set(own)
                others = np.delete(level.index[c], place)[np.delete(level.valid[c], place)]
                seen += [atoms[a] for a in others]
            assert sorted(np.concatenate(seen)) == list(range(np.prod(grid)))


@given(grid=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), data=st.data())
def test_gather_and_scatter_are_inverse(lib, grid, data):
    sizes = tuple(data.draw(st.integers(1, n)) for n in grid)
    at = blocks(grid, data.draw(st.sampled_from(["segments", "tiles"])), sizes)
    x = np.random.default_rng(0).standard_normal((2, int(np.prod(grid)), 3))
    there = gather(lib.asarray(x), at)
    assert tuple(there.shape) == (2, *at.index.shape, 3)
    np.testing.assert_array_equal(lib.numpy(scatter(there, at, lib.asarray(x))), x)


@pytest.mark.only("numpy", "torch", "jax", "strict")  # Dask has no take_along_axis
@pytest.mark.parametrize(
    ("grid", "window"), [((48,), 4), ((48,), 5), ((48,), 7), ((12, 4), (2, 3)), ((8, 3, 2), (3, 2, 2))]
)
@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_windows_in_lanes_are_the_windows(lib, grid, window, lanes):
    """Each in one lane, as many in each, and back in place."""
    tile = size_on_grid("window", window, grid)
    assert fits_lanes(grid, tile, lanes)
    at, plain = windows(grid, tile, lanes), blocks(grid, "tiles", tile)
    n = int(np.prod(grid))
    x = np.arange(2 * n).reshape(2, n, 1) + 0.5
    there = gather(lib.asarray(x), at)
    keep = np.ones(at.index.shape, dtype=bool) if at.valid is None else at.valid
    found = [
        list(np.unique(row[real] - 0.5)) for row, real in zip(lib.numpy(there)[0, ..., 0], keep, strict=True)
    ]
    assert len(found) % lanes == 0
    assert sorted(filter(None, found)) == sorted(sorted(row) for row in tokens_of(plain))
    np.testing.assert_array_equal(lib.numpy(scatter(there, at, lib.asarray(x))), x)


@pytest.mark.parametrize(("grid", "count"), [((48,), 7), ((48,), 6), ((48,), 2), ((12, 4), 5)])
@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_pieces_are_of_one_lane_and_one_group(grid, count, lanes):
    at = blocks(grid, "segments", number_on_grid("num_groups", count, grid))
    parts, n = pieces(at, lanes), int(np.prod(grid))
    atoms = tokens_of(parts.atoms)
    assert len(atoms) % lanes == 0
    of_lane = np.repeat(np.arange(lanes), len(atoms) // lanes)
    for lane, atom in zip(of_lane, atoms, strict=True):
        assert set(atom // (n // lanes)) <= {lane}
    groups = atoms
    for level in parts.levels:
        groups = [
            np.concatenate([atoms[a] for a in row[real]])
            for row, real in zip(level.index, level.valid, strict=True)
        ]
    assert [sorted(group) for group in groups] == [sorted(group) for group in tokens_of(at)]


def test_a_window_longer_than_a_lane_does_not_fit():
    assert not fits_lanes((48,), (30,), 4)
