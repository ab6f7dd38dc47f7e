"""EVA with groups of any kind and chosen keys: exact where mathematics says so, and as `reference` computes it."""

import numpy as np
import pytest

from randattn import _fused, _tree
from tests.calls import eva

N, D, E = 48, 12, 3
LEAD = (2,)


def inputs(n=N, m=N, seed=0, lead=LEAD):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, *shape)) for shape in ((n, D), (m, D), (m, E))]


def exactly(q, k, v):
    logits = q @ np.swapaxes(k, -1, -2) / np.sqrt(D)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def by_pairs(q, k, v, labels, exact, second_order=False):
    """The definition with every pair's weight; of one head. `exact` (N, M)."""
    q, k = q / D**0.25, k / D**0.25
    mu = q.mean(axis=0)
    weights = np.zeros((len(q), len(k)))
    for label in np.unique(labels):
        own = labels == label
        of_keys = np.exp(k[own] @ mu)
        share = of_keys / of_keys.sum()
        kt = share @ k[own]
        total = np.exp((q - mu) @ kt) * of_keys.sum()
        if second_order:
            total = total * np.exp((q - mu) ** 2 @ (share @ k[own] ** 2 - kt**2) / 2)
        weights[:, own] = total[:, None] * share
    weights = np.where(exact, np.exp(q @ k.T), weights)
    return weights @ v / weights.sum(axis=1, keepdims=True)


KINDS = {
    "tree": {"groups": "tree", "num_groups": 8},
    "segments": {"num_groups": 7},
    "labels": {"num_groups": 5},
}


def options_of(lib, kind, lead=LEAD, m=N):
    options = dict(KINDS[kind])
    if kind == "labels":
        options["groups"] = lib.asarray(np.random.default_rng(3).integers(0, 5, (*lead, m)))
    return options


@pytest.mark.parametrize("kind", KINDS)
def test_all_keys_exact_is_attention(lib, kind):
    data = inputs()
    options = options_of(lib, kind)
    everything = {"exact": "top", "num_exact": options["num_groups"]}
    for more in (
        everything,
        {"exact": "window", "window": N},
        {**everything, "exact": ("top", "window"), "window": 7},
    ):
        out = eva(*lib.arrays(*data), **options, second_order=True, **more)
        lib.close(out, exactly(*data), rtol=1e-10)


def test_labels_may_be_of_few_bits(lib):
    """Fewer than the number of groups takes."""
    arrays, labels = lib.arrays(*inputs()), np.arange(N) // 3
    expected, out = (
        lib.numpy(eva(*arrays, groups=lib.asarray(labels, dtype), num_groups=300, window=6))
        for dtype in ("int64", "int8")
    )
    lib.close(lib.asarray(out), expected)


def test_groups_of_one_key_are_attention(lib):
    data = inputs()
    lib.close(
        eva(*lib.arrays(*data), groups=lib.asarray(np.arange(N)), num_groups=N, window=6),
        exactly(*data),
        rtol=1e-10,
    )
    lib.close(
        eva(
            *lib.arrays(*(x[..., :32, :] for x in data)),
            groups="tree",
            num_groups=32,
            exact="top",
            num_exact=2,
        ),
        exactly(*(x[..., :32, :] for x in data)),
        rtol=1e-10,
    )


@pytest.mark.parametrize("second_order", [False, True])
def test_labels_and_windows_are_their_definition(lib, second_order):
    data = inputs()
    labels = np.random.default_rng(3).integers(0, 5, N)
    window = 10
    exact = np.arange(N)[:, None] // window == np.arange(N) // window
    out = eva(
        *lib.arrays(*data),
        groups=lib.asarray(labels),
        num_groups=5,
        window=window,
        second_order=second_order,
    )
    expected = [by_pairs(*(x[i] for x in data), labels, exact, second_order) for i in range(LEAD[0])]
    lib.close(out, np.stack(expected), rtol=1e-10)


