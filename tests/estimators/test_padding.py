"""Padded rows of queries: zeros, whatever they hold, and no gradient from or to them."""

from functools import partial

import numpy as np
import pytest

from randattn import eva_step, rfa_step
from tests.helpers import calls
from tests.helpers.blocks import make_small
from tests.helpers.forms import ESTIMATORS
from tests.tracing.test_tracing import functional

N, M, D, E = 11, 9, 4, 3
JUNK = (np.nan, np.inf, 1e30)
# Padding in front, within, and behind, another for each sequence.
REAL = np.array([[False, False, *[True] * 5, False, True, True, True], [*[True] * 7, *[False] * 4]])
# Queries and keys of two sequences.
CROSS = {
    "softmax": calls.softmax_attention,
    "attend": lambda *arrays, **options: calls.attend(*arrays, **options)[0],
    "rfa": partial(calls.rfa, num_samples=8, rng=0),
    "rfa optimal": partial(calls.rfa, num_samples=8, features="optimal", precondition=True, rng=0),
    "ra": partial(calls.ra, num_samples=2, rng=0),
    "lara": partial(calls.lara, num_landmarks=4, rng=0),
    "eva": partial(calls.eva, num_groups=4, window=0, rng=0),
    "adaptive_eva": partial(calls.adaptive_eva, group_size=4, num_exact=4, block_size=8),
}


def inputs(m=N, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, *size)) for size in ((N, D), (m, D), (m, E))]


def with_junk(x, real, junk):
    return np.where(real[..., None], x, junk)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_self_attention(lib, name, blocks, monkeypatch):
    """The key mask of as many keys as queries says of both which are padding."""
    if blocks:
        make_small(monkeypatch)
    data, mask = inputs(), lib.asarray(REAL)
    clean = lib.numpy(ESTIMATORS[name](*lib.arrays(*data), key_mask=mask))
    assert np.all(clean[~REAL] == 0)
    assert np.all(np.any(clean[REAL] != 0, axis=-1))
    for junk in JUNK:
        arrays = lib.arrays(*(with_junk(x, REAL, junk) for x in data))
        np.testing.assert_array_equal(lib.numpy(ESTIMATORS[name](*arrays, key_mask=mask)), clean)


@pytest.mark.parametrize("name", CROSS)
def test_a_query_mask_of_its_own(lib, name):
    data, keys = inputs(m=M), lib.asarray(np.arange(M) < M - 2)
    masks = {"query_mask": lib.asarray(REAL), "key_mask": keys}
    q, k, v = lib.arrays(with_junk(data[0], REAL, np.nan), *data[1:])
    out = lib.numpy(CROSS[name](q, k, v, **masks))
    np.testing.assert_array_equal(out, lib.numpy(CROSS[name](*lib.arrays(*data), **masks)))
    assert np.all(out[~REAL] == 0)
    assert np.all(np.any(out[REAL] != 0, axis=-1))


@pytest.mark.parametrize("name", ["softmax", "rfa", "ra"])
def test_as_many_queries_of_another_sequence(lib, name):
    """Where the query mask says that all are real, a key mask is of the keys alone."""
    data, keys = inputs(), np.arange(N) < 6
    masks = {"key_mask": lib.asarray(keys), "query_mask": lib.asarray(np.ones(N, dtype=bool))}
    q, k, v = lib.arrays(*data)
    out = lib.numpy(CROSS[name](q, k, v, **masks))
    # Without the last key, which is padding, there are not as many.
    fewer = CROSS[name](q, k[..., :-1, :], v[..., :-1, :], key_mask=lib.asarray(keys[:-1]))
    np.testing.assert_allclose(out, lib.numpy(fewer), rtol=1e-11)
    assert np.all(np.any(out != 0, axis=-1))


