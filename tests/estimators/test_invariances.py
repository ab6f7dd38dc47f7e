"""Changes that must not change an answer: padding, the order of keys, where the scale is, blocks, leading axes."""

from functools import partial

import numpy as np
import pytest

from tests.helpers.blocks import make_small
from tests.helpers.calls import attend, eva, lara, merge, ra, rfa, softmax_attention
from tests.helpers.forms import ESTIMATORS

pytestmark = pytest.mark.mathematics

N, M, D, E, S = 12, 10, 4, 3, 6


def inputs(seed=0, lead=(2, 2), n=N, m=M):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, *size)) for size in ((n, D), (m, D), (m, E))]


def linear_estimators(lib, lead=(2, 2), n=N):
    """Estimators whose answer no padding or order of keys may change, with fixed draws."""
    rng = np.random.default_rng(1)
    noise = lib.asarray(rng.standard_normal((*lead, S, D)))
    each = lib.asarray(rng.standard_normal((*lead, 2, n, D)))
    uniforms = lib.asarray(rng.random((*lead, 2, n)))
    return {
        "softmax": softmax_attention,
        "rfa": lambda *a, **o: rfa(*a, noise=noise, **o),
        "trigonometric": lambda *a, **o: rfa(*a, noise=noise, features="trigonometric", **o),
        "ra": lambda *a, **o: ra(*a, noise=each, components=uniforms, **o),
    }


NAMES = ("softmax", "rfa", "trigonometric", "ra")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["before", "after", "between"])
def test_padding_keys_changes_nothing(lib, name, where):
    """Whatever the padded keys and values hold, NaN included."""
    q, k, v = inputs()
    pad = {"before": [0] * 4, "after": [M] * 4, "between": [0, 3, 3, 7]}[where]
    padded_k, padded_v = np.insert(k, pad, np.nan, axis=-2), np.insert(v, pad, np.inf, axis=-2)
    mask = np.insert(np.ones(M, dtype=bool), pad, False)
    estimator = linear_estimators(lib)[name]
    out = estimator(*lib.arrays(q, padded_k, padded_v), key_mask=lib.asarray(mask))
    lib.close(out, lib.numpy(estimator(*lib.arrays(q, k, v))))


def pooled_estimators():
    return {
        "lara": lambda *a, **o: lara(*a, num_landmarks=4, rng=0, **o),
        "lara landmarks": lambda *a, **o: lara(*a, num_landmarks=4, normalize="landmarks", rng=0, **o),
        "lara balance": lambda *a, **o: lara(
            *a, num_landmarks=4, weighting="balance", mix_keys=True, rng=0, **o
        ),
        "eva": lambda *a, **o: eva(*a, num_groups=4, window=4, rng=0, **o),
        "eva cut": lambda *a, **o: eva(*a, num_groups=4, window=5, rng=0, **o),
        "eva overlapping": lambda *a, **o: eva(*a, num_groups=4, window=4, disjoint=False, rng=0, **o),
    }


@pytest.mark.parametrize("name", pooled_estimators())
def test_what_lies_under_the_mask_is_never_read(lib, name):
    q, k, v = inputs(m=N)
    mask = np.random.default_rng(3).random((2, 1, N)) < 0.7
    estimator = pooled_estimators()[name]
    outs = []
    for fill in (0.0, np.nan, 1e30):
        hide = mask[..., None]
        arrays = lib.arrays(np.where(hide, q, fill), np.where(hide, k, fill), np.where(hide, v, fill))
        outs.append(lib.numpy(estimator(*arrays, key_mask=lib.asarray(mask))))
    kept = np.broadcast_to(mask[..., None], outs[0].shape)
    for out in outs[1:]:
        np.testing.assert_allclose(out[kept], outs[0][kept], rtol=1e-12)


@pytest.mark.parametrize("name", pooled_estimators())
def test_padding_whole_segments_changes_nothing(lib, name):
    """Four segments of three tokens, the last of them padding: as if there were three."""
    q, k, v = inputs(m=N)
    mask = np.arange(N) < 9
    noise = np.random.default_rng(4).standard_normal((4, D))
    options = {
        "lara": {"num_landmarks": 4},
        "lara landmarks": {"num_landmarks": 4, "normalize": "landmarks"},
        "lara balance": {"num_landmarks": 4, "weighting": "balance", "mix_keys": True},
        "eva": {"num_groups": 4, "window": 3},
        "eva cut": {"num_groups": 4, "window": 2},
        "eva overlapping": {"num_groups": 4, "window": 3, "disjoint": False},
    }[name]
    estimator = lara if name.startswith("lara") else eva
    out = estimator(*lib.arrays(q, k, v), noise=lib.asarray(noise), key_mask=lib.asarray(mask), **options)
    fewer = {key: 3 if value == 4 else value for key, value in options.items()}
    short = estimator(
        *lib.arrays(q[..., :9, :], k[..., :9, :], v[..., :9, :]), noise=lib.asarray(noise[:3]), **fewer
    )
    lib.close(out[..., :9, :], lib.numpy(short))


