"""Adaptive EVA: exact where mathematics says so, and its definition elsewhere, written with every pair's weight."""

import numpy as np
import pytest

from randattn._backends.dispatch import backend_of
from tests.helpers.calls import adaptive_eva

pytestmark = pytest.mark.mathematics

N, D, E = 48, 12, 3
LEAD = (2,)


def inputs(n=N, m=N, seed=0, lead=LEAD):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, *shape)) for shape in ((n, D), (m, D), (m, E))]


def exactly(q, k, v):
    logits = q @ np.swapaxes(k, -1, -2) / np.sqrt(D)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def by_pairs(q, k, v, labels, exact):
    """The definition with every pair's weight; of one head. `exact` (N, M)."""
    q, k = q / D**0.25, k / D**0.25
    mu = q.mean(axis=0)
    weights = np.zeros((len(q), len(k)))
    for label in np.unique(labels):
        own = labels == label
        of_keys = np.exp(k[own] @ mu)
        share = of_keys / of_keys.sum()
        total = np.exp((q - mu) @ (share @ k[own])) * of_keys.sum()
        weights[:, own] = total[:, None] * share
    weights = np.where(exact, np.exp(q @ k.T), weights)
    return weights @ v / weights.sum(axis=1, keepdims=True)


KINDS = ("tree", "segments", "labels")