def test_attend_takes_keys_as_a_part(lib):
    """Its key mask says nothing of the queries: parts of a sequence may be as many keys, and are merged."""
    (q, k, v), n = inputs(), N // 2
    mask = np.arange(N) < 7
    q, k, v, keep = lib.arrays(q[:, :n], k, v, mask)
    parts = [
        calls.attend(q, k[:, at, :], v[:, at, :], key_mask=keep[at])
        for at in (slice(0, n), slice(n, 2 * n), slice(2 * n, N))
    ]
    out, log_norm = calls.merge(calls.merge(*parts[:2]), parts[2])
    whole = calls.attend(q, k, v, key_mask=keep)
    np.testing.assert_allclose(lib.numpy(out), lib.numpy(whole[0]), rtol=1e-11)
    np.testing.assert_allclose(lib.numpy(log_norm), lib.numpy(whole[1]), rtol=1e-11)


def test_attend_of_a_padded_query_is_neutral_in_merge(lib):
    q, k, v = inputs(m=M)
    arrays = lib.arrays(with_junk(q, REAL, np.nan), k, v)
    out, log_norm = calls.attend(*arrays, query_mask=lib.asarray(REAL))
    assert np.all(lib.numpy(out)[~REAL] == 0)
    assert np.all(lib.numpy(log_norm)[~REAL] == -np.inf)
    assert np.all(np.isfinite(lib.numpy(log_norm)[REAL]))


@pytest.mark.thorough("dask")
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", ["rfa", "eva"])
def test_steps(lib, name, junk):
    """New tokens of which some are padding, and the state that they leave."""
    options = {"rfa": {"num_samples": 8}, "eva": {"window": 4, "group_size": 2, "max_tokens": 2 * N}}[name]
    begin, step = {"rfa": (calls.rfa, rfa_step), "eva": (calls.eva, eva_step)}[name]
    first, data, mask = inputs(seed=1), inputs(), lib.asarray(REAL)

    def of(data):
        _, state = begin(*lib.arrays(*first), rng=0, is_causal=True, return_state=True, **options)
        return step(*lib.arrays(*data), state, key_mask=mask)

    out, state = of([with_junk(x, REAL, junk) for x in data])
    clean, expected = of(data)
    np.testing.assert_array_equal(lib.numpy(out), lib.numpy(clean))
    assert np.all(lib.numpy(out)[~REAL] == 0)
    for field, right in zip(state, expected, strict=True):
        np.testing.assert_array_equal(lib.numpy(field), lib.numpy(right))


@pytest.mark.only("torch", "jax")
@pytest.mark.thorough("jax")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients(lib, name):
    """Differentiate all rows of the result, padding too, with respect to all rows of all three arrays."""
    _, _, grad = functional(lib)
    mask, weights = lib.asarray(REAL), lib.asarray(np.random.default_rng(1).standard_normal((2, N, E)))

    slopes = grad(
        lambda *arrays: lib.xp.sum(weights * ESTIMATORS[name](*arrays, key_mask=mask)), argnums=(0, 1, 2)
    )
    clean = [lib.numpy(x) for x in slopes(*lib.arrays(*inputs()))]
    assert all(np.linalg.norm(x[REAL]) > 0 for x in clean)
    for junk in JUNK:
        found = slopes(*lib.arrays(*(with_junk(x, REAL, junk) for x in inputs())))
        for actual, expected in zip(found, clean, strict=True):
            assert np.all(lib.numpy(actual)[~REAL] == 0)
            np.testing.assert_allclose(lib.numpy(actual), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_by_autograd(lib, name):
    """The gradients of PyTorch's own graph, which other code makes than `torch.func`'s."""
    mask = lib.asarray(REAL)

    def gradients(data):
        leaves = [x.requires_grad_() for x in lib.arrays(*data)]
        ESTIMATORS[name](*leaves, key_mask=mask).sin().sum().backward()
        return [lib.numpy(x.grad) for x in leaves]

    found = gradients([with_junk(x, REAL, np.nan) for x in inputs()])
    for actual, expected in zip(found, gradients(inputs()), strict=True):
        assert np.all(actual[~REAL] == 0)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
