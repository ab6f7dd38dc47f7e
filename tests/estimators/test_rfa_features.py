"""RFA's frequencies: their moments, the kernel that they estimate, and its variance against the closed forms."""

import math

import numpy as np
import pytest

from randattn import rfa
from randattn._core.draws import normal_draws
from randattn._core.inputs import prepare
from randattn._estimators import rfa_features
from tests.helpers.calls import rfa as called

pytestmark = pytest.mark.mathematics

D, S, TIMES = 4, 8, 4000
KINDS = ["iid", "orthogonal", "simplex", "antithetic", "qmc"]


def frequencies(lib, kind, rng=0, times=TIMES, count=S):
    if kind == "qmc":
        pytest.importorskip("scipy")
    q = lib.asarray(np.zeros((times, 1, D)))
    x = prepare(q, q, q, scale=1.0, key_mask=None, enable_gqa=False)
    return lib.numpy(normal_draws(x, (count, D), rng=rng, noise=None, axes="S, D", kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_standard_normal(lib, kind):
    """Every place in a set has its moments: mean, covariance and fourth moments, over sets."""
    w = frequencies(lib, kind)
    assert w.shape == (TIMES, S, D)
    # Sobol sets of different heads come from one generator: independent as well.
    np.testing.assert_allclose(w.mean(axis=0), 0, atol=5 / np.sqrt(TIMES))
    np.testing.assert_allclose((w**2).mean(axis=0), 1, atol=5 * np.sqrt(2 / TIMES))
    np.testing.assert_allclose((w[..., 0] * w[..., 1]).mean(axis=0), 0, atol=5 / np.sqrt(TIMES))
    np.testing.assert_allclose((w**4).mean(axis=0), 3, atol=5 * np.sqrt(96 / TIMES))


def test_how_they_depend_on_each_other(lib):
    w = frequencies(lib, "antithetic", times=3, count=5)
    np.testing.assert_allclose(w[:, 3:], -w[:, :2])
    for kind, cosine in (("orthogonal", 0.0), ("simplex", -1 / (D - 1))):
        w = frequencies(lib, kind, times=3, count=2 * D)
        unit = w / np.linalg.norm(w, axis=-1, keepdims=True)
        for block in (unit[:, :D], unit[:, D:]):
            inner = block @ np.swapaxes(block, -1, -2)
            np.testing.assert_allclose(inner[:, ~np.eye(D, dtype=bool)], cosine, atol=1e-12)


def moment_of_a_pair(square, kind):
    """``E exp((w + w').z)`` for two of a block of D, by the moments of their lengths and of a direction."""
    # |w + w'|^2 = r^2 + r'^2 + 2 c r r', with the cosine c and independent chi lengths of D degrees.
    cosine = 0.0 if kind == "orthogonal" else -1 / (D - 1)

    def length(m):
        return 2 ** (m / 2) * math.gamma((D + m) / 2) / math.gamma(D / 2)

    def squared_sum(k):
        ways = ((a, b, k - a - b) for a in range(k + 1) for b in range(k + 1 - a))
        return sum(
            math.factorial(k)
            / (math.factorial(a) * math.factorial(b) * math.factorial(c))
            * (2 * cosine) ** c
            * length(2 * a + c)
            * length(2 * b + c)
            for a, b, c in ways
        )

    def along(k):
        """A unit vector's coordinate, to the power of 2k."""
        return math.gamma(k + 0.5) * math.gamma(D / 2) / (math.gamma(0.5) * math.gamma(D / 2 + k))

    return sum(squared_sum(k) * along(k) * square**k / math.factorial(2 * k) for k in range(25))


def variance_of_the_kernel(square, kind):
    """The variance of the mean of S values ``exp(w.z - |z|^2/2)``: each one's variance, and what they share."""
    if kind == "iid":
        shared = 0.0
    elif kind == "antithetic":
        shared = math.exp(-square) - 1
    else:
        shared = (D - 1) * (math.exp(-square) * moment_of_a_pair(square, kind) - 1)
    return (math.exp(square) - 1 + shared) / S


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_unbiased_with_the_closed_form_of_variance(lib, kind):
    """``E exp(w.z - |z|^2/2) = 1``, as a z-score over sets; scrambled points have no closed form."""
    z = np.asarray([0.5, -0.3, 0.4, 0.6])
    found = np.exp(frequencies(lib, kind, times=TIMES if kind == "qmc" else 40_000) @ z - z @ z / 2).mean(
        axis=-1
    )
    assert abs(found.mean() - 1) < 4 * found.std() / np.sqrt(len(found))
    if kind != "qmc":
        assert found.var() == pytest.approx(variance_of_the_kernel(z @ z, kind), rel=0.05)
    if kind != "iid":
        assert found.var() < 0.9 * variance_of_the_kernel(z @ z, "iid")


def test_the_preconditioned_kernel_is_unbiased_with_the_closed_form_of_variance(lib):
    """The variance of each pair is ``exp(2 q.k) (exp(|z|^2) - 1)`` at its own z, whose mean is less than without."""
    q, k, _ = (x / 3 for x in inputs(3))
    x = prepare(*lib.arrays(q, k, k), scale=1.0, key_mask=None, enable_gqa=False)
    scaled = rfa_features.preconditioned(x)
    a, b = lib.numpy(scaled.q), lib.numpy(scaled.k)
    kernel = np.exp(q @ np.swapaxes(k, 1, 2))
    w = frequencies(lib, "iid", times=40_000).reshape(-1, D)

    def features(x):
        return np.exp(x @ w.T - (x**2).sum(axis=-1)[..., None] / 2)

    found = features(a)[:, :, None] * features(b)[:, None]
    assert np.all(np.abs(found.mean(axis=-1) - kernel) < 5 * found.std(axis=-1) / np.sqrt(len(w)))

    def variance(a, b):
        z = a[:, :, None] + b[:, None]
        return kernel**2 * (np.exp((z**2).sum(axis=-1)) - 1)

    np.testing.assert_allclose(found.var(axis=-1), variance(a, b), rtol=0.1)
    assert variance(a, b).mean() < 0.9 * variance(q, k).mean()


def spread_of(lib, q, k, **options):
    x = prepare(*lib.arrays(q, k, k), scale=1.0, key_mask=options.get("key_mask"), enable_gqa=False)
    return x, lib.numpy(rfa_features.optimal_spread(x))


def test_optimal_features_are_unbiased_with_the_closed_form_of_variance(lib):
    """And of other spreads, none has less (FAVOR++, arXiv 2205.15317)."""
    q, k = np.asarray([[0.7, -0.2, 0.5, 0.1]]), np.asarray([[0.3, 0.4, 0.2, 0.5]])
    z = (q + k)[0]
    _, spread = spread_of(lib, q, k)
    s = float(spread[0, 0])

    def second_moment(s):
        return s**D * (2 * s - 1) ** (-D / 2) * np.exp(2 * s * (z @ z) / (2 * s - 1))

    for other in (0.9 * s, 1.1 * s, 1.0):
        assert second_moment(s) < second_moment(other)
    w = np.sqrt(s) * frequencies(lib, "iid", times=40_000)
    weight = s ** (D / 2) * np.exp((1 / s - 1) / 2 * (w**2).sum(axis=-1))
    found = (weight * np.exp(w @ z)).reshape(-1)
    exact = np.exp(z @ z / 2)
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(found.size)
    assert (found**2).mean() == pytest.approx(second_moment(s), rel=0.1)
    assert (found**2).mean() < 0.8 * second_moment(1.0)


def inputs(n=40):
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, n, D))
    return q * np.asarray([3.0, 1.0, 0.3, 1.0]), k * np.asarray([0.2, 1.0, 2.0, 1.0]), v