def test_query_mask_keeps_queries_out_of_landmarks(lib):
    q, k, v = inputs()
    mask = np.arange(N) % 4 != 1
    other = np.where(mask[:, None], q, 100.0)
    for options in ({"normalize": "queries"}, {"normalize": "landmarks"}, {"weighting": "balance"}):
        outs = [
            lib.numpy(
                lara(*lib.arrays(x, k, v), num_landmarks=3, query_mask=lib.asarray(mask), rng=0, **options)
            )
            for x in (q, other)
        ]
        np.testing.assert_allclose(outs[0][..., mask, :], outs[1][..., mask, :], rtol=1e-12)
    outs = [
        lib.numpy(eva(*lib.arrays(x, k, v), num_groups=3, window=0, query_mask=lib.asarray(mask), rng=0))
        for x in (q, other)
    ]
    np.testing.assert_allclose(outs[0][..., mask, :], outs[1][..., mask, :], rtol=1e-12)


def test_no_mask_on_queries_takes_keys_away(lib):
    """A landmark whose queries are all masked still stands for its keys."""
    q, k, v = inputs(m=N)
    half = np.arange(N) < N // 2
    for keys in (np.ones(N, dtype=bool), ~half):
        masks = {"query_mask": lib.asarray(half), "key_mask": lib.asarray(keys)}
        exact = lib.numpy(softmax_attention(*lib.arrays(q, k, v), **masks))[..., half, :]
        for estimator in (lara, partial(lara, weighting="balance"), partial(eva, window=0)):
            out = lib.numpy(estimator(*lib.arrays(q, k, v), rng=0, **masks))[..., half, :]
            assert np.linalg.norm(out - exact) < np.linalg.norm(exact)


def test_a_landmark_count_for_each_axis_goes_with_own_landmarks(lib):
    q, k, v = inputs(m=N)
    pair = tuple(lib.asarray(x[..., :4, :]) for x in (q, k))
    out = lara(*lib.arrays(q, k, v), grid=(3, 4), num_landmarks=(2, 2), landmarks=pair, rng=0)
    lib.close(out, lib.numpy(lara(*lib.arrays(q, k, v), landmarks=pair, rng=0)))


@pytest.mark.parametrize("name", ["softmax", "rfa", "trigonometric"])
def test_the_order_of_keys_does_not_matter(lib, name):
    q, k, v = inputs()
    order = np.random.default_rng(2).permutation(M)
    estimator = linear_estimators(lib)[name]
    out = estimator(*lib.arrays(q, k[..., order, :], v[..., order, :]))
    lib.close(out, lib.numpy(estimator(*lib.arrays(q, k, v))))


ALL = {
    "softmax": softmax_attention,
    "rfa": lambda *a, **o: rfa(*a, num_samples=S, rng=0, **o),
    "trigonometric": lambda *a, **o: rfa(*a, num_samples=S, features="trigonometric", rng=0, **o),
    "ra": lambda *a, **o: ra(*a, num_samples=2, rng=0, **o),
    **pooled_estimators(),
}


@pytest.mark.parametrize("name", ALL)
def test_the_scale_folds_into_queries_and_keys(lib, name):
    q, k, v = inputs(m=N)
    out = ALL[name](*lib.arrays(q, k, v), scale=0.25)
    lib.close(out, lib.numpy(ALL[name](*lib.arrays(0.5 * q, 0.5 * k, v), scale=1.0)))


