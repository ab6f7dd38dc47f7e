"""Half precision, large entries, rows with no key, NaN that must stay where it is."""

import warnings

import numpy as np
import pytest

from tests.helpers.calls import attend, merge, rfa
from tests.helpers.forms import ESTIMATORS

pytestmark = pytest.mark.mathematics

N, D, E = 12, 4, 3


def inputs(seed=0, lead=(2,)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, N, size)) for size in (D, D, E)]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_in_and_out(lib, name, dtype):
    """The result is the float32 one of the same inputs, rounded once."""
    if dtype not in lib.half:
        pytest.skip(f"{lib.name} has no {dtype}")
    half = lib.arrays(*inputs(), dtype=dtype)
    single = [lib.asarray(lib.numpy(x), "float32") for x in half]
    out = lib.check(ESTIMATORS[name](*half), half[0], (2, N, E))
    expected = lib.numpy(ESTIMATORS[name](*single))
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(out, expected, rtol=2 * step, atol=1e-6)


def test_half_precision_sums_do_not_saturate(lib):
    """Sums over many keys, that half precision itself would stop at 2048 or 256."""
    for dtype in lib.half:
        q, k = lib.arrays(np.zeros((1, D)), np.zeros((5000, D)), dtype=dtype)
        v = lib.asarray((np.arange(5000) % 2)[:, None], dtype)
        out, log_norm = attend(q, k, v)
        assert lib.numpy(out)[0, 0] == 0.5
        assert lib.numpy(log_norm)[0] == pytest.approx(np.log(5000), rel=1e-6)
        again = merge((out, log_norm), (out, log_norm))
        assert lib.numpy(again.log_norm)[0] == pytest.approx(np.log(10000), rel=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", [1e3, 3e4])
def test_large_entries_stay_within_the_values(lib, name, dtype, size):
    if dtype not in (*lib.half, "float32", "float64"):
        pytest.skip(f"{lib.name} has no {dtype}")
    q, k, v = inputs()
    arrays = lib.arrays(size * np.sign(q), size * np.sign(k), v, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = lib.numpy(ESTIMATORS[name](*arrays))
    low, high = (bound(lib.numpy(arrays[2]), axis=-2, keepdims=True) for bound in (np.min, np.max))
    slack = 1e-3 if dtype == "float16" else 1e-5
    assert np.all(np.isfinite(out))
    assert np.all((out >= low - slack) & (out <= high + slack))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_logits_far_from_zero_do_not_collapse(lib, name):
    """An additive epsilon would: keys of norm 40 on one side of the origin."""
    q, k, v = inputs()
    k = k + 20.0
    out = lib.numpy(ESTIMATORS[name](*lib.arrays(0.05 * q, k, v, dtype="float32")))
    exact = lib.numpy(ESTIMATORS[name](*lib.arrays(0.05 * q, k, v)))
    np.testing.assert_allclose(out, exact, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_key_left_gives_zeros_in_silence(lib, name):
    """In one sequence of a batch; the other is as if it were alone."""
    q, k, v = inputs()
    mask = np.stack([np.ones(N, dtype=bool), np.zeros(N, dtype=bool)])
    nan = np.where(mask[..., None], 0.0, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = lib.numpy(ESTIMATORS[name](*lib.arrays(q, k + nan, v + nan), key_mask=lib.asarray(mask)))
    assert np.all(out[1] == 0)
    np.testing.assert_allclose(out[0], lib.numpy(ESTIMATORS[name](*lib.arrays(q, k, v)))[0], rtol=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_key_left_is_its_value(lib, name):
    q, k, v = inputs()
    mask = np.arange(N) == 7
    masks = {"key_mask": lib.asarray(mask), "query_mask": lib.asarray(np.ones(N, dtype=bool))}
    out = lib.numpy(ESTIMATORS[name](*lib.arrays(q, k, v), **masks))
    first = 7 if "causal" in name else 0
    np.testing.assert_allclose(out[:, first:], np.broadcast_to(v[:, 7:8], out[:, first:].shape), rtol=1e-10)
    assert np.all(out[:, :first] == 0)


@pytest.mark.parametrize("name", ["softmax", "rfa positive", "ra"])
def test_a_nan_query_spoils_its_own_row_alone(lib, name):
    """Where it is no padding, so that it is read, and nothing is pooled."""
    q, k, v = inputs()
    q[:, 3] = np.nan
    out = lib.numpy(ESTIMATORS[name](*lib.arrays(q, k, v)))
    others = np.delete(np.arange(N), 3)
    assert np.all(np.isfinite(out[:, others]))
    assert np.all(np.isnan(out[:, 3]))


def test_the_empty_average_is_neutral_in_merge(lib):
    q, k, v = inputs()
    some = attend(*lib.arrays(q, k, v))
    none = attend(*lib.arrays(q, k, v), key_mask=lib.asarray(np.zeros(N, dtype=bool)))
    assert np.all(lib.numpy(none.log_norm) == -np.inf)
    for pair in ((some, none), (none, some)):
        both = merge(*pair)
        np.testing.assert_array_equal(lib.numpy(both.out), lib.numpy(some.out))
        np.testing.assert_allclose(lib.numpy(both.log_norm), lib.numpy(some.log_norm), rtol=1e-15)
    nothing = merge(none, none)
    assert np.all(lib.numpy(nothing.out) == 0)
    assert np.all(lib.numpy(nothing.log_norm) == -np.inf)


def test_a_bias_of_minus_infinity_takes_a_key_away(lib):
    q, k, v = inputs()
    bias = np.where(np.arange(N) < 5, 0.0, -np.inf)
    out, _ = attend(*lib.arrays(q, k, v, bias))
    lib.close(out, lib.numpy(attend(*lib.arrays(q, k[:, :5], v[:, :5])).out))


def test_trigonometric_range_is_that_of_the_keys_attended_to(lib):
    q, k, v = inputs()
    mask = np.arange(N) < 4
    v[:, 4:] = 1e6
    masks = {"key_mask": lib.asarray(mask), "query_mask": lib.asarray(np.ones(N, dtype=bool))}
    arrays = lib.arrays(5 * q, 5 * k, v)
    out = lib.numpy(rfa(*arrays, num_samples=2, features="trigonometric", rng=0, **masks))
    kept = v[:, :4]
    assert np.all(out >= kept.min(axis=1, keepdims=True))
    assert np.all(out <= kept.max(axis=1, keepdims=True))