@pytest.mark.parametrize("options", [{"features": "optimal"}, {"precondition": True}])
def test_they_converge_to_attention(lib, options):
    q, k, v = (x / 2 for x in inputs())
    logits = q @ np.swapaxes(k, 1, 2) / 2
    weights = np.exp(logits)
    exact = weights / weights.sum(axis=-1, keepdims=True) @ v
    errors = [
        np.linalg.norm(lib.numpy(called(*lib.arrays(q, k, v), num_samples=count, rng=0, **options)) - exact)
        for count in (16, 16384)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_a_preconditioned_call_is_one_on_scaled_features(lib):
    q, k, v = inputs()
    factor = ((k**2).mean(axis=1, keepdims=True) / (q**2).mean(axis=1, keepdims=True)) ** 0.25
    out = called(*lib.arrays(q, k, v), rng=0, precondition=True)
    lib.close(out, lib.numpy(called(*lib.arrays(q * factor, k / factor, v), rng=0)))
    # A feature that is zero everywhere stays so.
    q[..., 0] = k[..., 1] = 0
    assert np.all(np.isfinite(lib.numpy(called(*lib.arrays(q, k, v), rng=0, precondition=True))))


@pytest.mark.parametrize("options", [{"features": "optimal"}, {"precondition": True}])
def test_padding_is_in_no_mean(lib, options):
    q, k, v = inputs()
    keep = np.arange(40) < 25
    hidden = [np.where(keep[:, None], x, np.nan) for x in (k, v)]
    out = called(*lib.arrays(q, *hidden), key_mask=lib.asarray(keep), num_samples=8, rng=0, **options)
    alone = called(*lib.arrays(*(x[:, :25] for x in (q, k, v))), num_samples=8, rng=0, **options)
    lib.close(out[:, :25, :], lib.numpy(alone))


def test_errors(lib):
    arrays = lib.arrays(*inputs())
    with pytest.raises(ValueError, match="draws"):
        rfa(*arrays, rng=0, draws="sobol")
    with pytest.raises(ValueError, match="features"):
        rfa(*arrays, rng=0, features="best")
    with pytest.raises(TypeError, match="precondition"):
        rfa(*arrays, rng=0, precondition="yes")
    for options in ({"features": "optimal"}, {"precondition": True}):
        with pytest.raises(NotImplementedError, match="is_causal"):
            rfa(*arrays, rng=0, is_causal=True, **options)
    if lib.name in ("torch", "jax"):
        with pytest.raises(TypeError, match="qmc"):
            rfa(*arrays, rng=lib.generator(0), draws="qmc")
