"""Causal attention and streaming: what comes later changes nothing, and steps give what one call gives."""

import warnings
from functools import partial

import numpy as np
import pytest
from array_api_compat import array_namespace

from randattn import EVAState, RFAState, eva_step, rfa_step
from tests.blocks import make_small
from tests.calls import eva, lara, rfa, softmax_attention
from tests.reference import lara_causal, rfa_positive

N, D, E, S = 14, 4, 3, 8
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


def inputs(seed=0, lead=(2, 3), n=N):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, n, size)) for size in (D, D, E)]


def draws(lead=(2, 3)):
    return np.random.default_rng(7).standard_normal((*lead, S, D))


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """A few tokens in one block, or in several of them."""
    if request.param == "blocks":
        make_small(monkeypatch)


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
    lib.close(out, lara_causal(q, k, v, noise, keep=keep, **options))


@pytest.mark.parametrize("weighting", ["balance", "optimal"])
def test_lara_estimates_the_weight_of_what_is_before_the_window(lib, weighting):
    """Without bias. With the values 1 in a query's window and 0 before it, the result tells the estimate."""
    if lib.name != "numpy":
        pytest.skip("of NumPy's: the others agree with it")
    rng, window, n = np.random.default_rng(5), 4, 12
    q, k = 0.7 * rng.standard_normal((2, n, D))
    noise = rng.standard_normal((20_000, 3, D))
    # A clamped weight would be a bias: near segments have none.
    options = {"weighting": weighting, "alpha": 0.05, "scale": 1.0, "noise": noise, "window": window}
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
    np.testing.assert_allclose(out[..., 1:, :], weights @ v / weights.sum(axis=-1, keepdims=True), rtol=1e-9)
    assert np.all(out[..., 0, :] == 0)


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


@pytest.mark.parametrize("name", ["rfa", "eva"])
def test_states_with_more_leading_axes_than_tokens(lib, name):
    """Those of the draws."""
    arrays = lib.arrays(*inputs(lead=()))
    count = {"rfa": S, "eva": 4}[name]
    noise = lib.asarray(np.random.default_rng(1).standard_normal((3, count, D)))
    call, step = {"rfa": (rfa, rfa_step), "eva": (partial(eva, window=4, max_tokens=N), eva_step)}[name]
    whole = call(*arrays, noise=noise, is_causal=True)
    _, state = call(*(x[:9, :] for x in arrays), noise=noise, is_causal=True, return_state=True)
    out, _ = step(*(x[9:, :] for x in arrays), state)
    lib.close(out, lib.numpy(whole)[:, 9:, :])


@pytest.mark.parametrize("start", [3, 7])
def test_a_padded_query_of_nan_spoils_no_other_row_of_steps(lib, start):
    data, keep = inputs(lead=()), np.arange(N) != 5
    arrays = lib.arrays(*(np.where(keep[:, None], x, np.nan) for x in data))
    mask = lib.asarray(keep)
    options = {"window": 4, "group_size": 2, "max_tokens": N, "is_causal": True}
    _, state = eva(*(x[:start, :] for x in arrays), key_mask=mask[:start], return_state=True, **options)
    out, _ = eva_step(*(x[start:, :] for x in arrays), state, key_mask=mask[start:])
    whole = lib.numpy(eva(*lib.arrays(*data), key_mask=mask, **options))[start:]
    rows = keep[start:]
    np.testing.assert_allclose(lib.numpy(out)[rows], whole[rows], rtol=1e-11)


STREAMS = {
    "rfa": (partial(rfa, num_samples=S, rng=0), rfa_step, RFAState),
    "eva": (partial(eva, window=4, group_size=2, max_tokens=N), eva_step, EVAState),
    "eva drawn": (partial(eva, window=6, group_size=3, rng=0, max_tokens=N), eva_step, EVAState),
    "eva unit": (partial(eva, window=4, group_weight="unit", rng=0, max_tokens=N), eva_step, EVAState),
}


def stream(lib, name, arrays, cuts, mask=None, **options):
    """A call on the first tokens, and steps of the others, cut at these places."""
    call, step, kind = STREAMS[name]
    starts = [0, *cuts]
    outs, state = [], None
    for start, stop in zip(starts, [*cuts, None], strict=True):
        part = [x[..., start:stop, :] for x in arrays]
        seen = {} if mask is None else {"key_mask": mask[..., start:stop]}
        if state is None:
            out, state = call(*part, is_causal=True, return_state=True, **seen, **options)
        else:
            out, state = step(*part, state, enable_gqa=options.get("enable_gqa", False), **seen)
        outs.append(out)
    assert isinstance(state, kind)
    return array_namespace(out).concat(outs, axis=-2), state


