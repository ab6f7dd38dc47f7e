"""Every estimator against the papers' formulas, written independently (tests/helpers/reference.py)."""

import numpy as np
import pytest

from tests.helpers import reference
from tests.helpers.calls import eva, lara, ra, rfa, softmax_attention

pytestmark = pytest.mark.mathematics


def inputs(seed, n=17, m=17, lead=(2,), d=4, e=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, *size)) for size in ((n, d), (m, d), (m, e))], rng


@pytest.mark.parametrize("m", [17, 9, 1])
@pytest.mark.parametrize("scale", [None, 0.3, 2.0])
def test_softmax(lib, m, scale):
    (q, k, v), _ = inputs(0, m=m)
    out = lib.check(softmax_attention(*lib.arrays(q, k, v), scale=scale), lib.asarray(q), (2, 17, 3))
    lib.close(lib.asarray(out), reference.softmax(q, k, v, scale=scale))


def test_causal_softmax(lib):
    (q, k, v), _ = inputs(1)
    out = softmax_attention(*lib.arrays(q, k, v), is_causal=True)
    lib.close(out, reference.softmax(q, k, v, keep=lambda n, m: m <= n))


@pytest.mark.parametrize("m", [17, 9])
@pytest.mark.parametrize("features", ["positive", "trigonometric"])
def test_rfa(lib, features, m):
    (q, k, v), rng = inputs(2, m=m)
    noise = rng.standard_normal((2, 23, 4))
    formula = reference.rfa_positive if features == "positive" else reference.rfa_trigonometric
    out = rfa(*lib.arrays(q, k, v), features=features, noise=lib.asarray(noise))
    lib.close(out, formula(q, k, v, noise))


@pytest.mark.parametrize("m", [17, 9])
def test_ra(lib, m):
    (q, k, v), rng = inputs(3, m=m)
    noise, components = rng.standard_normal((2, 3, 17, 4)), rng.random((2, 3, 17))
    out = ra(*lib.arrays(q, k, v), noise=lib.asarray(noise), components=lib.asarray(components))
    lib.close(out, reference.ra(q, k, v, noise, components))


@pytest.mark.parametrize("m", [17, 11])
@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "balance"},
        {"weighting": "biased"},
        {"weighting": "optimal", "alpha": 1.5},
        {"weighting": "optimal", "normalize": "landmarks"},
        {"weighting": "optimal", "mix_keys": True, "noise_scale": 0.5},
    ],
    ids=str,
)
def test_lara(lib, options, m):
    (q, k, v), rng = inputs(4, m=m)
    noise = rng.standard_normal((2, 5, 4))
    out = lara(*lib.arrays(q, k, v), num_landmarks=5, noise=lib.asarray(noise), **options)
    lib.close(out, reference.lara(q, k, v, noise, **options))


def tiles(n, size):
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]


GROUPS, WINDOWS = ({"num_groups": 5}, {"group_size": 2}, {"group_size": 8}), (1, 4, 5, 17, 40)
EVA_CASES = [
    # Windows inside groups, groups inside windows, and either cut by the other's borders.
    *[(groups, window, "size", True) for groups in GROUPS for window in WINDOWS],
    *[(groups, 5, "unit", disjoint) for groups in GROUPS for disjoint in (True, False)],
]


@pytest.mark.parametrize(("groups", "window", "group_weight", "disjoint"), EVA_CASES, ids=str)
def test_eva_on_a_line(lib, groups, window, group_weight, disjoint):
    (q, k, v), rng = inputs(5)
    size = groups.get("group_size")
    listed = tiles(17, size) if size else reference.segments(17, 5)
    noise = rng.standard_normal((2, len(listed), 4))
    own = {n: tile for tile in tiles(17, window) for n in tile}
    options = {"group_weight": group_weight, "disjoint": disjoint}
    out = eva(*lib.arrays(q, k, v), window=window, noise=lib.asarray(noise), **groups, **options)
    lib.close(out, reference.eva(q, k, v, noise, groups=listed, window=own.get, **options))


def test_eva_without_window(lib):
    (q, k, v), rng = inputs(6)
    noise = rng.standard_normal((2, 5, 4))
    out = eva(*lib.arrays(q, k, v), num_groups=5, window=0, noise=lib.asarray(noise))
    expected = reference.eva(q, k, v, noise, groups=reference.segments(17, 5), window=lambda n: [])
    lib.close(out, expected)