def test_segments_and_chosen_keys_are_their_definition(lib):
    """One block of all queries chooses; of which keys, the definition tells."""
    data = inputs(lead=())
    labels = np.repeat(np.arange(6), N // 6)
    out = lib.numpy(eva(*lib.arrays(*data), num_groups=6, exact="top", num_exact=0.25, num_blocks=1))
    errors = {}
    for first in range(N):
        for second in range(first):
            exact = np.isin(np.arange(N), [first, second])[None, :]
            errors[first, second] = np.abs(by_pairs(*data, labels, exact) - out).max()
    best, second, *_ = sorted(errors.values())
    assert best < 1e-12
    assert second > 1e-6


@pytest.mark.parametrize("exact", ["top", ("window", "top")])
def test_lists_for_queries_all_alike(lib, exact):
    """Where blocks about each other are one, what they choose from their list is what each has of all keys."""
    q, k, v = inputs(lead=())
    q = np.repeat(3 * q[:2], N // 2, axis=0)
    options = {"groups": "tree", "num_groups": 4, "exact": exact, "num_exact": 0.25, "window": 3}
    each_of_all, listed = (eva(*lib.arrays(q, k, v), **options, num_blocks=number) for number in (2, 8))
    lib.close(listed, lib.numpy(each_of_all), rtol=1e-9)


def test_keys_missed_most_on_either_side_of_the_middle(lib):
    """Of keys that the mean query weighs the same, the one that its queries differ about most."""
    q = np.zeros((2, D))
    q[:, 0] = [4, -4]
    k = np.zeros((4, D))
    k[0, 0], k[1, 1], k[2, 0] = 5, 5, -4.9
    v = np.eye(4)
    expected = exactly(q, k, v)
    for shift in range(4):
        data = q, *(np.roll(x, shift, axis=0) for x in (k, v))
        out = lib.numpy(eva(*lib.arrays(*data), num_groups=1, exact="top", num_exact=0.25, num_blocks=1))
        lost = np.abs(out - expected).max(axis=-1)
        assert lost[0] < lost[1]


def test_order_of_tokens_is_nothing_to_the_tree(lib):
    """So few that all of them tell the directions."""
    q, k, v = inputs(n=7, m=7, lead=())
    options = {"groups": "tree", "num_groups": 2, "exact": "top", "num_exact": 0.5, "num_blocks": 2}
    of_queries, of_keys = (np.random.default_rng(seed).permutation(7) for seed in (1, 2))
    out = lib.numpy(eva(*lib.arrays(q, k, v), **options))
    lib.close(eva(*lib.arrays(q[of_queries], k[of_keys], v[of_keys]), **options), out[of_queries], rtol=1e-9)


@pytest.mark.parametrize("exact", ["top", ("window", "top")])
def test_more_keys_are_better(lib, exact):
    data = inputs(n=96, m=96)
    data[0], data[1] = 2 * data[0], 2 * data[1]
    expected = exactly(*data)
    errors = [
        np.linalg.norm(
            lib.numpy(
                eva(
                    *lib.arrays(*data),
                    groups="tree",
                    exact=exact,
                    num_groups=8,
                    window=4,
                    num_exact=num,
                    num_blocks=24,
                )
            )
            - expected
        )
        for num in (0.5, 1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 * errors[0]


def test_tree_finds_clusters(lib):
    """Keys in 4 tight clusters in any order: groups of them are all but exact, consecutive ones are not."""
    rng = np.random.default_rng(5)
    q, k, v = inputs(lead=())
    cluster = rng.permutation(np.repeat(np.arange(4), N // 4))
    k = 3 * rng.standard_normal((4, D))[cluster] + 1e-3 * k
    errors = {
        groups: np.linalg.norm(
            lib.numpy(eva(*lib.arrays(q, k, v), groups=groups, num_groups=4, window=1, second_order=True))
            - exactly(q, k, v)
        )
        for groups in ("tree", "segments")
    }
    assert errors["tree"] < 0.02 * errors["segments"]


def test_a_group_never_weighs_more_than_its_keys(lib):
    """The tangent of a convex function: of values one in a group and zero elsewhere, the average is below."""
    q, k, _ = inputs(lead=())
    k, window = 2 * k, N // 4
    own = (np.arange(N) < window)[:, None] * np.ones((N, E))
    # All others are exact: they are windows of their own, each a group of one key.
    labels = lib.asarray(np.maximum(np.arange(N) - window + 1, 0))
    out = lib.numpy(eva(*lib.arrays(q, k, own), groups=labels, num_groups=N, window=1))[window:]
    expected = exactly(q, k, own)[window:]
    assert np.all(out < expected + 1e-12)
    assert np.max(expected - out) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_queries_than_keys(lib, kind):
    q, k, v = inputs(n=21, m=37)
    options = options_of(lib, kind, m=37)
    out = lib.numpy(eva(*lib.arrays(q, k, v), exact="top", num_exact=2, num_blocks=3, **options))
    assert out.shape == (*LEAD, 21, E)
    trivial = np.linalg.norm(np.broadcast_to(v.mean(axis=-2, keepdims=True), out.shape) - exactly(q, k, v))
    assert np.linalg.norm(out - exactly(q, k, v)) < 0.8 * trivial


def test_no_heads(lib):
    """An empty batch, as of any estimator."""
    arrays = [lib.asarray(np.zeros((0, 8, size))) for size in (4, 4, 3)]
    assert tuple(eva(*arrays, groups="tree", exact="top").shape) == (0, 8, 3)


def test_sums_by_group(lib):
    """Each library's own are the pure ones, and what the definition says; of groups without a row, zero."""
    if lib.name == "dask":
        pytest.skip("it has the tokens whole")
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 9, 3))
    group = np.sort(rng.integers(0, 5, (2, 4, 6)), axis=-1)
    group[0, 0], group[1, 1] = 0, 4
    index = rng.integers(0, 9, (2, 4, 6))
    chosen = np.arange(5)[:, None] == group[..., None, :]
    expected = chosen @ np.stack([rows[at] for rows, at in zip(x, index, strict=True)])
    (x,) = lib.arrays(x)
    index, group = lib.asarray(index), lib.asarray(group)
    for sums in (_fused.sums_by_group, _tree.sums_by_group):
        lib.close(sums(x, index, group, 5), expected)
    if lib.name == "torch":
        import torch

        x.requires_grad_()
        # A GPU adds rows in another order each time.
        check = {"nondet_tol": 1e-12}
        assert torch.autograd.gradcheck(lambda x: _fused.sums_by_group(x, index, group, 5), x, **check)
        assert torch.autograd.gradgradcheck(
            lambda x: _fused.sums_by_group(x, index, group, 5) ** 2, x, **check
        )


def test_errors(lib):
    q, k, v = lib.arrays(*inputs())
    for name, value in {
        "rng": 0,
        "group_weight": "unit",
        "disjoint": False,
        "is_causal": True,
        "landmarks": (q, k),
    }.items():
        with pytest.raises(ValueError, match=name):
            eva(q, k, v, exact="top", **{name: value})
    for options, kind, name in [
        ({"groups": "trees"}, ValueError, "groups"),
        ({"exact": "best"}, ValueError, "exact"),
        ({"exact": ()}, ValueError, "exact"),
        ({"exact": 1}, ValueError, "exact"),
        ({"exact": "top", "num_exact": 0}, ValueError, "num_exact"),
        ({"exact": "top", "num_exact": "8"}, TypeError, "num_exact"),
        ({"exact": "top", "num_blocks": 0}, ValueError, "num_blocks"),
        ({"groups": k}, TypeError, "groups"),
        ({"groups": "tree", "group_size": 4}, ValueError, "group_size"),
        ({"groups": "tree", "second_order": 1}, TypeError, "second_order"),
        ({"groups": "tree", "num_groups": 0}, ValueError, "num_groups"),
    ]:
        with pytest.raises(kind, match=name):
            eva(q, k, v, **options)
    with pytest.raises(ValueError, match="groups"):
        eva(q, k, v, groups=lib.asarray(np.zeros(N - 1, dtype=np.int64)))
    if lib.name in ("numpy", "torch") and _fused.known(q):
        with pytest.raises(ValueError, match="groups"):
            eva(q, k, v, groups=lib.asarray(np.full(N, 7)), num_groups=7)
