"""Steps of adaptive EVA: their definition, written with loops, and exact where mathematics says so."""

import itertools

import numpy as np
import pytest

from randattn import AdaptiveEVAState, adaptive_eva_step
from randattn._backends.dispatch import backend_of
from tests.helpers.calls import adaptive_eva, softmax_attention

# A step appends to its state at once: Dask has none, which tests/libraries/dask_chunks shows.
pytestmark = pytest.mark.only("numpy", "torch", "jax", "strict", "cupy")

D, E, GROUP = 12, 3, 16


def inputs(n, lead=(2,), keys=None, seed=0):
    rng = np.random.default_rng(seed)
    keys = lead if keys is None else keys
    q, k = 2 * rng.standard_normal((*lead, n, D)), 2 * rng.standard_normal((*keys, n, D))
    return [q, k, rng.standard_normal((*keys, n, E))]


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def begin(lib, data, n, places, mask=None, **options):
    """The state after a call on the first n tokens."""
    seen = {} if mask is None else {"key_mask": lib.asarray(mask[..., :n])}
    arrays = lib.arrays(*(x[..., :n, :] for x in data))
    options |= {"is_causal": True, "return_state": True, "max_tokens": places}
    return adaptive_eva(*arrays, **seen, **options)[1]


def step(lib, data, part, state, mask=None, **options):
    seen = {} if mask is None else {"key_mask": lib.asarray(mask[..., part])}
    return adaptive_eva_step(*lib.arrays(*(x[..., part, :] for x in data)), state, **seen, **options)


def steps(lib, data, cuts, places, mask=None, *, call=None, **options):
    """The results of steps between the cuts, after a call on the tokens before the first."""
    state, found = begin(lib, data, cuts[0], places, mask, **(call or {})), []
    for start, stop in itertools.pairwise(cuts):
        out, state = step(lib, data, slice(start, stop), state, mask, **options)
        found.append(lib.numpy(out))
    return np.concatenate(found, axis=-2), state


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def by_definition(q, k, v, keep, indexed, features, groups):
    """The output of one token of one key head: its queries (G, D), and all keys up to it."""
    count = indexed // GROUP
    parts = [range(c * GROUP, (c + 1) * GROUP) for c in range(count)]
    real = [[m for m in part if keep[m]] for part in parts]
    scores = np.full((len(q), count), -np.inf)
    for g, query in enumerate(q):
        for c, members in enumerate(real):
            if members:
                # Padding has zeros for its features.
                logits = [query[features] @ (k[m] * keep[m])[features] for m in parts[c]]
                scores[g, c] = max(logits)
        scores[g] -= scores[g].max()
    chosen = set(np.argsort(scores.max(axis=0))[count - groups :])
    out = []
    for query in q:
        logits, values = [], []
        for c, members in enumerate(real):
            if c in chosen:
                logits += [query @ k[m] for m in members]
                values += [v[m] for m in members]
            elif members:
                logits.append(query @ k[members].mean(axis=0) + np.log(len(members)))
                values.append(v[members].mean(axis=0))
        for m in range(indexed, len(k)):
            if keep[m]:
                logits.append(query @ k[m])
                values.append(v[m])
        out.append(softmax(np.array(logits)) @ np.array(values))
    return np.array(out)


@pytest.mark.parametrize("padded", [False, True])
def test_the_definition(lib, padded):
    """Groups by the definition: chosen by eight features, which the state names; from one head of keys for two."""
    first, n = 400, 404
    q, k, v = inputs(n, lead=(4,), keys=(2,))
    keep = np.ones((2, n), dtype=bool)
    if padded:
        keep[:] = np.random.default_rng(1).random((2, n)) > 0.3
        keep[1, 32:48] = False
    hidden = [np.where(keep[..., None], x, np.nan) for x in (k, v)] if padded else (k, v)
    gqa = {"enable_gqa": True}
    found, state = steps(
        lib,
        (q, *hidden),
        range(first, n + 1),
        n,
        keep if padded else None,
        call={"scale": 0.3, **gqa},
        num_exact=3 * GROUP - 5,
        **gqa,
    )
    indexed = int(lib.numpy(state.indexed))
    assert indexed == 256
    for head in range(2):
        features = lib.numpy(state.features)[head]
        for t in range(first, n):
            queries = 0.3 * q[2 * head : 2 * head + 2, t]
            past = (k[head, : t + 1], v[head, : t + 1], keep[head])
            expected = by_definition(queries, *past, indexed, features, 3)
            if keep[head, t]:
                same(found[2 * head : 2 * head + 2, t - first], expected)