def test_eva_on_a_grid(lib):
    """5 x 6 tokens, groups of 2 x 2 and windows of 3 x 4, which cut each other."""
    (q, k, v), rng = inputs(7, n=30, m=30)
    tokens = np.arange(30).reshape(5, 6)

    def blocks(height, width):
        return [
            tokens[i : i + height, j : j + width].ravel()
            for i in range(0, 5, height)
            for j in range(0, 6, width)
        ]

    noise = rng.standard_normal((2, 9, 4))
    own = {n: block for block in blocks(3, 4) for n in block}
    out = eva(*lib.arrays(q, k, v), group_size=(2, 2), window=(3, 4), grid=(5, 6), noise=lib.asarray(noise))
    lib.close(out, reference.eva(q, k, v, noise, groups=blocks(2, 2), window=own.get))


def test_bias_inside_evas_window(lib):
    """Each head's own, by the places of a query and a key in their window; on a grid, too."""
    (q, k, v), rng = inputs(10, n=30, m=30)
    noise, bias = rng.standard_normal((2, 4, 4)), 2 * rng.standard_normal((2, 12, 12))
    rows, columns = np.divmod(np.arange(30), 6)
    for grid, window, place, block in (
        (None, 12, np.arange(30) % 12, np.arange(30) // 12),
        ((5, 6), (3, 4), rows % 3 * 4 + columns % 4, rows // 3 * 2 + columns // 4),
    ):
        options = {"window": window, "grid": grid, "num_groups": 4 if grid is None else (2, 2)}
        arrays, own = lib.arrays(q, k, v), {"noise": lib.asarray(noise), "window_bias": lib.asarray(bias)}
        out = eva(*arrays, **options, **own)
        listed = reference.segments(30, 4)
        if grid is not None:
            cells = (rows >= 2) * 2 + columns // 3
            listed = [np.flatnonzero(cells == cell) for cell in range(4)]
        for head in range(2):
            expected = reference.eva(
                *(x[head : head + 1] for x in (q, k, v, noise)),
                groups=listed,
                window=lambda n, block=block: np.flatnonzero(block == block[n]),
                bias=lambda n, m, head=head, place=place: bias[head, place[n], place[m]],
            )
            np.testing.assert_allclose(lib.numpy(out)[head : head + 1], expected, rtol=1e-9, atol=1e-12)
    # A window over all tokens is exact attention with a bias of pairs; a longer one, too.
    for n, is_causal in ((12, False), (12, True), (7, False), (7, True)):
        short = [x[:, :n] for x in (q, k, v)]
        out = eva(*lib.arrays(*short), window=12, window_bias=lib.asarray(bias), is_causal=is_causal)
        logits = short[0] @ np.swapaxes(short[1], -1, -2) / 2 + bias[:, :n, :n]
        weights = np.exp(logits) * (np.tri(n) if is_causal else 1)
        lib.close(out, weights / weights.sum(axis=-1, keepdims=True) @ short[2])
    # A bias that brings heads gives each its own draws.
    single = lib.arrays(q[0], k[0], v[0])
    drawn = lib.numpy(eva(*single, window=12, num_groups=4, rng=0, window_bias=lib.asarray(0 * bias)))
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-6


def test_lara_on_a_grid_that_landmarks_divide(lib):
    """Reordering the tokens block by block makes a line of segments of the grid."""
    (q, k, v), rng = inputs(8, n=24, m=24)
    noise = rng.standard_normal((2, 6, 4))
    order = np.arange(24).reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).ravel()
    out = lara(*lib.arrays(q, k, v), num_landmarks=(2, 3), grid=(4, 6), noise=lib.asarray(noise))
    expected = reference.lara(q[:, order], k[:, order], v[:, order], noise)
    lib.close(out, expected[:, np.argsort(order)])


def test_own_landmarks_are_in_the_inputs_units(lib):
    """The means of the segments, given by hand, are the default."""
    (q, k, v), rng = inputs(9, n=20, m=20)
    noise = lib.asarray(rng.standard_normal((2, 5, 4)))
    pair = tuple(lib.asarray(x.reshape(2, 5, 4, 4).mean(axis=2)) for x in (q, k))
    arrays = lib.arrays(q, k, v)
    for estimator, options in ((lara, {}), (eva, {"window": 4}), (eva, {"window": 2, "disjoint": False})):
        own = estimator(*arrays, landmarks=pair, noise=noise, **options)
        count = {"num_landmarks": 5} if estimator is lara else {"num_groups": 5}
        lib.close(own, lib.numpy(estimator(*arrays, noise=noise, **count, **options)))
