"""Streaming: a state and steps give what one call gives."""

from functools import partial

import numpy as np
import pytest
from array_api_compat import array_namespace

from randattn import AdaptiveEVAState, EVAState, RFAState, adaptive_eva_step, eva_step, rfa_step
from tests.helpers.calls import adaptive_eva, eva, rfa
from tests.helpers.tokens import D, N, S, inputs


@pytest.mark.parametrize("name", ["rfa", "eva"])
def test_states_with_more_leading_axes_than_tokens(lib, name):
    """The leading axes of the draws are those of the state."""
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


def adaptive(*arrays, return_state=False, **options):
    """So few tokens are exact; tests/estimators/test_adaptive_steps.py has groups."""
    places = {"return_state": True, "max_tokens": N} if return_state else {}
    return adaptive_eva(*arrays, **places, **options)


STREAMS = {
    "rfa": (partial(rfa, num_samples=S, rng=0), rfa_step, RFAState),
    "eva": (partial(eva, window=4, group_size=2, max_tokens=N), eva_step, EVAState),
    "eva drawn": (partial(eva, window=6, group_size=3, rng=0, max_tokens=N), eva_step, EVAState),
    "eva unit": (partial(eva, window=4, group_weight="unit", rng=0, max_tokens=N), eva_step, EVAState),
    "adaptive_eva": (adaptive, adaptive_eva_step, AdaptiveEVAState),
}
# Dask has no steps of adaptive EVA.
NO_DASK = pytest.mark.only("numpy", "torch", "jax", "strict", "cupy")
ALL = [pytest.param(name, marks=NO_DASK if name == "adaptive_eva" else ()) for name in STREAMS]


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


@pytest.mark.parametrize("cuts", [pytest.param(range(1, N), marks=pytest.mark.thorough("jax")), [5, 6, 12]])
@pytest.mark.parametrize("name", ALL)
def test_steps_give_what_one_call_gives(lib, blocks, name, cuts):
    arrays = lib.arrays(*inputs())
    whole, end = STREAMS[name][0](*arrays, is_causal=True, return_state=True)
    out, state = stream(lib, name, arrays, list(cuts))
    lib.close(out, lib.numpy(whole))
    for x, y in zip(state, end, strict=True):
        assert (x.dtype, tuple(x.shape)) == (y.dtype, tuple(y.shape))
        if name == "rfa":
            lib.close(x, lib.numpy(y))


@pytest.mark.parametrize("name", ALL)
def test_steps_of_grouped_queries(lib, name):
    q, k, v = inputs(lead=(2, 6))
    arrays = lib.arrays(q, k[:, :2], v[:, :2])
    options = {"enable_gqa": True, "scale": 0.3}
    whole = STREAMS[name][0](*arrays, is_causal=True, **options)
    out, _ = stream(lib, name, arrays, [5, 9], **options)
    lib.close(out, lib.numpy(whole))
    repeated = lib.arrays(q, *(np.repeat(x[:, :2], 3, axis=1) for x in (k, v)))
    lib.close(STREAMS[name][0](*repeated, is_causal=True, scale=0.3), lib.numpy(whole))


@pytest.mark.parametrize("name", ALL)
def test_padding_in_steps(lib, name):
    data, mask = inputs(), np.ones((2, 1, N), dtype=bool)
    mask[0, 0, [0, 4, 5, 6, 7, 11]] = False
    hidden = [data[0], *(np.where(mask[..., None], x, np.nan) for x in data[1:])]
    arrays, seen = lib.arrays(*hidden), lib.asarray(mask)
    whole = STREAMS[name][0](*arrays, is_causal=True, key_mask=seen)
    out, _ = stream(lib, name, arrays, [3, 7, 12], mask=seen)
    lib.close(out, lib.numpy(whole))


@pytest.mark.parametrize("name", ALL)
def test_a_state_of_half_precision_is_in_float32(lib, name):
    call, step, _ = STREAMS[name]
    for dtype in lib.half:
        arrays = lib.arrays(*inputs(n=N - 1), dtype=dtype)
        out, state = call(*arrays, is_causal=True, return_state=True)
        one, again = step(*(x[..., -1:, :] for x in arrays), state)
        assert out.dtype == one.dtype == arrays[0].dtype
        for old, new in zip(state, again, strict=True):
            assert old.dtype == new.dtype
            assert old.dtype == lib.xp.float32 or "int" in str(old.dtype)


def test_eva_beyond_its_places(lib):
    arrays = lib.arrays(*inputs())
    _, state = eva(*arrays, window=4, is_causal=True, return_state=True)
    out, _ = eva_step(*arrays, state)
    # N = 14 in groups of 4 are 16 places.
    assert np.all(np.isfinite(lib.numpy(out)[..., :2, :]))
    assert np.all(np.isnan(lib.numpy(out)[..., 2:, :]))


@pytest.mark.parametrize("name", ALL)
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


def saved_and_loaded(lib, kind, state, path):
    """As docs/streaming.md says it for each library."""
    if lib.name == "torch":
        import torch

        torch.save(state._asdict(), path)
        return kind(**torch.load(path))
    if lib.name == "cupy":
        lib.xp.savez(path, **state._asdict())
        with lib.xp.load(path) as file:
            return kind(*(file[name] for name in kind._fields))
    if lib.name == "strict":
        np.savez(path, **{name: lib.numpy(x) for name, x in state._asdict().items()})
    elif lib.name == "dask":
        import dask

        np.savez(path, **dask.compute(state._asdict())[0])
    else:
        np.savez(path, **state._asdict())
    with np.load(path) as file:
        if lib.name == "numpy":
            return kind(**file)
        return kind(*(lib.xp.asarray(x) if lib.device is None else lib.asarray(x) for x in file.values()))


@pytest.mark.parametrize("name", ["rfa", "eva drawn"])
def test_a_state_goes_to_a_file_and_back(lib, name, tmp_path):
    arrays, (_, step, kind) = lib.arrays(*inputs()), STREAMS[name]
    _, state = stream(lib, name, [x[..., :9, :] for x in arrays], [5])
    loaded = saved_and_loaded(lib, kind, state, tmp_path / "state.npz")
    for field, before in zip(loaded, state, strict=True):
        assert field.dtype == before.dtype
        np.testing.assert_array_equal(lib.numpy(field), lib.numpy(before))
    later = [x[..., 9:, :] for x in arrays]
    # Dask's loaded arrays are in one chunk.
    lib.close(step(*later, loaded)[0], lib.numpy(step(*later, state)[0]))


@pytest.mark.only("torch")
def test_torch_load_refuses_the_class_of_a_state(lib, tmp_path):
    """The reason for `_asdict`; where this fails, docs/streaming.md can say less."""
    import pickle

    _, state = stream(lib, "rfa", lib.arrays(*inputs()), [5])
    lib.xp.save(state, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="RFAState"):
        lib.xp.load(tmp_path / "state.pt")
