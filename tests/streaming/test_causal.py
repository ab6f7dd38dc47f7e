"""Causal attention: what comes later changes nothing."""

import warnings
from functools import partial

import numpy as np
import pytest

from tests.helpers.calls import eva, lara, rfa, softmax_attention
from tests.helpers.reference import lara_causal, rfa_positive
from tests.helpers.tokens import D, E, N, S, inputs

CAUSAL = {
    "softmax": partial(softmax_attention, is_causal=True),
    "rfa": partial(rfa, num_samples=S, rng=0, is_causal=True),
    "lara": partial(lara, num_landmarks=5, window=3, rng=0, is_causal=True),
    "lara balance": partial(lara, num_landmarks=4, window=4, weighting="balance", rng=0, is_causal=True),
    "lara mixed": partial(
        lara, num_landmarks=3, window=2, mix_keys=True, antithetic=True, rng=0, is_causal=True
    ),
    "lara drawn at the means": partial(lara, num_landmarks=7, window=3, is_causal=True),
    "eva": partial(eva, window=4, is_causal=True),
    "eva groups": partial(eva, window=4, group_size=2, is_causal=True),
    "eva unit": partial(eva, window=6, group_size=3, group_weight="unit", rng=0, is_causal=True),
    "rfa orthogonal": partial(rfa, num_samples=S, draws="orthogonal", rng=0, is_causal=True),
}
DIFFERENTIABLE = ("torch", "jax")


def draws(lead=(2, 3)):
    return np.random.default_rng(7).standard_normal((*lead, S, D))


@pytest.mark.parametrize("size", [1.0, 8.0])
def test_rfa_is_its_definition(lib, blocks, size):
    q, k, v = inputs()
    # Keys on one side of the origin, whose kernels are all far from one.
    q, k, w = size * q, size * (k + 1.0), draws()
    lib.close(
        rfa(*lib.arrays(q, k, v), noise=lib.asarray(w), is_causal=True),
        rfa_positive(q, k, v, w, is_causal=True),
    )


def test_rfa_in_single_precision(lib, blocks):
    q, k, v = inputs()
    q, k, w = 3 * q, 3 * (k + 1.0), draws()
    arrays = lib.arrays(q, k, v, w, dtype="float32")
    out = rfa(*arrays[:3], noise=arrays[3], is_causal=True)
    lib.close(out, rfa_positive(q, k, v, w, is_causal=True), rtol=2e-5)


LARA = [
    {"window": 4},
    {"window": 1, "weighting": "balance"},
    {"window": 3, "alpha": 0.5},
    {"window": 6, "weighting": "balance"},
]


@pytest.mark.parametrize("options", LARA, ids=str)
def test_lara_is_its_definition(lib, blocks, options):
    q, k, v = inputs()
    noise = np.random.default_rng(7).standard_normal((2, 3, 5, D))
    out = lara(*lib.arrays(q, k, v), noise=lib.asarray(noise), is_causal=True, **options)
    lib.close(out, lara_causal(q, k, v, noise, **options))


@pytest.mark.parametrize("options", LARA[1:3], ids=str)
def test_lara_with_padding_is_its_definition(lib, options):
    q, k, v = inputs()
    noise = np.random.default_rng(7).standard_normal((2, 3, 5, D))
    # The first two tokens, and the whole third segment.
    keep = ~np.isin(np.arange(N), [0, 1, 5, 6, 7, 12])
    hidden = [q, *(np.where(keep[:, None], x, np.nan) for x in (k, v))]
    out = lara(
        *lib.arrays(*hidden), noise=lib.asarray(noise), key_mask=lib.asarray(keep), is_causal=True, **options
    )
    expected = lara_causal(q, k, v, noise, keep=keep, **options)
    lib.close(out, np.where(keep[:, None], expected, 0.0))