def options_of(lib, kind, lead=LEAD, m=N):
    """Groups of each kind: at most 6."""
    size = -(-m // 6)
    labels = np.random.default_rng(3).integers(0, 5, (*lead, m))
    return {"group_size": size, "groups": lib.asarray(labels) if kind == "labels" else kind}


@pytest.mark.parametrize("kind", KINDS)
def test_all_keys_exact_is_attention(lib, kind):
    data = inputs()
    out = adaptive_eva(*lib.arrays(*data), num_exact=N, **options_of(lib, kind))
    lib.close(out, exactly(*data), rtol=1e-10)


def test_labels_may_be_of_few_bits(lib):
    """Fewer than the number of groups takes."""
    arrays, labels = lib.arrays(*inputs(m=300)), np.arange(300) % 100
    expected, out = (
        lib.numpy(adaptive_eva(*arrays, groups=lib.asarray(labels, dtype), group_size=1, num_exact=6))
        for dtype in ("int64", "int8")
    )
    lib.close(lib.asarray(out), expected)


def test_groups_of_one_key_are_attention(lib):
    data = [x[..., :32, :] for x in inputs()]
    for groups in (lib.asarray(np.arange(32)), "segments", "tree"):
        out = adaptive_eva(*lib.arrays(*data), groups=groups, group_size=1, num_exact=2)
        lib.close(out, exactly(*data), rtol=1e-10)


@pytest.mark.parametrize("kind", ["segments", "labels"])
def test_groups_and_chosen_keys_are_their_definition(lib, kind):
    """One block of all queries chooses; of which keys, the definition tells."""
    data = inputs(lead=())
    labels = np.repeat(np.arange(6), N // 6)
    groups = "segments"
    if kind == "labels":
        labels = np.random.default_rng(3).permutation(labels)
        groups = lib.asarray(labels)
    options = {"group_size": N // 6, "num_exact": 2, "block_size": N}
    out = lib.numpy(adaptive_eva(*lib.arrays(*data), groups=groups, **options))
    errors = {}
    for first in range(N):
        for second in range(first):
            exact = np.isin(np.arange(N), [first, second])[None, :]
            errors[first, second] = np.abs(by_pairs(*data, labels, exact) - out).max()
    best, second, *_ = sorted(errors.values())
    assert best < 1e-12
    assert second > 1e-6


def test_shortlists_for_queries_all_alike(lib):
    """Where blocks about each other are one, the keys of their shortlist are the keys that each has of all."""
    q, k, v = inputs(lead=())
    q = np.repeat(3 * q[:2], N // 2, axis=0)
    options = {"group_size": N // 4, "num_exact": 3}
    each_of_all, listed = (
        adaptive_eva(*lib.arrays(q, k, v), **options, block_size=N // number) for number in (2, 8)
    )
    lib.close(listed, lib.numpy(each_of_all), rtol=1e-9)


def test_keys_missed_most_on_either_side_of_the_middle(lib):
    """Keys have one weight at the mean query: the key that its queries differ about most is chosen."""
    q = np.zeros((2, D))
    q[:, 0] = [4, -4]
    k = np.zeros((4, D))
    k[0, 0], k[1, 1], k[2, 0] = 5, 5, -4.9
    v = np.eye(4)
    expected = exactly(q, k, v)
    for shift in range(4):
        data = q, *(np.roll(x, shift, axis=0) for x in (k, v))
        options = {"groups": "segments", "group_size": 4, "num_exact": 1, "block_size": 2}
        out = lib.numpy(adaptive_eva(*lib.arrays(*data), **options))
        lost = np.abs(out - expected).max(axis=-1)
        assert lost[0] < lost[1]


def test_order_of_tokens_is_nothing_to_the_tree(lib):
    """So few that all of them tell the directions."""
    q, k, v = inputs(n=7, m=7, lead=())
    options = {"group_size": 3, "num_exact": 2, "block_size": 4}
    of_queries, of_keys = (np.random.default_rng(seed).permutation(7) for seed in (1, 2))
    out = lib.numpy(adaptive_eva(*lib.arrays(q, k, v), **options))
    turned = adaptive_eva(*lib.arrays(q[of_queries], k[of_keys], v[of_keys]), **options)
    lib.close(turned, out[of_queries], rtol=1e-9)


def test_more_keys_are_better(lib):
    data = inputs(n=96, m=96)
    data[0], data[1] = 2 * data[0], 2 * data[1]
    expected = exactly(*data)
    errors = [
        np.linalg.norm(
            lib.numpy(adaptive_eva(*lib.arrays(*data), group_size=12, num_exact=number, block_size=4))
            - expected
        )
        for number in (6, 12, 24, 48, 96)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 * errors[0]


def test_tree_finds_clusters(lib):
    """Keys in 4 tight clusters in any order: groups of them are all but exact, consecutive ones are not."""
    rng = np.random.default_rng(5)
    q, k, v = inputs(lead=())
    cluster = rng.permutation(np.repeat(np.arange(4), N // 4))
    k = 3 * rng.standard_normal((4, D))[cluster] + 1e-3 * k
    errors = {}
    for groups in ("tree", "segments"):
        out = lib.numpy(adaptive_eva(*lib.arrays(q, k, v), groups=groups, group_size=N // 4, num_exact=1))
        errors[groups] = np.linalg.norm(out - exactly(q, k, v))
    assert errors["tree"] < 0.02 * errors["segments"]


def test_a_group_never_weighs_more_than_its_keys(lib):
    """The tangent of a convex function: of values one in a group and zero elsewhere, the average is below."""
    q, k, _ = inputs(lead=())
    k, size = 2 * k, N // 4
    own = np.zeros((N, 2))
    own[:size, 0] = 1
    # The key that every block chooses, for its value, is a group of its own, and so are the others.
    own[-1, 1] = 1e6
    labels = lib.asarray(np.maximum(np.arange(N) - size + 1, 0))
    out = lib.numpy(adaptive_eva(*lib.arrays(q, k, own), groups=labels, group_size=1, num_exact=1))[:, 0]
    expected = exactly(q, k, own)[:, 0]
    assert np.all(out < expected + 1e-12)
    assert np.max(expected - out) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_queries_than_keys(lib, kind):
    q, k, v = inputs(n=21, m=37)
    options = options_of(lib, kind, m=37)
    out = lib.numpy(adaptive_eva(*lib.arrays(q, k, v), num_exact=12, block_size=7, **options))
    assert out.shape == (*LEAD, 21, E)
    trivial = np.linalg.norm(np.broadcast_to(v.mean(axis=-2, keepdims=True), out.shape) - exactly(q, k, v))
    assert np.linalg.norm(out - exactly(q, k, v)) < 0.8 * trivial


def test_no_heads(lib):
    """An empty batch, as of any estimator."""
    arrays = [lib.asarray(np.zeros((0, 8, size))) for size in (4, 4, 3)]
    assert tuple(adaptive_eva(*arrays).shape) == (0, 8, 3)


def test_errors(lib):
    q, k, v = lib.arrays(*inputs())
    for options, kind, name in [
        ({"groups": "trees"}, ValueError, "groups"),
        ({"groups": k}, TypeError, "groups"),
        ({"groups": lib.asarray(np.zeros(N - 1, dtype=np.int64))}, ValueError, "groups"),
        ({"num_exact": 0}, ValueError, "num_exact"),
        ({"num_exact": "8"}, TypeError, "num_exact"),
        ({"num_exact": 2.5}, TypeError, "num_exact"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"group_size": 0}, ValueError, "group_size"),
    ]:
        with pytest.raises(kind, match=name):
            adaptive_eva(q, k, v, **options)
    if backend_of(q).is_at_hand(q):
        with pytest.raises(ValueError, match="groups"):
            adaptive_eva(q, k, v, groups=lib.asarray(np.full(N, 7)), group_size=8)
