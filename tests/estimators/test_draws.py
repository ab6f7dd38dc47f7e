"""Randomness: one int seed, one answer; native generators; the caller's own noise."""

import numpy as np
import pytest

from tests.helpers.calls import eva, lara, ra, rfa
from tests.helpers.forms import ESTIMATORS

N, D = 10, 4
DETERMINISTIC = (
    "softmax",
    "lara deterministic",
    "eva deterministic",
    "adaptive_eva",
    "adaptive_eva remainder",
    "adaptive_eva causal",
)
DRAWN = [name for name in ESTIMATORS if name not in DETERMINISTIC]


def inputs(seed=0, lead=(2, 2)):
    return np.random.default_rng(seed).standard_normal((3, *lead, N, D))


def philox(seed, shape):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape)


@pytest.mark.parametrize("name", DRAWN)
def test_one_int_seed_is_numpys_philox_everywhere(lib, name):
    """The answer is NumPy's own, so that it is the same on every library."""
    arrays = inputs()
    expected = ESTIMATORS[name](*arrays)
    lib.close(ESTIMATORS[name](*lib.arrays(*arrays)), expected)


def test_the_draws_of_an_int_seed_are_documented(lib):
    """Philox(seed), standard normal, one draw for each leading axis; RA's uniforms from the jumped stream."""
    arrays = lib.arrays(*inputs())
    noise = lib.asarray(philox(7, (2, 2, 6, D)))
    lib.close(rfa(*arrays, num_samples=6, rng=7), lib.numpy(rfa(*arrays, noise=noise)))
    lib.close(lara(*arrays, num_landmarks=6, rng=7), lib.numpy(lara(*arrays, noise=noise)))
    lib.close(eva(*arrays, num_groups=6, rng=7), lib.numpy(eva(*arrays, noise=noise)))
    noise = lib.asarray(philox(7, (2, 2, 3, N, D)))
    components = lib.asarray(np.random.Generator(np.random.Philox(7).jumped()).random((2, 2, 3, N)))
    expected = lib.numpy(ra(*arrays, noise=noise, components=components))
    lib.close(ra(*arrays, num_samples=3, rng=7), expected)


@pytest.mark.parametrize("name", DRAWN)
def test_native_generators_repeat_themselves(lib, name):
    arrays = lib.arrays(*inputs())
    draw = ESTIMATORS[name].func
    options = {**ESTIMATORS[name].keywords}
    outs = [lib.numpy(draw(*arrays, **{**options, "rng": lib.generator(seed)})) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.max(np.abs(outs[0] - outs[2])) > 1e-3


def test_numpy_integers_are_seeds(lib):
    arrays = lib.arrays(*inputs())
    lib.close(rfa(*arrays, rng=np.int64(3)), lib.numpy(rfa(*arrays, rng=3)))


def test_no_two_heads_share_their_draws(lib):
    """The same inputs in every head, different answers."""
    q, k, v = (np.broadcast_to(x, (3, N, D)) for x in np.random.default_rng(0).standard_normal((3, N, D)))
    out = lib.numpy(rfa(*lib.arrays(q, k, v), num_samples=4, rng=0))
    assert np.max(np.abs(out[0] - out[1])) > 1e-3
    assert np.max(np.abs(out[1] - out[2])) > 1e-3


def test_noise_broadcasts(lib):
    arrays = lib.arrays(*inputs())
    noise = philox(2, (6, D))
    shared = lib.asarray(np.broadcast_to(noise, (2, 2, 6, D)))
    for estimator in (rfa, lara, eva):
        lib.close(estimator(*arrays, noise=lib.asarray(noise)), lib.numpy(estimator(*arrays, noise=shared)))
    each, uniforms = philox(3, (2, 1, D)), np.random.default_rng(3).random((2, 1))
    full = (
        lib.asarray(np.broadcast_to(each, (2, 2, 2, N, D))),
        lib.asarray(np.broadcast_to(uniforms, (2, 2, 2, N))),
    )
    out = ra(*arrays, noise=lib.asarray(each), components=lib.asarray(uniforms))
    lib.close(out, lib.numpy(ra(*arrays, noise=full[0], components=full[1])))


def test_noise_is_used_in_the_inputs_precision(lib):
    """Float64 noise beside float32 inputs."""
    arrays = lib.arrays(*inputs(), dtype="float32")
    out = rfa(*arrays, noise=lib.asarray(philox(1, (6, D))))
    lib.check(out, arrays[0], (2, 2, N, D))


def test_antithetic_draws_come_in_pairs(lib):
    """Twice the landmarks with mirrored noise is what one writes by hand."""
    q, k, v = inputs(lead=())
    noise = philox(4, (5, D))
    means = [x.reshape(5, 2, D).mean(axis=1) for x in (q, k)]
    twice = tuple(lib.asarray(np.concatenate([mean, mean])) for mean in means)
    both = lib.asarray(np.concatenate([noise, -noise]))
    for weighting in ("balance", "biased"):
        pair = lara(*lib.arrays(q, k, v), noise=lib.asarray(noise), antithetic=True, weighting=weighting)
        by_hand = lara(*lib.arrays(q, k, v), landmarks=twice, noise=both, weighting=weighting)
        lib.close(pair, lib.numpy(by_hand))


def test_noise_scale_scales_the_noise(lib):
    arrays = lib.arrays(*inputs())
    noise = philox(5, (2, 2, 5, D))
    for estimator in (lara, eva):
        out = estimator(*arrays, noise=lib.asarray(noise), noise_scale=0.5)
        lib.close(out, lib.numpy(estimator(*arrays, noise=lib.asarray(0.5 * noise))))
        still = estimator(*arrays, noise=lib.asarray(noise), noise_scale=0.0)
        count = {"num_landmarks": 5} if estimator is lara else {"num_groups": 5}
        lib.close(still, lib.numpy(estimator(*arrays, **count)))


def test_components_choose_by_inversion_also_at_the_borders(lib):
    """A uniform of 0 takes the first key with mass, one of (rounded) 1 the last."""
    q, k, v = inputs(lead=())
    mask = np.array([False, True] * 4 + [True, False])
    noise = np.zeros((1, N, D))
    for u, chosen in ((0.0, 1), (1.0, 8)):
        out = ra(
            *lib.arrays(q, k, v),
            noise=lib.asarray(noise),
            components=lib.asarray(np.full((1, N), u)),
            key_mask=lib.asarray(mask),
            query_mask=lib.asarray(np.ones(N, dtype=bool)),
            scale=1.0,
        )
        w = q + k[chosen]
        logits = np.where(mask, w @ k.T - np.sum(k * k, axis=-1) / 2, -np.inf)
        weights = np.exp(logits)
        lib.close(out, weights @ v / weights.sum(axis=-1, keepdims=True))