@pytest.mark.parametrize("weighting", ["balance", "optimal"])
def test_lara_estimates_the_weight_of_what_is_before_the_window(lib, weighting):
    """Without bias. With the values 1 in a query's window and 0 before it, the result tells the estimate."""
    if lib.name != "numpy":
        pytest.skip("of NumPy's: the others agree with it")
    rng, window, n = np.random.default_rng(5), 4, 12
    q, k = 0.7 * rng.standard_normal((2, n, D))
    noise = rng.standard_normal((20_000, 3, D))
    # A clamped weight would be a bias: near segments have none.
    options = {"weighting": weighting, "scale": 1.0, "noise": noise, "window": window}
    options |= {"alpha": 0.05} if weighting == "optimal" else {}
    for first in (4, 8):
        v = (np.arange(n) >= first)[:, None] * np.ones((n, 1))
        share = lara(q, k, v, is_causal=True, **options)[:, first : first + window, 0]
        weights = np.exp(q @ k.T)[first : first + window]
        exact = np.tril(weights[:, first : first + window]).sum(axis=1)
        estimates = exact * (1 / share - 1)
        expected = weights[:, :first].sum(axis=1)
        z = (estimates.mean(axis=0) - expected) / (estimates.std(axis=0) / np.sqrt(len(noise)))
        assert np.all(np.abs(z) < 4)
        assert np.all(np.abs(estimates.mean(axis=0) / expected - 1) < 0.05)


@pytest.mark.parametrize("name", ["rfa", "lara", "lara balance"])
def test_estimates_approach_causal_softmax(lib, name):
    """As the root of the number of draws: 16 times as many would divide the error by four."""
    if lib.name != "numpy":
        pytest.skip("of NumPy's: the others agree with it")
    options = {"is_causal": True, **({"window": 2} if name != "rfa" else {})}
    if name == "lara balance":
        options["weighting"] = "balance"
    q, k, v = np.random.default_rng(3).standard_normal((3, 4, 256, D))
    arrays = 0.3 * q, 0.3 * k, v
    exact = softmax_attention(*arrays, is_causal=True)

    def error(count):
        count = {"num_samples" if name == "rfa" else "num_landmarks": count}
        call = rfa if name == "rfa" else lara
        found = [call(*arrays, rng=seed, **count, **options) for seed in range(8)]
        return np.sqrt(np.mean((np.array(found) - exact) ** 2))

    few, more, many = (error(count) for count in (16, 64, 256))
    assert more < few / 1.5
    assert many < few / 3


def test_eva_of_single_keys_is_exact(lib, blocks):
    arrays = lib.arrays(*inputs())
    exact = lib.numpy(softmax_attention(*arrays, is_causal=True))
    lib.close(eva(*arrays, window=4, group_size=1, rng=0, is_causal=True), exact)
    lib.close(eva(*arrays, window=N, is_causal=True), exact)


def test_eva_is_that_of_the_tokens_so_far(lib, blocks):
    """For the last window: the same window and groups without a causal mask, on the keys up to a token."""
    q, k, v = inputs()
    out = lib.numpy(eva(*lib.arrays(q, k, v), window=4, group_size=2, is_causal=True))
    for n in range(5, N + 1):
        so_far = lib.arrays(*(x[..., :n, :] for x in (q, k, v)))
        expected = lib.numpy(eva(*so_far, window=4, group_size=2))
        np.testing.assert_allclose(out[..., n - 1, :], expected[..., -1, :], rtol=1e-11)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_changes_nothing(lib, blocks, name):
    q, k, v = inputs()
    out = lib.numpy(CAUSAL[name](*lib.arrays(q, k, v)))
    n = 6
    for factor in (-1.0, 100.0):
        later = [np.where(np.arange(N)[:, None] < n, x, factor * x) for x in (q, k, v)]
        again = lib.numpy(CAUSAL[name](*lib.arrays(*later)))
        np.testing.assert_allclose(again[..., :n, :], out[..., :n, :], rtol=1e-13, atol=1e-14)
        assert not np.allclose(again[..., n:, :], out[..., n:, :])


def test_a_key_to_come_that_outweighs_all_others(lib):
    """By a thousand nats along one frequency: what was before it would vanish beside it."""
    (q, k, v), w = inputs(), draws()
    w[..., 0, :] *= 45 / np.linalg.norm(w[..., 0, :], axis=-1, keepdims=True)
    n = 6
    before = lib.numpy(rfa(*lib.arrays(q, k, v), noise=lib.asarray(w), is_causal=True))
    k[..., n, :] = w[..., 0, :] * D**0.25
    after = lib.numpy(rfa(*lib.arrays(q, k, v), noise=lib.asarray(w), is_causal=True))
    np.testing.assert_allclose(after[..., :n, :], before[..., :n, :], rtol=1e-12)
    assert np.all(np.isfinite(after))


