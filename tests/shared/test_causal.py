"""Causal attention and streaming: what comes later changes nothing, and steps give what one call gives."""

import warnings
from functools import partial

import numpy as np
import pytest
from array_api_compat import array_namespace

from randattn import RFAState, rfa_step
from tests.blocks import make_small
from tests.calls import eva, rfa, softmax_attention
from tests.reference import rfa_positive

N, D, E, S = 14, 4, 3, 8
CAUSAL = {
    "softmax": partial(softmax_attention, is_causal=True),
    "rfa": partial(rfa, num_samples=S, rng=0, is_causal=True),
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
    arrays = lib.arrays(*inputs())
    n = 6

    def total(*arrays):
        return lib.xp.sum(CAUSAL[name](*arrays)[..., :n, :] ** 2)

    if lib.name == "jax":
        import jax

        gradients = jax.grad(total, argnums=(0, 1, 2))(*arrays)
    else:
        import torch

        arrays = [x.requires_grad_() for x in arrays]
        gradients = torch.autograd.grad(total(*arrays), arrays)
    for x in map(lib.numpy, gradients):
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

    arrays = lib.arrays(*data)
    if lib.name == "jax":
        import jax

        gradients = jax.grad(total, argnums=(0, 1, 2))(*arrays)
    else:
        import torch

        arrays = [x.requires_grad_() for x in arrays]
        gradients = torch.autograd.grad(total(*arrays), arrays)
    slope = sum(np.sum(lib.numpy(g) * d) for g, d in zip(gradients, along, strict=True))
    ends = [
        float(lib.numpy(total(*lib.arrays(*(x + step * d for x, d in zip(data, along, strict=True))))))
        for step in (1e-5, -1e-5)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "eva unit"])
def test_padding_changes_nothing(lib, blocks, name):
    """And none of it is read; a query before which all is padding gets zeros.

    At the beginning it moves the borders of EVA's windows; one seed draws otherwise for another number of
    groups.
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


def stream(lib, arrays, cuts, **options):
    """A call on the first tokens, and steps of the others, cut at these places."""
    starts = [0, *cuts]
    parts = [
        [x[..., start:stop, :] for x in arrays] for start, stop in zip(starts, [*cuts, None], strict=True)
    ]
    out, state = rfa(*parts[0], is_causal=True, return_state=True, **options)
    outs = [out]
    for part in parts[1:]:
        out, state = rfa_step(*part, state, enable_gqa=options.get("enable_gqa", False))
        outs.append(out)
    return array_namespace(out).concat(outs, axis=-2), state


@pytest.mark.parametrize("cuts", [range(1, N), [5, 6, 12]])
def test_steps_give_what_one_call_gives(lib, blocks, cuts):
    arrays, noise = lib.arrays(*inputs()), lib.asarray(draws())
    whole, end = rfa(*arrays, noise=noise, is_causal=True, return_state=True)
    out, state = stream(lib, arrays, list(cuts), noise=noise)
    lib.close(out, lib.numpy(whole))
    assert isinstance(state, RFAState)
    for x, y in zip(state, end, strict=True):
        assert x.dtype == arrays[0].dtype
        lib.close(x, lib.numpy(y))


def test_steps_of_grouped_queries(lib):
    q, k, v = inputs(lead=(2, 6))
    arrays, noise = lib.arrays(q, k[:, :2], v[:, :2]), lib.asarray(draws((6,)))
    options = {"noise": noise, "enable_gqa": True, "scale": 0.3}
    whole = rfa(*arrays, is_causal=True, **options)
    out, state = stream(lib, arrays, [5, 9], **options)
    lib.close(out, lib.numpy(whole))
    assert tuple(state.out.shape) == (2, 6, S, E)
    repeated = lib.arrays(q, *(np.repeat(x[:, :2], 3, axis=1) for x in (k, v)))
    lib.close(rfa(*repeated, is_causal=True, noise=noise, scale=0.3), lib.numpy(whole))


def test_a_state_of_half_precision_is_in_float32(lib):
    for dtype in lib.half:
        arrays = lib.arrays(*inputs(), dtype=dtype)
        out, state = rfa(*arrays, rng=0, is_causal=True, return_state=True)
        step, again = rfa_step(*(x[..., -1:, :] for x in arrays), state)
        assert out.dtype == step.dtype == arrays[0].dtype
        assert state.out.dtype == again.out.dtype == lib.xp.float32


def test_padding_in_a_step(lib):
    q, k, v = inputs()
    _, state = rfa(*lib.arrays(q, k, v), rng=0, is_causal=True, return_state=True)
    hidden = lib.arrays(q[..., :2, :], k[..., :2, :] + np.nan, v[..., :2, :] + np.nan)
    _, after = rfa_step(*hidden, state, key_mask=lib.asarray(np.zeros(2, dtype=bool)))
    for x, y in zip(state, after, strict=True):
        lib.close(x, lib.numpy(y))


def test_a_scan_of_steps(lib):
    if lib.name != "jax":
        pytest.skip("for jax")
    import jax

    arrays, noise = lib.arrays(*inputs()), lib.asarray(draws())
    first = [x[..., :1, :] for x in arrays]
    _, start = rfa(*first, noise=noise, is_causal=True, return_state=True)

    def step(state, token):
        out, state = rfa_step(*(x[..., None, :] for x in token), state)
        return state, out

    tokens = [jax.numpy.moveaxis(x[..., 1:, :], -2, 0) for x in arrays]
    _, out = jax.jit(lambda state, tokens: jax.lax.scan(step, state, tokens))(start, tokens)
    whole = lib.numpy(rfa(*arrays, noise=noise, is_causal=True))
    lib.close(jax.numpy.moveaxis(out[..., 0, :], 0, -2), whole[..., 1:, :])


def test_states_that_do_not_fit(lib):
    arrays = lib.arrays(*inputs())
    _, state = rfa(*arrays, rng=0, is_causal=True, return_state=True)
    with pytest.raises(TypeError, match=r"state: expected one of rfa, RFAState, got tuple"):
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
    for options in ({"window": 0}, {"grid": (2, 7), "window": 4}, {"num_groups": 3}, {"disjoint": False}):
        with pytest.raises(ValueError, match="is_causal: "):
            eva(q, k, v, is_causal=True, **options)
    with pytest.raises(NotImplementedError, match="is_causal: features='trigonometric'"):
        rfa(q, k, v, rng=0, features="trigonometric", is_causal=True)