@pytest.mark.parametrize("name", ALL)
def test_values_come_through_linearly(lib, name):
    """Constant values come out as they are: the weights add up to one. Values scale and shift along."""
    q, k, v = inputs(m=N)
    out, moved = (lib.numpy(ALL[name](*lib.arrays(q, k, x))) for x in (v, 3 * v - 2))
    np.testing.assert_allclose(moved, 3 * out - 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_grouped_queries_are_repeated_keys(lib, name):
    q, k, v = inputs(lead=(2, 4), m=N)
    mask = np.random.default_rng(7).random((2, 2, N)) < 0.8
    out = ALL[name](*lib.arrays(q, k[:, :2], v[:, :2]), enable_gqa=True, key_mask=lib.asarray(mask))
    repeated = (np.repeat(x[:, :2], 2, axis=1) for x in (k, v))
    expected = ALL[name](*lib.arrays(q, *repeated), key_mask=lib.asarray(np.repeat(mask, 2, axis=1)))
    assert tuple(out.shape) == (2, 4, N, E)
    lib.close(out, lib.numpy(expected))


@pytest.mark.parametrize("name", ALL)
def test_leading_axes_broadcast(lib, name):
    q, k, v = inputs(lead=(3, 2), m=N)
    k, v, mask = k[0, 0], v[:1], np.arange(N) < 11
    out = ALL[name](*lib.arrays(q, k, v), key_mask=lib.asarray(mask))
    full = (np.broadcast_to(x, (3, 2, *x.shape[-2:])) for x in (k, v))
    expected = ALL[name](*lib.arrays(q, *full), key_mask=lib.asarray(np.broadcast_to(mask, (3, 2, N))))
    lib.close(out, lib.numpy(expected))


def test_noise_can_have_more_axes_than_the_inputs(lib):
    """Replicates of the draws over the same inputs."""
    arrays = lib.arrays(*inputs(lead=(), m=N))
    noise = np.random.default_rng(5).standard_normal((7, 4, D))
    for estimator in (rfa, lara, partial(eva, window=3)):
        out = estimator(*arrays, noise=lib.asarray(noise))
        lib.close(out, np.stack([lib.numpy(estimator(*arrays, noise=lib.asarray(one))) for one in noise]))


@pytest.mark.parametrize("name", ["softmax", "rfa", "ra", "lara", "eva"])
def test_blocks_change_nothing(lib, name, monkeypatch):
    q, k, v = inputs(m=N)
    expected = lib.numpy(ALL[name](*lib.arrays(q, k, v)))
    make_small(monkeypatch)
    lib.close(ALL[name](*lib.arrays(q, k, v)), expected)


def test_causal_blocks_change_nothing(lib, monkeypatch):
    q, k, v = inputs(m=N)
    expected = lib.numpy(softmax_attention(*lib.arrays(q, k, v), is_causal=True))
    make_small(monkeypatch)
    lib.close(softmax_attention(*lib.arrays(q, k, v), is_causal=True), expected)


def test_merge_is_attention_over_the_union(lib):
    q, k, v = inputs()
    bias = np.random.default_rng(8).standard_normal((2, 2, M))
    whole = attend(*lib.arrays(q, k, v, bias))
    a, b, c = (
        attend(*lib.arrays(q, k[..., s, :], v[..., s, :], bias[..., s]))
        for s in (slice(0, 2), slice(2, 3), slice(3, M))
    )
    for order in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)):
        lib.close(order.out, lib.numpy(whole.out))
        lib.close(order.log_norm, lib.numpy(whole.log_norm))


def test_attend_is_what_it_says(lib):
    q, k, v = inputs()
    rng = np.random.default_rng(9)
    bias, pairs = rng.standard_normal((2, 1, M)), rng.standard_normal((2, N, M))
    out, log_norm = attend(*lib.arrays(q, k, v, bias), pair_bias=lib.asarray(pairs))
    logits = q @ k.swapaxes(-1, -2) + bias[..., None, :] + pairs
    weights = np.exp(logits)
    lib.close(out, weights @ v / weights.sum(axis=-1, keepdims=True))
    lib.close(log_norm, np.log(weights.sum(axis=-1)))


@pytest.mark.parametrize(
    "options", [{"num_groups": N, "window": 0}, {"num_groups": N, "window": 5}, {"window": N}]
)
@pytest.mark.parametrize("rng", [None, 0])
def test_eva_is_exact_at_its_ends(lib, options, rng):
    """One key a group, or one window over all keys; also under a mask."""
    q, k, v = inputs(m=N)
    for mask in (None, lib.asarray(np.arange(N) % 5 != 2)):
        exact = lib.numpy(softmax_attention(*lib.arrays(q, k, v), key_mask=mask))
        lib.close(eva(*lib.arrays(q, k, v), rng=rng, key_mask=mask, **options), exact, rtol=1e-10)


def test_identical_keys_leave_nothing_to_estimate(lib):
    """With one key everywhere all estimators are the mean of the values: a check of every normalizer."""
    q, _, v = inputs(m=N)
    k = np.full((2, 2, N, D), 0.3)
    mean = np.broadcast_to(v.mean(axis=-2, keepdims=True), (*v.shape[:-2], N, E))
    for name in ("softmax", "rfa", "ra", "lara", "lara balance", "eva without window"):
        if name == "eva without window":
            out = eva(*lib.arrays(q, k, v), num_groups=4, window=0, rng=0)
        else:
            out = ALL[name](*lib.arrays(q, k, v))
        lib.close(out, mean)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_empty_batch_gives_an_empty_batch(lib, blocks, name):
    """No sequence, or no head of one."""
    for lead in ((0,), (3, 0), (0, 2)):
        arrays = [lib.asarray(np.zeros((*lead, 10, size))) for size in (4, 4, 3)]
        assert tuple(ESTIMATORS[name](*arrays).shape) == (*lead, 10, 3)