@pytest.mark.parametrize("name", CAUSAL)
def test_weights_add_up_to_one(lib, blocks, name):
    q, k, v = inputs()
    lib.close(CAUSAL[name](*lib.arrays(3 * q, 3 * k, np.ones_like(v))), np.ones_like(v))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_first_token_sees_itself(lib, blocks, name):
    q, k, v = inputs()
    lib.close(CAUSAL[name](*lib.arrays(q, k, v))[..., :1, :], v[..., :1, :])


@pytest.mark.thorough("jax")
@pytest.mark.parametrize("name", CAUSAL)
def test_no_gradient_of_the_future(lib, blocks, name):
    if lib.name not in DIFFERENTIABLE:
        pytest.skip("for torch, jax")
    n = 6

    def total(*arrays):
        return lib.xp.sum(CAUSAL[name](*arrays)[..., :n, :] ** 2)

    for x in lib.gradients(total, *lib.arrays(*inputs())):
        assert np.all(x[..., n:, :] == 0)
        assert np.all(np.isfinite(x))
        assert np.all(np.any(x[..., 1:n, :] != 0, axis=-1))


@pytest.mark.thorough("jax")
@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_by_differences(lib, blocks, name):
    if lib.name not in DIFFERENTIABLE:
        pytest.skip("for torch, jax")
    data, rng = inputs(lead=(2,)), np.random.default_rng(1)
    along = [rng.standard_normal(x.shape) for x in data]
    cotangent = rng.standard_normal((2, N, E))

    def total(*arrays):
        return lib.xp.sum(CAUSAL[name](*arrays) * lib.asarray(cotangent))

    gradients = lib.gradients(total, *lib.arrays(*data))
    slope = sum(np.sum(g * d) for g, d in zip(gradients, along, strict=True))
    ends = [
        float(lib.numpy(total(*lib.arrays(*(x + step * d for x, d in zip(data, along, strict=True))))))
        for step in (1e-5, -1e-5)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "eva unit" and "lara" not in name])
def test_padding_changes_nothing(lib, blocks, name):
    """And none of it is read; a query before which all is padding gets zeros.

    At the beginning it moves the borders of EVA's windows, and everywhere those of LARA's segments; one seed
    draws otherwise for another number of groups.
    """
    data = inputs()
    mask = np.arange(N) < 9
    start = 0 if name.startswith("eva") else 2
    mask[:start] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = [np.where(mask[:, None], x, np.nan) for x in data[1:]]
        out = lib.numpy(CAUSAL[name](*lib.arrays(data[0], *padded), key_mask=lib.asarray(mask)))
    alone = lib.numpy(CAUSAL[name](*lib.arrays(*(x[..., start:9, :] for x in data))))
    np.testing.assert_allclose(out[..., start:9, :], alone, rtol=1e-11)
    assert np.all(out[..., :start, :] == 0)


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_rfa_padded_on_the_left_is_its_definition(lib, blocks, size):
    """The first key of a block, which levels its features, may be padding, with a past and without."""
    q, k, v = inputs()
    w = draws()
    keep = ~np.isin(np.arange(N), [0, 5, 10, 11])
    hidden = [size * q, *(np.where(keep[:, None], x, np.nan) for x in (size * k, v))]
    out = lib.numpy(
        rfa(*lib.arrays(*hidden), noise=lib.asarray(w), key_mask=lib.asarray(keep), is_causal=True)
    )
    (q, k), root = (size * q, size * k), D**-0.25
    log_q, log_k = (np.einsum("...nd,...sd->...ns", root * x, w) for x in (q, k))
    log_k = log_k - root**2 * np.sum(k * k, axis=-1, keepdims=True) / 2
    pairs = np.logaddexp.reduce(log_q[..., :, None, :] + log_k[..., None, :, :], axis=-1)
    pairs = np.where(np.tri(N, dtype=bool) & keep, pairs, -np.inf)[..., 1:, :]
    weights = np.exp(pairs - pairs.max(axis=-1, keepdims=True))
    expected = weights @ v / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(out[..., keep, :], expected[..., keep[1:], :], rtol=1e-9)
    assert np.all(out[..., ~keep, :] == 0)


