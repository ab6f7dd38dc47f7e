"""`diagnose`: weights, rows, standard errors and entropies against the definitions, and what it advises."""

import threading
from dataclasses import replace
from functools import partial
from importlib.resources import files

import numpy as np
import pytest

from randattn import Diagnosis, adaptive_eva, diagnose, eva, lara, ra, rfa, softmax_attention
from randattn._core import block_sizes
from randattn._estimators import final_average
from randattn._study import diagnose as study
from randattn._study.advice import recommendation
from tests.helpers import reference

RNG = np.random.Generator(np.random.Philox(20221))
N, D, E = 16, 4, 3
Q, K, V = (RNG.standard_normal((2, N, size)) for size in (D, D, E))
NOISE = RNG.standard_normal((2, 5, D))
EYE = np.broadcast_to(np.eye(N), (2, N, N))
TOP = {"group_size": N // 4, "num_exact": N // 4, "block_size": N // 4}

# No Dask: its arrays are refused.
pytestmark = [pytest.mark.only("numpy", "torch", "jax", "cupy", "strict"), pytest.mark.mathematics]
# JAX compiles an eager call operation by operation: there the others show that it is no other.
not_on_jax = pytest.mark.only("numpy", "torch", "cupy", "strict")


def kish(weights):
    """Give the figures of rows of weights."""
    return weights.sum(axis=-1) ** 2 / (weights**2).sum(axis=-1)


def exact_rows(q=Q, k=K, keep=True):
    weights = np.exp(q @ np.swapaxes(k, -1, -2) * D**-0.5) * keep
    return weights / weights.sum(axis=-1, keepdims=True)


def of_draws(rows, w):
    """The weights of draws whose averages of keys give these rows."""
    _, k = reference.scaled(Q[0], K[0])
    averages = [
        [reference.f_and_z(one, k_, np.eye(N))[0] for one in w_]
        for k_, w_ in zip((k, k_of(1)), w, strict=True)
    ]
    return np.stack(
        [np.linalg.lstsq(np.array(f).T, r.T, rcond=None)[0].T for f, r in zip(averages, rows, strict=True)]
    )


def k_of(head):
    return reference.scaled(Q[head], K[head])[1]


def check_weights(lib, found, weights):
    """The three figures of these weights (..., N, S)."""
    lib.close(found.effective_samples, kish(weights), 1e-7)
    lib.close(found.largest_weight, (weights / weights.sum(axis=-1, keepdims=True)).max(axis=-1), 1e-7)
    np.testing.assert_array_equal(lib.numpy(found.num_weights), (weights > 0).sum(axis=-1))


def test_weights_of_draws(lib):
    """From the rows of the independent reference: they are averages by the draws' weights."""
    arrays = lib.arrays(Q, K, V)
    found = diagnose(rfa, *arrays, noise=lib.asarray(NOISE))
    check_weights(lib, found, of_draws(reference.rfa_positive(Q, K, EYE, NOISE), NOISE))
    found = diagnose(lara, *arrays, noise=lib.asarray(NOISE))
    w = []
    for head in range(2):
        q, k = reference.scaled(Q[head], K[head])
        parts = reference.segments(N, 5)
        w.append([q[s].mean(axis=0) + k[s].mean(axis=0) + e for s, e in zip(parts, NOISE[head], strict=True)])
    for options in ({}, {"weighting": "balance"}):
        found = diagnose(lara, *arrays, noise=lib.asarray(NOISE), **options)
        check_weights(lib, found, of_draws(reference.lara(Q, K, EYE, NOISE, **options), np.array(w)))


@not_on_jax
def test_weights_of_keys_and_groups(lib):
    """EVA's window of a query is its group of four: a weight for each key of it and each other group."""
    arrays = lib.arrays(Q, K, V)
    parts = np.arange(N).reshape(4, 4)
    rows = reference.eva(Q, K, EYE, np.zeros((2, 4, D)), groups=parts, window=lambda n: parts[n // 4])
    group = np.arange(N) // 4
    weights = []
    for head in rows:
        for n, row in enumerate(head):
            others = [row[group == c].sum() for c in range(4) if c != group[n]]
            weights.append([*row[group == group[n]], *others])
    check_weights(lib, diagnose(eva, *arrays, num_groups=4, window=4), np.reshape(weights, (2, N, 7)))
    causal = diagnose(eva, *arrays, group_size=4, window=4, is_causal=True)
    np.testing.assert_array_equal(lib.numpy(causal.num_weights)[0], np.arange(N) % 4 + 1 + np.arange(N) // 4)


@not_on_jax
def test_weights_where_all_keys_are_exact(lib):
    found = diagnose(adaptive_eva, *lib.arrays(Q, K, V), **{**TOP, "num_exact": N})
    check_weights(lib, found, exact_rows())
    found = diagnose(softmax_attention, *lib.arrays(Q, K, V), is_causal=True)
    check_weights(lib, found, exact_rows(keep=np.tri(N)))


@not_on_jax
@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (softmax_attention, {"is_causal": True}),
        (rfa, {"num_samples": 5, "rng": 0}),
        (rfa, {"num_samples": 5, "rng": 0, "is_causal": True}),
        (ra, {"num_samples": 2, "rng": 0}),
        (lara, {"num_landmarks": 5, "rng": 0}),
        (eva, {"num_groups": 5, "window": 3, "rng": 0}),
        (adaptive_eva, TOP),
    ],
)
def test_rows_are_what_results_are_of_values(lib, monkeypatch, estimator, options):
    monkeypatch.setattr(study, "_AT_HAND", 5 * 2 * N)  # five columns at a time
    *arrays, mask = lib.arrays(Q, K, V, np.arange(N) < N - 2)
    found = diagnose(estimator, *arrays, key_mask=mask, **options)
    rows = lib.numpy(found.rows)
    assert rows.shape == (2, N, N)
    own = {**options, "rng": study.spawned(0, 8, None)[0]} if "rng" in options else options
    lib.close(estimator(*arrays, key_mask=mask, **own), rows @ V, 1e-9)
    assert np.all(rows[..., -2:] == 0)
    if options.get("is_causal"):
        assert np.all(np.triu(rows, 1) == 0)
    if estimator is softmax_attention:
        kept = np.arange(N) < N - 2
        lib.close(found.rows, exact_rows(keep=np.tri(N) * kept) * kept[:, None], 1e-9)


@not_on_jax
def test_no_number_that_is_not_computed(lib):
    """Signed features are cut to the values' range: no weighting; RA's draws weigh the same."""
    arrays = lib.arrays(3 * Q, 3 * K, V)
    signed = diagnose(rfa, *arrays, features="trigonometric", num_samples=4, rng=0)
    assert signed.rows is None
    assert signed.effective_samples is signed.largest_weight is signed.num_weights is None
    equal = diagnose(ra, *arrays, rng=0, num_replicates=2)
    assert equal.effective_samples is None
    assert equal.rows is not None
    still = diagnose(lara, *arrays, num_landmarks=4)
    assert still.standard_error is still.relative_standard_error is None
    assert still.effective_samples is not None
    causal = diagnose(lara, *arrays, num_landmarks=4, is_causal=True, window=4)
    assert causal.effective_samples is None
    assert diagnose(softmax_attention, *arrays).alternative is None
    assert diagnose(adaptive_eva, *arrays, **TOP).alternative_error is None


def test_standard_error_is_that_of_independent_calls(lib):
    q, k, v = lib.arrays(Q[:1], K[:1], V[:1])
    found = diagnose(rfa, q, k, v, num_samples=4, rng=lib.generator(5), num_replicates=64)
    again = np.stack([lib.numpy(rfa(q, k, v, num_samples=4, rng=seed)) for seed in range(64)])
    # Sums of 16 x 3 variances with 63 degrees of freedom each.
    total, other = (lib.numpy(found.standard_error) ** 2).sum(), again.var(axis=0, ddof=1).sum()
    assert 0.6 < total / other < 1.6
    exact = exact_rows(Q[:1], K[:1]) @ V[:1]
    wrong = ((again - exact) ** 2).sum(axis=-1).mean(axis=0)
    assert 0.6 < (lib.numpy(found.error) ** 2).sum() / wrong.sum() < 1.6
    relative = np.sqrt(total) / np.linalg.norm(exact)
    assert found.relative_standard_error == pytest.approx(relative, rel=1e-6)


@not_on_jax
def test_error_and_entropy_of_exact_rows(lib):
    """With grouped heads, padding, some of the queries, and the causal form."""
    q = np.concatenate([Q, -Q])
    *arrays, mask = lib.arrays(q, K, V, np.arange(N) % 5 != 1)
    found = diagnose(eva, *arrays, key_mask=mask, enable_gqa=True, num_groups=4, window=0, queries=[3, 7, 1])
    k, v, keep = np.repeat(K, 2, axis=0), np.repeat(V, 2, axis=0), np.arange(N) % 5 != 1
    rows = exact_rows(q, k, keep)
    # Query 1 is padding.
    entropy = -np.sum(rows * np.log(np.where(rows > 0, rows, 1)), axis=-1)[:, [3, 7, 1]]
    rows[:, 1] = 0.0
    lib.close(found.entropy[:, :2], entropy[:, :2], 1e-9)
    assert np.all(np.isnan(lib.numpy(found.entropy)[:, 2]))
    out = lib.numpy(eva(*arrays, key_mask=mask, enable_gqa=True, num_groups=4, window=0))
    wrong = (out - rows @ v)[:, [3, 7, 1]]
    lib.close(found.error, np.linalg.norm(wrong, axis=-1), 1e-9)
    assert found.queries == (3, 7, 1)
    assert tuple(found.rows.shape) == (4, 3, N)
    assert tuple(found.effective_samples.shape) == (4, N)
    relative = np.linalg.norm(wrong[:, :2]) / np.linalg.norm((rows @ v)[:, [3, 7]])
    assert found.relative_error == pytest.approx(relative, rel=1e-9)
    mean = v[:, keep].mean(axis=1, keepdims=True) - (rows @ v)[:, [3, 7]]
    assert found.mean_error == pytest.approx(
        np.linalg.norm(mean) / np.linalg.norm((rows @ v)[:, [3, 7]]), rel=1e-9
    )

    rows = exact_rows(keep=np.tri(N))
    found = diagnose(eva, *lib.arrays(Q, K, V), is_causal=True, window=N)
    lib.close(found.entropy, -np.sum(rows * np.log(np.where(rows > 0, rows, 1)), axis=-1), 1e-9)
    assert found.relative_error < 1e-12
    trivial = np.cumsum(V, axis=1) / np.arange(1, N + 1)[:, None] - rows @ V
    assert found.mean_error == pytest.approx(np.linalg.norm(trivial) / np.linalg.norm(rows @ V), rel=1e-9)


@not_on_jax
def test_no_key_left(lib):
    *arrays, mask = lib.arrays(Q, K, V, np.zeros(N, dtype=bool))
    found = diagnose(softmax_attention, *arrays, key_mask=mask)
    assert np.all(np.isnan(lib.numpy(found.entropy)))
    assert np.all(lib.numpy(found.effective_samples) == 0)
    assert np.isnan(found.relative_error)
    assert "relative to" in diagnose(rfa, *arrays, key_mask=mask, rng=0, num_samples=4).recommendation


@not_on_jax
def test_many_pairs_are_looked_at_in_part(lib, monkeypatch):
    arrays = lib.arrays(Q, K, V)
    whole = diagnose(rfa, *arrays, num_samples=4, rng=0)
    monkeypatch.setattr(study, "_MOST_PAIRS", 2 * N * N - 1)
    monkeypatch.setattr(study, "_MOST_PAIRS_BESIDE", 2 * N * N - 1)
    monkeypatch.setattr(study, "_FEW_QUERIES", 4)
    part = diagnose(rfa, *arrays, num_samples=4, rng=0)
    assert part.queries == (0, 4, 8, 12)
    assert part.rows is part.alternative is None
    lib.close(part.entropy, lib.numpy(whole.entropy)[:, ::4], 1e-9)
    lib.close(part.error, lib.numpy(whole.error)[:, ::4], 1e-9)
    lib.close(part.effective_samples, lib.numpy(whole.effective_samples), 1e-9)


def sample(lib):
    with files("randattn").joinpath("data/attention_inputs.npz").open("rb") as file:
        data = np.load(file)
        return lib.arrays(*(data[name][:2, :, ::2] for name in "qkv"), dtype="float32"), float(data["scale"])


@not_on_jax
def test_advice(lib, monkeypatch):
    arrays, scale = sample(lib)
    short = diagnose(eva, *arrays, scale=scale)
    # For few keys adaptive_eva would be exact attention.
    assert short.alternative_error is None
    assert "use" not in short.recommendation
    monkeypatch.setattr(block_sizes, "ADAPTIVE_KEYS", 100)
    found = diagnose(partial(rfa, num_samples=64), *arrays, scale=scale, rng=0, num_replicates=2)
    assert isinstance(found, Diagnosis)
    assert found.relative_error > found.mean_error > 2 * found.alternative_error
    assert found.recommendation.startswith("rfa would be worse than mean(V) here (relative error")
    assert "use adaptive_eva(), which errs by" in found.recommendation
    between = diagnose(partial(eva, num_groups=2), *arrays, scale=scale)
    assert 2 * between.alternative_error < between.relative_error < between.mean_error
    assert between.recommendation.startswith("eva errs by ")
    assert "use adaptive_eva()" in between.recommendation
    good = diagnose(adaptive_eva, *arrays, scale=scale)
    assert good.relative_error == pytest.approx(found.alternative_error, rel=1e-3)
    assert "use" not in good.recommendation
    # A call that errs by half is no advice, though it is better than both.
    bad = replace(found, relative_error=1.5, mean_error=0.9, alternative_error=0.5)
    assert recommendation(bad, 4097, is_exact=False).endswith(": use softmax_attention.")
    monkeypatch.undo()
    assert recommendation(bad, 4096, is_exact=False).endswith("; adaptive_eva pays from 4,096 tokens on.")
    assert diagnose(softmax_attention, *arrays, scale=scale).recommendation == "softmax_attention is exact."
    # Where nothing that was measured is better, exact attention is.
    worse = diagnose(lambda q, k, v: -v, *arrays)
    assert worse.estimator == "<lambda>"
    assert "use " in worse.recommendation
    drawn = diagnose(eva, *arrays, scale=scale, is_causal=True, window=128, group_size=32, rng=0)
    share = (drawn.relative_standard_error / drawn.relative_error) ** 2
    assert drawn.recommendation.endswith(
        f"; {share:.0%} of its mean square comes from the draws, the rest is bias."
    )


def test_a_callers_own_function_is_left_alone(lib):
    """Columns beside its results would stay in a program that it compiles."""
    seen = []

    def own(q, k, v, **options):
        out = rfa(q, k, v, num_samples=4, **options)
        seen.append((v.shape[-1], out.shape[-1]))
        return out

    found = diagnose(own, *lib.arrays(Q, K, V), rng=0, num_replicates=3)
    assert found.estimator == "own"
    assert found.effective_samples is None
    assert found.relative_standard_error > 0
    assert all(values == columns for values, columns in seen)


def test_others_see_nothing_of_it(lib):
    """Another thread's results have their own columns while one is looked at."""
    arrays = lib.arrays(Q, K, V)
    shapes = []
    with final_average.watched():
        thread = threading.Thread(target=lambda: shapes.append(eva(*arrays, num_groups=4).shape))
        thread.start()
        thread.join()
        assert eva(*arrays, num_groups=4).shape[-1] > E
    assert tuple(shapes[0]) == tuple(eva(*arrays, num_groups=4).shape) == (2, N, E)


@not_on_jax
def test_advice_is_of_the_function_and_its_error(lib):
    arrays = lib.arrays(Q, K, V)

    def wrong(q, k, v):
        return -softmax_attention(q, k, v)

    wrong.__name__ = "softmax_attention"
    assert "would be worse than mean(V)" in diagnose(wrong, *arrays).recommendation
    one_key = lib.arrays(Q[:, :1], K[:, :1], V[:, :1])
    assert diagnose(eva, *one_key, window=0).recommendation.startswith("eva errs by 0 here")
    bound = partial(lambda factor, q, k, v: factor * softmax_attention(q, k, v), 1.0)
    assert diagnose(bound, *arrays).relative_error < 1e-9


@pytest.mark.only("torch")
def test_autocast_is_left_outside(lib):
    q, k, v = lib.arrays(Q, K, V, dtype="float32")
    with lib.xp.autocast(lib.device.type, lib.xp.bfloat16):
        found = diagnose(softmax_attention, q, k, v)
    assert found.relative_error < 1e-6
    assert found.entropy.dtype == lib.xp.float32
    learned = lib.asarray(np.zeros((4, 4))).requires_grad_()
    q, k, v = lib.arrays(Q, K, V)
    assert not diagnose(eva, q, k, v, window=4, num_groups=4, window_bias=learned).error.requires_grad


def test_refusals(lib):
    arrays = lib.arrays(Q, K, V)
    with pytest.raises(ValueError, match="at least one head"):
        diagnose(softmax_attention, *lib.arrays(Q[:0], K[:0], V[:0]))
    with pytest.raises(TypeError, match="estimator: expected a function"):
        diagnose("rfa", *arrays)
    with pytest.raises(TypeError, match="expected one array"):
        diagnose(rfa, *arrays, rng=0, is_causal=True, return_state=True)
    with pytest.raises(ValueError, match="num_replicates: expected at least 2"):
        diagnose(rfa, *arrays, rng=0, num_replicates=1)
    with pytest.raises(ValueError, match="queries: expected some in range"):
        diagnose(rfa, *arrays, rng=0, queries=[N])
    with pytest.raises(ValueError, match="queries: expected some in range"):
        diagnose(rfa, *arrays, rng=0, queries=[])
    with pytest.raises(ValueError, match="at least 0"):
        diagnose(rfa, *arrays, rng=-1)
    with pytest.raises(TypeError, match="rng: expected an int seed"):
        diagnose(rfa, *arrays, rng="seed")
    with pytest.raises(ValueError, match="needs draws"):
        diagnose(rfa, *arrays)


@pytest.mark.only("dask")
def test_dask_is_refused(lib):
    with pytest.raises(TypeError, match="in memory"):
        diagnose(softmax_attention, *lib.arrays(Q, K, V))