@pytest.mark.parametrize("cuts", [range(1, N), [5, 6, 12]])
@pytest.mark.parametrize("name", STREAMS)
def test_steps_give_what_one_call_gives(lib, blocks, name, cuts):
    arrays = lib.arrays(*inputs())
    whole, end = STREAMS[name][0](*arrays, is_causal=True, return_state=True)
    out, state = stream(lib, name, arrays, list(cuts))
    lib.close(out, lib.numpy(whole))
    for x, y in zip(state, end, strict=True):
        assert (x.dtype, tuple(x.shape)) == (y.dtype, tuple(y.shape))
        if name == "rfa":
            lib.close(x, lib.numpy(y))


@pytest.mark.parametrize("name", STREAMS)
def test_steps_of_grouped_queries(lib, name):
    q, k, v = inputs(lead=(2, 6))
    arrays = lib.arrays(q, k[:, :2], v[:, :2])
    options = {"enable_gqa": True, "scale": 0.3}
    whole = STREAMS[name][0](*arrays, is_causal=True, **options)
    out, _ = stream(lib, name, arrays, [5, 9], **options)
    lib.close(out, lib.numpy(whole))
    repeated = lib.arrays(q, *(np.repeat(x[:, :2], 3, axis=1) for x in (k, v)))
    lib.close(STREAMS[name][0](*repeated, is_causal=True, scale=0.3), lib.numpy(whole))


@pytest.mark.parametrize("name", STREAMS)
def test_padding_in_steps(lib, name):
    data, mask = inputs(), np.ones((2, 1, N), dtype=bool)
    mask[0, 0, [0, 4, 5, 6, 7, 11]] = False
    hidden = [data[0], *(np.where(mask[..., None], x, np.nan) for x in data[1:])]
    arrays, seen = lib.arrays(*hidden), lib.asarray(mask)
    whole = STREAMS[name][0](*arrays, is_causal=True, key_mask=seen)
    out, _ = stream(lib, name, arrays, [3, 7, 12], mask=seen)
    lib.close(out, lib.numpy(whole))


@pytest.mark.parametrize("name", STREAMS)
def test_a_state_of_half_precision_is_in_float32(lib, name):
    call, step, _ = STREAMS[name]
    for dtype in lib.half:
        arrays = lib.arrays(*inputs(n=N - 1), dtype=dtype)
        out, state = call(*arrays, is_causal=True, return_state=True)
        one, again = step(*(x[..., -1:, :] for x in arrays), state)
        assert out.dtype == one.dtype == arrays[0].dtype
        for old, new in zip(state, again, strict=True):
            assert old.dtype == new.dtype
            assert old.dtype == lib.xp.float32 or old.ndim == 0


def test_eva_beyond_its_places(lib):
    arrays = lib.arrays(*inputs())
    _, state = eva(*arrays, window=4, is_causal=True, return_state=True)
    out, _ = eva_step(*arrays, state)
    # N = 14 in groups of 4 are 16 places.
    assert np.all(np.isfinite(lib.numpy(out)[..., :2, :]))
    assert np.all(np.isnan(lib.numpy(out)[..., 2:, :]))


@pytest.mark.parametrize("name", STREAMS)
def test_a_scan_of_steps(lib, name):
    if lib.name != "jax":
        pytest.skip("for jax")
    import jax

    call, take_step, _ = STREAMS[name]
    arrays = lib.arrays(*inputs())
    _, start = call(*(x[..., :1, :] for x in arrays), is_causal=True, return_state=True)

    def step(state, token):
        out, state = take_step(*(x[..., None, :] for x in token), state)
        return state, out

    tokens = [jax.numpy.moveaxis(x[..., 1:, :], -2, 0) for x in arrays]
    _, out = jax.jit(lambda state, tokens: jax.lax.scan(step, state, tokens))(start, tokens)
    whole = lib.numpy(call(*arrays, is_causal=True))
    lib.close(jax.numpy.moveaxis(out[..., 0, :], 0, -2), whole[..., 1:, :])


def test_states_that_do_not_fit(lib):
    arrays = lib.arrays(*inputs())
    _, state = rfa(*arrays, rng=0, is_causal=True, return_state=True)
    with pytest.raises(TypeError, match="state: expected one of eva, EVAState, got RFAState"):
        eva_step(*arrays, state)
    with pytest.raises(TypeError, match="state: expected one of rfa, RFAState, got tuple"):
        rfa_step(*arrays, tuple(state))
    with pytest.raises(ValueError, match=r"state\.frequencies: expected trailing axes"):
        rfa_step(*(x[..., :2] for x in arrays), state)
    with pytest.raises(ValueError, match=r"state\.frequencies: expected leading axes that hold \(2, 5\)"):
        rfa_step(*lib.arrays(*inputs(lead=(2, 5))), state)
    with pytest.raises(TypeError, match=r"state\.frequencies: expected dtype .*float32.*float64"):
        rfa_step(*lib.arrays(*inputs(), dtype="float32"), state)
    if lib.name != "numpy":
        foreign = RFAState(*map(lib.numpy, state))
        with pytest.raises(TypeError, match=r"state\.frequencies: expected an array of the library"):
            rfa_step(*arrays, foreign)


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
