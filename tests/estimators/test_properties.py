"""Hypothesis over shapes, dtypes, masks and options: what holds for every call."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

# Not tests.helpers.calls: a program compiled for every shape would be slower than eager calls.
from randattn import eva, lara, ra, rfa, softmax_attention

pytestmark = pytest.mark.mathematics


@st.composite
def calls(draw, square=False):
    """An estimator with its options, and the sizes of its inputs."""
    n = draw(st.integers(1, 13))
    m = n if square else draw(st.sampled_from([n, draw(st.integers(1, 13))]))
    d, e = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    lead = draw(st.sampled_from([(), (2,), (2, 1), (0,)]))
    count = draw(st.integers(1, 16))
    grid = None
    if n == m and draw(st.booleans()):
        grid = draw(
            st.sampled_from(
                [(a, b, n // (a * b)) for a in range(1, n + 1) for b in range(1, n + 1) if n % (a * b) == 0]
            )
        )
        grid = grid if grid[2] > 1 else grid[:2]
    name = draw(st.sampled_from(["softmax", "rfa", "ra", "lara", "eva"]))
    rng = draw(st.sampled_from([None, 0, 1]))
    if name == "softmax":
        function = partial(softmax_attention, is_causal=n == m and draw(st.booleans()))
    elif name == "rfa":
        features, draws = (
            draw(st.sampled_from(["positive", "trigonometric"])),
            draw(st.sampled_from(["iid", "orthogonal"])),
        )
        function = partial(rfa, num_samples=count, features=features, draws=draws, rng=rng or 0)
    elif name == "ra":
        function = partial(ra, num_samples=min(count, 3), rng=rng or 0)
    elif name == "lara":
        weighting = draw(st.sampled_from(["optimal", "balance", "biased"]))
        normalize = draw(st.sampled_from(["queries", "landmarks"])) if weighting == "optimal" else None
        function = partial(lara, num_landmarks=count, weighting=weighting, rng=rng, grid=grid,
            normalize=normalize, mix_keys=draw(st.booleans()),
            antithetic=rng is not None and draw(st.booleans()))  # fmt: skip
    else:
        groups = draw(st.sampled_from(["num_groups", "group_size"]))
        window = draw(st.integers(0, 15)) if n == m else 0
        function = partial(eva, **{groups: count}, window=window, rng=rng, grid=grid,
            group_weight=draw(st.sampled_from(["size", "unit"])), disjoint=window == 0 or draw(st.booleans()))  # fmt: skip
    return function, (lead, n, m, d, e)


def inputs(sizes, seed, norm):
    lead, n, m, d, e = sizes
    rng = np.random.default_rng(seed)
    return [norm * rng.standard_normal((*lead, n, d)), norm * rng.standard_normal((*lead, m, d)),
        rng.standard_normal((*lead, m, e))]  # fmt: skip


@given(call=calls(), data=st.data(), seed=st.integers(0, 3), norm=st.sampled_from([0.1, 1.0, 30.0, 1e4]))
def test_every_call_gives_finite_averages_in_silence(lib, call, data, seed, norm):
    """Results have the library, dtype and shape of the inputs; they are within the values, zeros without a key."""
    function, sizes = call
    lead, n, m, _, e = sizes
    assume(lib.name != "dask" or 0 not in lead)  # Dask reduces no empty axis.
    dtype = data.draw(st.sampled_from(["float32", "float64", *lib.half]))
    mask = np.array(data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=m, max_size=m))))
    arrays = lib.arrays(*inputs(sizes, seed, min(norm, 1e3) if dtype == "float16" else norm), dtype=dtype)
    options = {} if mask.ndim == 0 else {"key_mask": lib.asarray(mask)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = lib.check(function(*arrays, **options), arrays[0], (*lead, n, e))
    kept = lib.numpy(arrays[2])[..., np.flatnonzero(mask) if mask.ndim else slice(None), :]
    assert np.all(np.isfinite(out))
    if mask.ndim and n == m:
        assert np.all(out[..., ~mask, :] == 0)
        out = out[..., mask, :]
    if kept.shape[-2] == 0:
        assert np.all(out == 0)
    elif out.size:
        if function.keywords.get("is_causal") and mask.ndim:
            # The first queries may see padding alone.
            kept = np.concatenate([kept, np.zeros_like(kept[..., :1, :])], axis=-2)
        slack = {"float64": 1e-9, "float32": 1e-4}.get(dtype, 2e-2)
        assert np.all(out >= kept.min(axis=-2, keepdims=True) - slack)
        assert np.all(out <= kept.max(axis=-2, keepdims=True) + slack)


@given(call=calls(), seed=st.integers(0, 3), norm=st.sampled_from([0.1, 1.0, 3.0]))
def test_every_call_gives_what_numpy_gives(lib, call, seed, norm):
    function, sizes = call
    assume(lib.name != "dask" or 0 not in sizes[0])
    data = inputs(sizes, seed, norm)
    expected = function(*data)
    for dtype, tolerance in (("float64", 1e-11), ("float32", 2e-5)):
        out = lib.numpy(function(*lib.arrays(*data, dtype=dtype)))
        if dtype == "float32":
            expected = function(*(x.astype(np.float32) for x in data))
        assert np.linalg.norm(out - expected) <= tolerance * max(np.linalg.norm(expected), 1e-3)
