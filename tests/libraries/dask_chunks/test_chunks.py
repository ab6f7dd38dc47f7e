"""Dask arrays that are chunked along the tokens stay so: in the result, and in every task on the way."""

from __future__ import annotations

import tracemalloc
from functools import partial, reduce

import dask
import dask.array as da
import numpy as np
import pytest
from dask.callbacks import Callback

from randattn import adaptive_eva, attend, eva, lara, ra, rfa, softmax_attention
from randattn._core import average
from randattn._estimators.adaptive_eva import _of_shard
from randattn._estimators.adaptive_eva_options import resolved

N, D, E, CHUNK = 2000, 8, 5, 250

# Whose work and whose graph grow as the number of tokens.
LINEAR = {
    "rfa": partial(rfa, rng=0),
    "rfa trigonometric": partial(rfa, features="trigonometric", num_samples=4, rng=0),
    "lara optimal": partial(lara, rng=0),
    "lara landmarks": partial(lara, normalize="landmarks", antithetic=True, mix_keys=True, rng=0),
    "lara balance": partial(lara, weighting="balance", num_landmarks=40),
    "lara biased": partial(lara, weighting="biased", rng=0),
    "lara, segments longer than chunks": partial(lara, num_landmarks=3),
    "lara grid": partial(lara, num_landmarks=16, grid=(25, 80)),
    "eva": partial(eva, num_groups=40, window=50, rng=0),
    "eva, groups that windows cut": partial(eva, num_groups=37, window=64, rng=0),
    "eva, groups longer than chunks": partial(eva, num_groups=3, window=50, rng=0),
    "eva, cut and longer": partial(eva, num_groups=3, window=64),
    "eva overlapping": partial(eva, num_groups=37, window=64, disjoint=False, rng=0),
    "eva unit": partial(eva, num_groups=37, window=64, group_weight="unit"),
    "eva without a window": partial(eva, window=0, rng=0),
    "eva, a window as long as a chunk": partial(eva, num_groups=10, window=CHUNK + 3),
    "eva grid": partial(eva, num_groups=16, window=(10, 8), grid=(25, 80)),
}
CALLS = {
    **LINEAR,
    "eva causal": partial(eva, window=64, is_causal=True, rng=0),
    "softmax": softmax_attention,
    "softmax causal": partial(softmax_attention, is_causal=True),
}


MASKED = ("rfa", "rfa trigonometric", "lara optimal", "eva", "eva, cut and longer", "eva grid", "eva causal")


def calls(functions, *names):
    functions = {name: functions[name] for name in names or functions}
    return pytest.mark.parametrize("function", functions.values(), ids=functions)


@pytest.fixture(autouse=True)
def in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def inputs(n=N, dtype="float64", lead=(2,)):
    rng = np.random.Generator(np.random.Philox(7))
    shapes = (*lead, n, D), (*lead, n, D), (*lead, n, E)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def cut(x, *sizes):
    """The array in chunks; all of an axis for which there is no size."""
    return da.from_array(x, chunks=(*(-1,) * (x.ndim - len(sizes)), *sizes))


def normal(seed, n=N, features=D, chunk=CHUNK):
    return da.random.default_rng(seed).standard_normal((n, features), chunks=(chunk, features))


def never(block):
    raise AssertionError(f"a chunk of shape {block.shape} is computed")


def close(out, expected, dtype="float64"):
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert error < {"float64": 1e-11, "float32": 2e-5, "float16": 1e-3}[dtype]


class Largest(Callback):
    """The largest array that a task gives."""

    def __init__(self):
        self.size = 0

    def _posttask(self, key, result, *_):  # noqa: ARG002
        parts = result if isinstance(result, tuple) else (result,)
        self.size = max(self.size, *(getattr(part, "size", 0) for part in parts))