def test_gradients_in_single_precision_where_a_later_key_outweighs(lib):
    """A normalizer of e^44 and more, squared, is out of range."""
    if lib.name not in DIFFERENTIABLE:
        pytest.skip("for torch, jax")
    q, k, v = inputs(lead=())
    w = np.zeros((S, D))
    w[:, 0] = 12.0 + np.arange(S) / 8
    k[6, 0] = 12.0 * D**0.25

    def gradients(dtype):
        arrays = lib.arrays(q, k, v, w, dtype=dtype)

        def total(*qkv):
            return lib.xp.sum(rfa(*qkv, noise=arrays[3], is_causal=True) ** 2)

        return lib.gradients(total, *arrays[:3])

    for single, double in zip(gradients("float32"), gradients("float64"), strict=True):
        np.testing.assert_allclose(single, double, atol=1e-3 * np.abs(double).max())


@pytest.mark.parametrize("lead", [(), (3, 2)])
def test_noise_that_heads_share_and_noise_with_heads_of_its_own(lib, lead):
    arrays = inputs(lead=(2,))
    noise = np.random.default_rng(1).standard_normal((*lead, 4, D))
    everywhere = np.broadcast_to(noise, (*np.broadcast_shapes(lead, (2,)), 4, D))
    for call in (
        partial(rfa),
        partial(lara, window=4),
        partial(eva, window=4),
    ):
        shared = call(*lib.arrays(*arrays), noise=lib.asarray(noise), is_causal=True)
        lib.close(
            shared, lib.numpy(call(*lib.arrays(*arrays), noise=lib.asarray(everywhere), is_causal=True))
        )


def test_calls_without_a_meaning(lib):
    q, k, v = lib.arrays(*inputs())
    with pytest.raises(ValueError, match=r"is_causal: expected as many keys as queries \(14\), got 5"):
        rfa(q, k[..., :5, :], v[..., :5, :], rng=0, is_causal=True)
    with pytest.raises(ValueError, match="return_state: expected is_causal=True"):
        rfa(q, k, v, rng=0, return_state=True)
    with pytest.raises(ValueError, match=r"is_causal: expected as many keys as queries \(14\), got 5"):
        eva(q, k[..., :5, :], v[..., :5, :], window=0, is_causal=True)
    with pytest.raises(ValueError, match=r"group_size: expected a divisor of the window \(4\)"):
        eva(q, k, v, window=4, group_size=3, is_causal=True)
    with pytest.raises(ValueError, match="return_state: expected is_causal=True"):
        eva(q, k, v, return_state=True)
    with pytest.raises(ValueError, match="max_tokens: expected at least 14, got 13"):
        eva(q, k, v, is_causal=True, max_tokens=13)
    for options in ({"window": 0}, {"grid": (2, 7), "window": 4}, {"num_groups": 3}, {"disjoint": False}):
        with pytest.raises(ValueError, match="is_causal: "):
            eva(q, k, v, is_causal=True, **options)
    with pytest.raises(ValueError, match="grid: "):
        lara(q, k, v, rng=0, is_causal=True, grid=14)
    for options in ({"grid": (2, 7)}, {"normalize": "queries"}, {"weighting": "biased"}):
        with pytest.raises(ValueError, match="is_causal: "):
            lara(q, k, v, rng=0, is_causal=True, **options)
    with pytest.raises(ValueError, match="window: lara has one where is_causal=True"):
        lara(q, k, v, rng=0, window=4)
    with pytest.raises(ValueError, match=r"is_causal: expected as many keys as queries \(14\), got 5"):
        lara(q, k[..., :5, :], v[..., :5, :], rng=0, is_causal=True)
    with pytest.raises(NotImplementedError, match="is_causal: only features='positive'"):
        rfa(q, k, v, rng=0, features="trigonometric", is_causal=True)
