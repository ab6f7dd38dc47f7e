"""The estimators as random variables. Seeded; the bounds stand in the design."""

import numpy as np
import pytest

from tests.helpers import reference
from tests.helpers.calls import lara, ra, rfa

pytestmark = pytest.mark.mathematics


def inputs(n, d, norm=1.0, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, d)) for _ in range(3))
    return norm * q, norm * k, v


def repeat(x, times):
    return np.broadcast_to(x, (times, *x.shape))


@pytest.mark.parametrize("native", [True, False])
def test_ra_is_unbiased(lib, native):
    """Mean over 10,000 draws: the mean square of its z-scores is near one."""
    q, _, _ = inputs(64, 4)
    _, k, v = inputs(12, 4, seed=1)
    exact = reference.softmax(q, k, v)
    rng = lib.generator(5) if native else 5
    draws = lib.numpy(ra(*lib.arrays(repeat(q, 10_000), k, v), rng=rng))
    z = (draws.mean(axis=0) - exact) / (draws.std(axis=0, ddof=1) / 100)
    assert 0.7 <= np.mean(z**2) <= 1.35


def test_ra_samples_average(lib):
    """S samples have 1/S of the variance of one."""
    q, k, v = inputs(16, 4)
    exact = reference.softmax(q, k, v)
    errors = [
        np.mean((lib.numpy(ra(*lib.arrays(repeat(q, 500), k, v), num_samples=s, rng=s)) - exact) ** 2)
        for s in (1, 16)
    ]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.15)


def errors_against_samples(lib, estimate, counts, q, k, v):
    """Root mean square error for each number of samples, over 100 independent draws."""
    exact = reference.softmax(q, k, v)
    arrays = lib.arrays(repeat(q, 100), k, v)
    return [np.sqrt(np.mean((lib.numpy(estimate(*arrays, count)) - exact) ** 2)) for count in counts]


COUNTS = (64, 256, 1024)


def slope(errors):
    return np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


@pytest.mark.parametrize("draws", ["iid", "orthogonal"])
@pytest.mark.parametrize("features", ["positive", "trigonometric"])
def test_rfa_error_falls_as_one_over_the_root_of_samples(lib, features, draws):
    q, k, v = inputs(24, 8, norm=0.4)

    def estimate(*arrays_and_count):
        *arrays, count = arrays_and_count
        return rfa(*arrays, num_samples=count, features=features, draws=draws, rng=3)

    assert slope(errors_against_samples(lib, estimate, COUNTS, q, k, v)) == pytest.approx(-0.5, abs=0.08)


@pytest.mark.parametrize("options", [{"weighting": "balance"}, {"weighting": "optimal", "alpha": 0.1}])
def test_lara_error_falls_as_one_over_the_root_of_samples(lib, options):
    """More draws from the same eight proposals."""
    q, k, v = inputs(24, 8, norm=0.4)
    means = [x.reshape(8, 3, 8).mean(axis=1) for x in (q, k)]

    def estimate(*arrays_and_count):
        *arrays, count = arrays_and_count
        landmarks = tuple(lib.asarray(np.tile(mean, (count // 8, 1))) for mean in means)
        return lara(*arrays, landmarks=landmarks, rng=3, **options)

    assert slope(errors_against_samples(lib, estimate, COUNTS, q, k, v)) == pytest.approx(-0.5, abs=0.08)


def test_orthogonal_draws_do_better(lib):
    q, k, v = inputs(24, 8, norm=0.4)
    iid, orthogonal = (
        errors_against_samples(
            lib, lambda *a, draws=draws: rfa(*a[:3], num_samples=a[3], draws=draws, rng=3), (64,), q, k, v
        )
        for draws in ("iid", "orthogonal")
    )
    assert orthogonal[0] < iid[0]


@pytest.mark.parametrize("native", [True, False])
def test_orthogonal_frequencies(lib, native):
    """Orthogonal in each block of D, and every row standard normal all the same."""
    from randattn._core.draws import normal_draws
    from randattn._core.inputs import prepare

    q = lib.asarray(np.zeros((400, 3, 5)))
    x = prepare(q, q, q, scale=None, key_mask=None, enable_gqa=False)
    rng = lib.generator(0) if native else 0
    w = lib.numpy(normal_draws(x, (12, 5), rng=rng, noise=None, axes="S, D", kind="orthogonal"))
    assert w.shape == (400, 12, 5)
    for block in (w[:, :5], w[:, 5:10], w[:, 10:]):
        gram = block @ block.swapaxes(-1, -2)
        lengths = np.sqrt(np.einsum("rii->ri", gram))
        off = gram / (lengths[:, :, None] * lengths[:, None, :]) - np.eye(block.shape[1])
        assert np.max(np.abs(off)) < 1e-10
    rows = w.reshape(-1, 5)
    assert np.max(np.abs(rows.mean(axis=0))) < 5 / np.sqrt(len(rows))
    assert np.max(np.abs(np.cov(rows.T) - np.eye(5))) < 5 * np.sqrt(2 / len(rows))
    # The squared length of a standard normal row has mean D and variance 2 D.
    squares = np.sum(rows**2, axis=1)
    assert abs(squares.mean() - 5) < 5 * np.sqrt(10 / len(rows))
    assert abs(squares.var() / 10 - 1) < 0.15
