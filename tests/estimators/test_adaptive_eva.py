"""Adaptive EVA: its definition, written with loops over blocks, and exact where mathematics says so."""

import numpy as np
import pytest

from randattn._core import block_sizes
from tests.helpers.calls import adaptive_eva, softmax_attention

pytestmark = pytest.mark.mathematics

# Each chunk of Dask's keys chooses keys of its own: tests/libraries/dask_chunks has their definition.
in_one_piece = pytest.mark.only("numpy", "torch", "jax", "strict", "cupy")

N, D, E = 48, 12, 3
LEAD = (2,)
SMALL = {"num_exact": 8, "group_size": 4, "block_size": 8}


def inputs(n=N, m=N, seed=0, lead=LEAD, keys=None):
    rng = np.random.default_rng(seed)
    keys = lead if keys is None else keys
    return [
        2 * rng.standard_normal((*lead, n, D)),
        2 * rng.standard_normal((*keys, m, D)),
        rng.standard_normal((*keys, m, E)),
    ]


def exactly(q, k, v, *, is_causal=False):
    logits = q @ np.swapaxes(k, -1, -2) / np.sqrt(D)
    if is_causal:
        n, m = logits.shape[-2:]
        logits = np.where(np.tri(n, m, m - n, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def relative(out, expected):
    out = np.broadcast_to(out, expected.shape)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


def of_block(q, choosing, k, v, mean, *, num_exact, group_size, recent=0, own=0):
    """The definition for one block of queries of one head; the last `own` keys are the block's own."""
    past = len(k) - own
    runs = choosing.reshape(2 if len(choosing) == 16 else 1, -1, D).mean(axis=1)
    logits = runs @ k[:past].T / np.sqrt(D)
    score = (logits - logits.max(axis=1, keepdims=True)).max(axis=0)
    score += np.log(np.linalg.norm(v[:past] - mean, axis=-1))
    # Keys after the last whole group are among the recent keys.
    score[past - recent :] = np.inf
    is_exact = np.isin(np.arange(past), np.argsort(score)[past - max(num_exact, recent) :])
    tokens, values, sizes = [k[:past][is_exact]], [v[:past][is_exact]], [np.ones(is_exact.sum())]
    for start in range(0, past, group_size):
        left = np.arange(start, min(start + group_size, past))
        left = left[~is_exact[left]]
        if len(left):
            tokens.append(k[left].mean(axis=0, keepdims=True))
            values.append(v[left].mean(axis=0, keepdims=True))
            sizes.append([len(left)])
    tokens, values, sizes = map(np.concatenate, (tokens, values, sizes))
    logits = np.concatenate(
        [
            q @ tokens.T / np.sqrt(D) + np.log(sizes),
            np.where(np.tri(len(q), own, dtype=bool), q @ k[past:].T / np.sqrt(D), -np.inf),
        ],
        axis=1,
    )
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ np.concatenate([values, v[past:]])


@in_one_piece
def test_blocks_are_their_definition(lib):
    data = inputs(n=20, m=50)
    expected = np.zeros((2, 20, E))
    for head, (q, k, v) in enumerate(zip(*data, strict=True)):
        for block in (slice(16), slice(16, 20)):
            expected[head, block] = of_block(
                q[block], q[block], k, v, v.mean(axis=0), num_exact=8, group_size=4
            )
    lib.close(adaptive_eva(*lib.arrays(*data), **{**SMALL, "block_size": 16}), expected, rtol=1e-9)
    assert relative(expected, exactly(*data)) > 0.1


@pytest.mark.parametrize(("n", "first"), [(100, 36), (87, 23), (40, 8)])
def test_causal_blocks_are_their_definition(lib, n, first):
    """The first queries are exact: a quarter of the keys, or a 16th of them, and the remainder of the blocks."""
    data = inputs(n=n, m=100)
    expected = exactly(*data, is_causal=True)
    width = min(16, first)
    before = 100 - n
    mean = data[2][:, : before + first].mean(axis=1)
    for head, (q, k, v) in enumerate(zip(*data, strict=True)):
        for start in range(first, n, 16):
            stop = start + 16
            expected[head, start:stop] = of_block(
                q[start:stop],
                q[start - width : start],
                *(x[: before + stop] for x in (k, v)),
                mean[head],
                num_exact=22,
                group_size=4,
                recent=16,
                own=16,
            )
    options = {"num_exact": 22, "block_size": 16, "group_size": 4, "exact_heads": 0, "is_causal": True}
    lib.close(adaptive_eva(*lib.arrays(*data), **options), expected, rtol=1e-9)
    assert relative(expected, exactly(*data, is_causal=True)) > 0.03


@pytest.mark.parametrize("is_causal", [False, True])
def test_all_keys_exact_is_attention(lib, is_causal):
    data = inputs()
    out = adaptive_eva(*lib.arrays(*data), num_exact=N, block_size=8, exact_heads=0, is_causal=is_causal)
    lib.close(out, exactly(*data, is_causal=is_causal), rtol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_groups_of_one_key_are_attention(lib, is_causal):
    data = inputs()
    options = {**SMALL, "group_size": 1, "exact_heads": 0, "is_causal": is_causal}
    lib.close(adaptive_eva(*lib.arrays(*data), **options), exactly(*data, is_causal=is_causal), rtol=1e-10)


@in_one_piece
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_head_that_errs_most_is_exact(lib, is_causal):
    """Head 3 looks keys up one by one; the logits of the others are near zero."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((5, 96, D)) for _ in range(3))
    q[[0, 1, 2, 4]] *= 0.1
    # The error is relative: that of head 0 is the largest in the units of its values.
    v[0] *= 1e4
    q[3] = 8 * k[3, rng.permutation(96) if not is_causal else rng.integers(0, np.arange(96) + 1)]
    options = {**SMALL, "is_causal": is_causal}
    arrays, expected = lib.arrays(q, k, v), exactly(q, k, v, is_causal=is_causal)
    out = [lib.numpy(adaptive_eva(*arrays, **options, exact_heads=number)) for number in (0, 1)]
    assert relative(out[0][3], expected[3]) > 0.1
    assert relative(out[1][3], expected[3]) < 1e-9
    # The other heads are as they were.
    np.testing.assert_allclose(np.delete(out[1], 3, axis=0), np.delete(out[0], 3, axis=0), rtol=1e-9)
    assert relative(out[0][0], expected[0]) > 1e-6


@in_one_piece
def test_heads_are_ranked_again_at_twice_the_keys(lib):
    """Head 1 looks keys up before token 48, and head 3 from there on; one head is exact."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((5, 128, D)) for _ in range(3))
    looks_up = 8 * k[:, rng.integers(0, np.arange(128) + 1)]
    q[1, :48], q[3, 48:] = looks_up[1, :48], looks_up[3, 48:]
    out = lib.numpy(adaptive_eva(*lib.arrays(q, k, v), **SMALL, exact_heads=1, is_causal=True))
    expected = exactly(q, k, v, is_causal=True)
    for exact, other, tokens in ((1, 3, slice(32, 64)), (3, 1, slice(64, 128))):
        assert relative(out[exact, tokens], expected[exact, tokens]) < 1e-9
        assert relative(out[other, tokens], expected[other, tokens]) > 0.01


def test_all_heads_exact_are_attention(lib):
    data = inputs()
    lib.close(adaptive_eva(*lib.arrays(*data), **SMALL, exact_heads=9), exactly(*data), rtol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_short_calls_are_attention(lib, is_causal):
    data = inputs()
    options = {"is_causal": is_causal}
    lib.close(adaptive_eva(*lib.arrays(*data), **options), exactly(*data, **options), rtol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_long_calls_are_not(lib, monkeypatch, is_causal):
    """The default sizes of blocks and groups are those of long inputs."""
    monkeypatch.setattr(block_sizes, "ADAPTIVE_KEYS", 400)
    q, k, v = inputs(n=1500, m=2000, lead=(3,))
    # Logits of random tokens are spread far more than those of a model.
    data, options = (q / 4, k, v), {"is_causal": is_causal}
    expected = exactly(*data, **options)
    error = relative(lib.numpy(adaptive_eva(*lib.arrays(*data), **options)), expected)
    assert 1e-3 < error < relative(v.mean(axis=-2, keepdims=True), expected)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "exact_heads": 2}])
def test_grouped_queries_are_repeated_keys(lib, options):
    q, k, v = inputs(lead=(2, 6), keys=(2, 3), m=64)
    out = adaptive_eva(*lib.arrays(q, k, v), **SMALL, enable_gqa=True, **options)
    repeated = [np.repeat(x, 2, axis=1) for x in (k, v)]
    lib.close(out, lib.numpy(adaptive_eva(*lib.arrays(q, *repeated), **SMALL, **options)), rtol=1e-9)


@pytest.mark.parametrize("n", [N, 37])
def test_no_later_token_changes_a_result(lib, n):
    """In the middle of a block too, and the choice of heads."""
    q, k, v = inputs(n=n, lead=(3,))
    at = n - 13
    changed = [x.copy() for x in (q, k, v)]
    for x, value in zip(changed, (9, -7, 50), strict=True):
        x[:, -13:] = value
    options = {**SMALL, "exact_heads": 1, "is_causal": True}
    before, after = (lib.numpy(adaptive_eva(*lib.arrays(*x), **options)) for x in ((q, k, v), changed))
    np.testing.assert_array_equal(after[:, :at], before[:, :at])
    assert relative(after[:, at:], before[:, at:]) > 0.1


@pytest.mark.only("torch", "jax")
def test_no_gradient_to_a_later_token(lib):
    data, at = inputs(lead=(3,)), N - 13

    def early(*arrays):
        out = adaptive_eva(*arrays, **SMALL, exact_heads=1, is_causal=True)[:, :at]
        return (out * out).sum()

    for gradient in lib.gradients(early, *lib.arrays(*data)):
        assert not np.any(gradient[:, at:])
        assert np.any(gradient[:, :at])


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_add_up_to_one(lib, is_causal):
    q, k, v = inputs()
    out = adaptive_eva(*lib.arrays(q, k, np.ones_like(v)), **SMALL, is_causal=is_causal)
    lib.close(out, np.ones((*LEAD, N, E)), rtol=1e-12)


@pytest.mark.parametrize("function", [adaptive_eva, softmax_attention])
@pytest.mark.parametrize("n", [1, 5])
def test_few_last_queries(lib, n, function):
    """The queries are the last of the tokens, and a key mask is that of the keys."""
    q, k, v = inputs(n=n)
    lib.close(function(*lib.arrays(q, k, v), is_causal=True), exactly(q, k, v, is_causal=True), rtol=1e-10)
    mask = np.arange(N) >= 3
    out = function(*lib.arrays(q, k, v), is_causal=True, key_mask=lib.asarray(mask))
    lib.close(out, exactly(q, k[:, 3:], v[:, 3:], is_causal=True), rtol=1e-10)


@in_one_piece
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_never_read(lib, is_causal):
    """Not even as a key among zeros; where whole groups are padding, the call without them is the same."""
    q, k, v = inputs(n=32)
    # All logits are negative, and two choosers of a block look for keys of their own: with the zeros of padding
    # as the largest logits, the one with the lower logits would choose nothing.
    q, k = np.abs(q).reshape(2, 2, 2, 8, D), -np.abs(k)
    q[:, :, 0, :, :6] *= 0.01
    q[:, :, 1, :, 6:] *= 0.01
    q[:, :, 1] *= 3
    q = q.reshape(2, 32, D)
    mask = np.arange(N) >= 8
    given = [x.copy() for x in (k, v)]
    for x in given:
        x[:, :8] = np.nan
    options = {**SMALL, "block_size": 16, "exact_heads": 0, "is_causal": is_causal}
    out = adaptive_eva(*lib.arrays(q, *given), key_mask=lib.asarray(mask), **options)
    if not is_causal:
        lib.close(out, lib.numpy(adaptive_eva(*lib.arrays(q, k[:, 8:], v[:, 8:]), **options)), rtol=1e-9)
    exact = adaptive_eva(*lib.arrays(q, *given), key_mask=lib.asarray(mask), **{**options, "num_exact": N})
    lib.close(exact, exactly(q, k[:, 8:], v[:, 8:], is_causal=is_causal), rtol=1e-10)


def test_more_keys_are_better(lib):
    data = inputs(n=96, m=96)
    expected = exactly(*data)
    errors = [
        relative(lib.numpy(adaptive_eva(*lib.arrays(*data), **{**SMALL, "num_exact": number})), expected)
        for number in (6, 12, 24, 48, 96)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 * errors[0]


def test_no_heads(lib):
    """An empty batch, as of any estimator."""
    arrays = [lib.asarray(np.zeros((0, 8, size))) for size in (4, 4, 3)]
    assert tuple(adaptive_eva(*arrays, **SMALL).shape) == (0, 8, 3)


def test_errors(lib):
    q, k, v = lib.arrays(*inputs())
    for options, kind, name in [
        ({"num_exact": 0}, ValueError, "num_exact"),
        ({"num_exact": "8"}, TypeError, "num_exact"),
        ({"num_exact": 2.5}, TypeError, "num_exact"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"exact_heads": -1}, ValueError, "exact_heads"),
        ({"is_causal": 1}, TypeError, "is_causal"),
    ]:
        with pytest.raises(kind, match=name):
            adaptive_eva(q, k, v, **options)
    with pytest.raises(ValueError, match="is_causal: expected at most as many queries as keys"):
        adaptive_eva(q, k[:, 1:, :], v[:, 1:, :], is_causal=True)