def test_the_features_that_vary_most(lib):
    """By the last queries of the call and its keys, without padding."""
    q, k, v = inputs(40)
    strong = np.array([0, 2, 3, 5, 7, 8, 10, 11])
    q[..., strong] *= 2
    k[..., [1, 4]] += 100  # large, and the same for all keys
    k[:, 7] = 1e6
    mask = np.arange(40) != 7
    state = begin(lib, (q, k, v), 40, 40, mask)
    np.testing.assert_array_equal(lib.numpy(state.features), np.broadcast_to(strong, (2, 8)))


@pytest.mark.parametrize(
    "cuts", [[300, 301, 302, 430], [1, 2, 3, 255, 256, 257, 258, 430], [250, 430], [385, 430]]
)
def test_exact_with_all_groups(lib, cuts):
    """Whatever the pieces, across places where recent tokens go into groups."""
    data = inputs(430, lead=(2, 4), keys=(2, 2))
    gqa = {"enable_gqa": True}
    found, _ = steps(lib, data, cuts, 430, num_exact=430, call=gqa, **gqa)
    whole = lib.numpy(softmax_attention(*lib.arrays(*data), is_causal=True, **gqa))
    same(found, whole[..., cuts[0] :, :])


def test_pieces_give_what_single_tokens_give(lib):
    data = inputs(410)
    # No token of these goes into groups in between.
    whole, one = steps(lib, data, [390, 410], 410, num_exact=32)
    single, other = steps(lib, data, range(390, 411), 410, num_exact=32)
    same(whole, single)
    for x, y in zip(one, other, strict=True):
        same(lib.numpy(x), lib.numpy(y))
    with_past = steps(lib, data, [390, 392, 400, 410], 410, num_exact=32)[0]
    same(with_past, single)


def test_no_token_to_come_changes_a_piece(lib):
    data = inputs(410)
    found = steps(lib, data, [390, 410], 410, num_exact=32)[0]
    changed = [x.copy() for x in data]
    for x in changed:
        x[:, 400:] = 50
    again = steps(lib, changed, [390, 410], 410, num_exact=32)[0]
    np.testing.assert_array_equal(found[:, :10], again[:, :10])
    assert not np.array_equal(found[:, 10:], again[:, 10:])


def test_a_state_is_the_same_by_steps_and_by_a_call(lib):
    """But for the features, which the first call chooses."""
    data = inputs(530)
    _, by_steps = steps(lib, data, [300, 301, 385, 386, 512, 513, 530], 560)
    by_call = begin(lib, data, 530, 560)
    assert int(lib.numpy(by_call.indexed)) == 384
    for name, x, y in zip(AdaptiveEVAState._fields, by_steps, by_call, strict=True):
        assert (x.dtype, tuple(x.shape)) == (y.dtype, tuple(y.shape))
        if "feature" not in name:
            same(lib.numpy(x), lib.numpy(y))


def test_the_state_is_not_written_to(lib):
    data = inputs(390)
    state = begin(lib, data, 384, 640)
    before = [np.array(lib.numpy(x)) for x in state]
    for _ in range(2):
        step(lib, data, slice(384, 390), state)
        for x, y in zip(state, before, strict=True):
            np.testing.assert_array_equal(lib.numpy(x), y)


@pytest.mark.only("numpy", "torch")
def test_large_arrays_are_copied_once_in_128_tokens(lib):
    """In the same memory in between, where the host can tell."""
    data = inputs(390)
    state = begin(lib, data, 383, 640)
    if not backend_of(state.tokens).is_at_hand(state.tokens):
        pytest.skip("for a library that need not wait for its values")
    for n, is_copied in ((383, False), (384, True), (385, False)):
        _, after = step(lib, data, slice(n, n + 1), state)
        assert np.shares_memory(lib.numpy(state.tokens), lib.numpy(after.tokens)) is not is_copied
        state = after