@calls(CALLS)
def test_nothing_is_computed_and_chunks_stay(function):
    q, k, v = (
        x.map_blocks(never, dtype=x.dtype, meta=np.empty((0,) * 3))
        for x in (cut(y, CHUNK, -1) for y in inputs())
    )
    out = function(q, k, v)
    assert isinstance(out, da.Array)
    assert out.shape == (2, N, E)
    assert out.dtype == q.dtype
    assert out.chunks[-2] == q.chunks[-2]


@calls(CALLS)
def test_the_same_as_numpy(function):
    """Queries and keys cut differently, with a short chunk at the end, heads and features cut too."""
    q, k, v = inputs()
    out = function(cut(q, 1, 600, 5), cut(k, 450, -1), cut(v, 2, 740, 2))
    assert out.chunks[-2] == cut(q, 600, -1).chunks[-2]
    close(out.compute(), function(q, k, v))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@calls(CALLS, "rfa", "lara optimal", "eva, groups that windows cut", "softmax")
def test_dtypes_stay(function, dtype):
    q, k, v = inputs(700, dtype)
    out = function(*(cut(x, CHUNK, -1) for x in (q, k, v)))
    result = out.compute()
    assert out.dtype == result.dtype == dtype
    close(result.astype("float64"), function(q, k, v), dtype)


@calls(CALLS, *MASKED, "softmax causal")
def test_masks_are_cut_too(function):
    """With NaN where the mask is False; shared by the heads, and cut differently."""
    q, k, v = inputs()
    mask = np.random.Generator(np.random.Philox(8)).random(N) < 0.7
    mask[250:550] = False
    k, v = (np.where(mask[:, None], x, np.nan) for x in (k, v))
    out = function(cut(q, CHUNK, -1), cut(k, CHUNK, -1), cut(v, CHUNK, -1), key_mask=cut(mask, 310))
    assert out.chunks[-2] == cut(q, CHUNK, -1).chunks[-2]
    close(out.compute(), function(q, k, v, key_mask=mask))


