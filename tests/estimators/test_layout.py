"""Arrays (..., N, H, D), JAX's layout: the same call with two axes swapped."""

import warnings
from functools import partial

import numpy as np
import pytest

from randattn import adaptive_eva_step, attend, diagnose, eva_step, rfa_step, softmax_attention
from randattn._core import inputs as randattn_inputs
from tests.helpers.calls import adaptive_eva, eva, lara, rfa
from tests.helpers.forms import ESTIMATORS, VARIANTS, beyond
from tests.helpers.refusals import refuses

B, H, N, D = 2, 3, 16, 4
TOKENS_FIRST = {"layout": "tokens_first"}


def inputs(n=N, heads=H):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, count, n, D)) for count in (H, heads, heads)]


def turned(*arrays):
    return [np.moveaxis(x, -3, -2) for x in arrays]


@pytest.mark.parametrize("name", beyond(ESTIMATORS, sorted(set(ESTIMATORS) - VARIANTS), "jax", "dask"))
def test_every_estimator(lib, name):
    if lib.name == "dask" and name.startswith("adaptive_eva"):
        pytest.skip("chunks choose keys of their own, and chunks of the other layout are other tokens")
    data = inputs()
    keep = np.random.default_rng(1).random((B, H, N)) < 0.8
    for mask, theirs in (
        (None, None),
        (keep[0, 0], keep[0, 0]),
        (keep, np.moveaxis(keep, 1, 2)),
        (keep[:, :1], keep[:, 0]),
    ):
        ours, given = (None if m is None else lib.asarray(np.ascontiguousarray(m)) for m in (mask, theirs))
        expected = lib.numpy(ESTIMATORS[name](*lib.arrays(*data), key_mask=ours))
        out = ESTIMATORS[name](*lib.arrays(*turned(*data)), key_mask=given, **TOKENS_FIRST)
        lib.close(out, np.moveaxis(expected, 1, 2), rtol=1e-10)


def test_query_masks_and_grouped_heads(lib):
    q, k, v = inputs(heads=1)
    mask = np.arange(N) < np.asarray([[9], [12]])
    for estimator in (softmax_attention, partial(lara, num_landmarks=4), partial(eva, window=4)):
        ours, theirs = lib.asarray(mask[:, None]), lib.asarray(mask)
        expected = estimator(*lib.arrays(q, k, v), query_mask=ours, enable_gqa=True)
        out = estimator(*lib.arrays(*turned(q, k, v)), query_mask=theirs, enable_gqa=True, **TOKENS_FIRST)
        lib.close(out, np.moveaxis(lib.numpy(expected), 1, 2), rtol=1e-10)


def test_the_norm_of_attend(lib):
    data = inputs()
    expected = attend(*lib.arrays(*data))
    found = attend(*lib.arrays(*turned(*data)), **TOKENS_FIRST)
    lib.close(found.out, np.moveaxis(lib.numpy(expected.out), 1, 2), rtol=1e-10)
    lib.close(found.log_norm, np.moveaxis(lib.numpy(expected.log_norm), 1, 2), rtol=1e-10)


@pytest.mark.only("numpy", "torch", "jax", "strict", "cupy")
@pytest.mark.parametrize(
    ("begin", "step"),
    [
        (partial(rfa, num_samples=8, rng=0), rfa_step),
        (partial(eva, window=4, max_tokens=N), eva_step),
        (partial(adaptive_eva, max_tokens=N), adaptive_eva_step),
    ],
)
def test_steps(lib, begin, step):
    data = lib.arrays(*inputs())
    theirs = lib.arrays(*turned(*inputs()))
    options = {"is_causal": True, "return_state": True}
    _, before = begin(*(x[:, :, :12, :] for x in data), **options)
    _, state = begin(*(x[:, :12, :, :] for x in theirs), **options, **TOKENS_FIRST)
    expected, _ = step(*(x[:, :, 12:, :] for x in data), before)
    out, _ = step(*(x[:, 12:, :, :] for x in theirs), state, **TOKENS_FIRST)
    lib.close(out, np.moveaxis(lib.numpy(expected), 1, 2), rtol=1e-10)


@pytest.mark.only("numpy", "torch", "jax", "strict", "cupy")
def test_diagnose(lib):
    data, mask = inputs(), np.arange(N) < np.asarray([[9], [12]])
    expected = diagnose(rfa, *lib.arrays(*data), rng=0, key_mask=lib.asarray(mask[:, None]))
    given = partial(rfa, **TOKENS_FIRST)
    found = diagnose(given, *lib.arrays(*turned(*data)), rng=0, key_mask=lib.asarray(mask))
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-6)
    lib.close(found.error, lib.numpy(expected.error), rtol=1e-6)


def test_errors(lib):
    arrays = lib.arrays(*inputs())
    with refuses(ValueError, "layout", "'heads_first', 'tokens_first'", "'bshd'"):
        softmax_attention(*arrays, layout="bshd")
    with refuses(ValueError, "q", "(..., tokens, heads, features)", "(16, 4)"):
        softmax_attention(*(x[0, 0, ...] for x in arrays), **TOKENS_FIRST)
    with refuses(ValueError, "key_mask", "(16,) or (2 or 1, 3 or 1, 16)"):
        mask = lib.asarray(np.ones((B, 3, 3, N), dtype=bool))
        softmax_attention(*lib.arrays(*turned(*inputs())), key_mask=mask, **TOKENS_FIRST)


def test_one_warning_where_tokens_look_like_heads(lib, monkeypatch):
    monkeypatch.setattr(randattn_inputs, "_is_warned", [])
    theirs = lib.arrays(*turned(*inputs()))
    with pytest.warns(
        UserWarning, match=r'16 heads of 3 tokens in shape \(2, 16, 3, 4\).*layout="tokens_first"'
    ):
        softmax_attention(*theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        softmax_attention(*theirs)
        monkeypatch.setattr(randattn_inputs, "_is_warned", [])
        # No mistake: few queries of many keys, arrays of three axes, and the layout that is said.
        q, k, v = lib.arrays(*inputs())
        softmax_attention(q[:, :, :1, :], k, v)
        softmax_attention(*(x[0, ...] for x in theirs))
        softmax_attention(*theirs, **TOKENS_FIRST)