def test_beyond_the_places(lib):
    data = inputs(420)
    found, _ = steps(lib, data, [390, 410, 415, 420], 396)
    # 396 tokens take 25 groups of 16.
    assert np.isfinite(found[:, :10]).all()
    assert np.isnan(found[:, 10:]).all()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("first", [383, 384])
def test_a_step_that_is_compiled(lib, first):
    data = inputs(390)
    state = begin(lib, data, first, 640)
    if lib.name == "jax":
        import jax

        compiled = jax.jit(adaptive_eva_step)
    else:
        import torch

        compiled = torch.compile(adaptive_eva_step, fullgraph=True, backend="eager")
    one = lib.arrays(*(x[..., first : first + 1, :] for x in data))
    for x, y in zip(
        *((out, *after) for out, after in (f(*one, state) for f in (compiled, adaptive_eva_step))),
        strict=True,
    ):
        same(lib.numpy(x), lib.numpy(y))


@pytest.mark.only("torch", "jax")
def test_sequences_that_are_not_as_long(lib):
    """Mapped over: in one of them recent tokens go into groups, in the other not."""
    if lib.name == "jax":
        import jax

        mapped = jax.vmap(adaptive_eva_step)
    else:
        import torch

        mapped = torch.func.vmap(adaptive_eva_step)
    data, lengths = inputs(390), (383, 384)
    states = [begin(lib, data, n, 640) for n in lengths]
    tokens = [lib.arrays(*(x[..., n : n + 1, :] for x in data)) for n in lengths]
    together = AdaptiveEVAState(*(lib.xp.stack(fields) for fields in zip(*states, strict=True)))
    out, after = mapped(*(lib.xp.stack(x) for x in zip(*tokens, strict=True)), together)
    for i, (state, token) in enumerate(zip(states, tokens, strict=True)):
        expected, expected_state = adaptive_eva_step(*token, state)
        same(lib.numpy(out[i]), lib.numpy(expected))
        for x, y in zip(after, expected_state, strict=True):
            same(lib.numpy(x[i]), lib.numpy(y))


@pytest.mark.only("torch", "jax")
def test_gradients(lib):
    """Those of exact attention where all groups are chosen, through the state too."""
    data, weights = inputs(400), np.random.default_rng(3).standard_normal((2, 10, E))
    begun = {"is_causal": True, "return_state": True, "max_tokens": 400}

    def by_steps(q, k, v):
        _, state = adaptive_eva(*(x[:, :390] for x in (q, k, v)), **begun)
        out, _ = adaptive_eva_step(*(x[:, 390:] for x in (q, k, v)), state, num_exact=400)
        return (out * lib.asarray(weights)).sum()

    def exactly(q, k, v):
        return (softmax_attention(q, k, v, is_causal=True)[:, 390:] * lib.asarray(weights)).sum()

    arrays = lib.arrays(*data)
    for found, expected in zip(
        lib.gradients(by_steps, *arrays), lib.gradients(exactly, *arrays), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_errors(lib):
    arrays = lib.arrays(*inputs(4))
    with pytest.raises(ValueError, match="return_state: expected is_causal=True with it"):
        adaptive_eva(*arrays, return_state=True)
    with pytest.raises(ValueError, match="max_tokens: expected return_state=True with it"):
        adaptive_eva(*arrays, is_causal=True, max_tokens=8)
    with pytest.raises(ValueError, match="max_tokens: expected at least 4, got 3"):
        adaptive_eva(*arrays, is_causal=True, return_state=True, max_tokens=3)
    with pytest.raises(TypeError, match="state: expected one of adaptive_eva, AdaptiveEVAState, got tuple"):
        adaptive_eva_step(*arrays, ())
    _, state = adaptive_eva(*arrays, is_causal=True, return_state=True)
    with pytest.raises(ValueError, match="num_exact: expected at least 1, got 0"):
        adaptive_eva_step(*arrays, state, num_exact=0)
    with pytest.raises(
        ValueError, match=r"state.features: expected leading axes that hold \(3,\), got \(2,\)"
    ):
        adaptive_eva_step(*lib.arrays(*inputs(4, lead=(3,))), state)