@calls(CALLS, "rfa", "lara optimal", "eva", "softmax causal")
def test_grouped_heads(function):
    (q, *_), (_, k, v) = inputs(600, lead=(4,)), inputs(600)
    out = function(cut(q, 100, -1), cut(k, 100, -1), cut(v, 100, -1), enable_gqa=True)
    assert out.chunks[-2] == (100,) * 6
    close(out.compute(), function(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attend_with_biases(is_causal):
    q, k, v = inputs(60)
    rng = np.random.Generator(np.random.Philox(9))
    bias, pair_bias = rng.standard_normal((2, 60)), rng.standard_normal((60, 60))
    expected = attend(q, k, v, bias, pair_bias=pair_bias, is_causal=is_causal)
    arrays = cut(q, 11, -1), cut(k, 7, -1), cut(v, 7, -1), cut(bias, 9)
    result = attend(*arrays, pair_bias=cut(pair_bias, 11, 13), is_causal=is_causal)
    for x, y in zip(result, expected, strict=True):
        assert x.shape == y.shape
        close(x.compute(), y)


def test_ra_is_lazy_and_the_same():
    q, k, v = inputs(120)
    out = ra(*(cut(x, 25, -1) for x in (q, k, v)), rng=0)
    assert out.numblocks[-2] > 1
    close(out.compute(), ra(q, k, v, rng=0))


@calls(LINEAR)
def test_no_task_gives_a_large_array(function):
    """Neither a quarter of the keys nor of N x C: what is not of one chunk is a few numbers of each."""
    with Largest() as largest:
        function(*(cut(x, CHUNK, -1) for x in inputs(lead=()))).mean(axis=0).compute()
    assert 0 < largest.size < N * D / 4


@calls(
    LINEAR, "rfa", "lara optimal", "eva", "eva, groups that windows cut", "eva without a window", "eva grid"
)
def test_the_graph_grows_as_the_number_of_chunks(function):
    """No task for each pair of chunks."""
    tasks = []
    for times in (2, 4):
        q, k, v = (normal(seed, times * N) for seed in range(3))
        if "grid" in function.keywords:
            function = partial(function, grid=(times * 25, 80))
        (out,) = dask.optimize(function(q, k, v))
        tasks.append(len(out.__dask_graph__()))
    assert tasks[1] < 2.5 * tasks[0]


def test_chunks_are_made_once():
    """However many chunks of queries they meet."""
    made = []

    def note(block, name):
        made.append(name)
        return block

    q, k, v = (
        cut(x, 20, -1).map_blocks(note, name, dtype=x.dtype, meta=np.empty((0,) * 3))
        for name, x in zip("qkv", inputs(100), strict=True)
    )
    softmax_attention(q, k, v).compute()
    assert sorted(made) == sorted("qkv" * 5)


@pytest.mark.parametrize(
    ("function", "share"),
    [
        (partial(rfa, rng=0), 0.5),
        (partial(lara, rng=0), 3),
        (partial(eva, rng=0), 4),
    ],
)
def test_peak_memory(function, share):
    """Against the keys' bytes: rfa never has them at once; what others need twice stays (q, k, v)."""
    n, chunk = 1 << 15, 1 << 11
    q, k, v = (normal(seed, n, 32, chunk) for seed in range(3))
    mean = function(q, k, v).mean(axis=0)
    normal(3, 4 * chunk, 32, chunk).mean(axis=0).compute()
    tracemalloc.start()
    mean.compute()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < share * k.nbytes


@pytest.mark.parametrize("num_exact", [90, 600])
@pytest.mark.parametrize("is_masked", [False, True])
def test_chunks_choose_keys_of_their_own(is_masked, num_exact):
    """Each has its share of the exact keys, and no task has two chunks of keys; exact with all keys."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 600, size)) for heads, size in ((4, D), (2, D), (2, E)))
    keep = np.arange(600) % 7 != 3 if is_masked else np.ones(600, dtype=bool)
    hidden = [np.where(keep[:, None], x, np.nan) for x in (k, v)]
    arrays = [
        da.from_array(x, chunks=(1, size, -1)) for x, size in ((q, 150), (hidden[0], 200), (hidden[1], 200))
    ]
    sizes = {"num_exact": num_exact, "group_size": 8, "block_size": 50}
    masks = {"key_mask": da.from_array(keep, chunks=75), "query_mask": da.ones(600, dtype=bool)}
    out = adaptive_eva(*arrays, **sizes, **masks, enable_gqa=True)
    assert out.chunks[-2] == (150,) * 4

    rule = (resolved(150, 200, 1, exact_heads=0, is_causal=False, **sizes), D**-0.5, 2, 600)
    found = []
    for rows in range(0, 600, 150):
        queries, parts = q.reshape(2, 2, 600, D)[:, :, rows : rows + 150], []
        for keys in (slice(0, 200), slice(200, 400), slice(400, 600)):
            k_part, v_part = (np.where(keep[keys, None], x[:, None, keys], 0) for x in (k, v))
            parts.append(_of_shard(rule, queries, k_part, v_part, keep[None, None, keys]))
        found.append(reduce(average.merge, parts).out.reshape(4, 150, E))
    np.testing.assert_allclose(out.compute(), np.concatenate(found, axis=1), rtol=1e-9, atol=1e-12)
    if num_exact == 600:
        exact = softmax_attention(
            q, k, v, key_mask=keep, query_mask=np.ones(600, dtype=bool), enable_gqa=True
        )
        np.testing.assert_allclose(out.compute(), exact, rtol=1e-9, atol=1e-12)


def test_no_steps_of_adaptive_eva():
    """A step appends to its state at once."""
    arrays = [da.from_array(x) for x in np.random.default_rng(0).standard_normal((3, 2, 40, 4))]
    with pytest.raises(NotImplementedError, match="adaptive_eva has no steps on Dask"):
        adaptive_eva(*arrays, is_causal=True, return_state=True)
