"""The layers of PyTorch and Flax: the same results from the same weights, and what the papers train."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import randattn
from randattn.integrations import flax as for_flax
from randattn.integrations import torch as for_torch
from randattn.integrations._layer import buckets
from tests.helpers.forms import beyond

N, F, H = 30, 24, 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, N, F)).astype(np.float32)
KEEP = np.arange(N) < np.array([[N], [19]])
CASES = {
    "softmax": {"estimator": "softmax_attention"},
    "rfa": {"estimator": "rfa", "options": {"num_samples": 8}},
    "ra": {"estimator": "ra"},
    "lara": {"estimator": "lara", "options": {"num_landmarks": 4}},
    "lara learned": {"estimator": "lara", "options": {"num_landmarks": 4}, "learned_landmarks": True},
    "lara on a grid": {
        "estimator": "lara",
        "options": {"num_landmarks": (2, 3), "grid": (5, 6)},
        "learned_landmarks": True,
    },
    "eva": {"options": {"num_groups": 4, "window": 8}},
    "eva learned": {
        "options": {"num_groups": 4, "window": 8},
        "learned_landmarks": True,
        "relative_bias": True,
    },
    "eva causal": {
        "options": {"group_size": 4, "window": 8},
        "learned_landmarks": True,
        "relative_bias": True,
        "is_causal": True,
    },
    "eva on a grid": {
        "options": {"num_groups": (2, 2), "window": (2, 3), "grid": (5, 6)},
        "learned_landmarks": True,
    },
    "lara causal": {"estimator": "lara", "is_causal": True, "options": {"num_landmarks": 4, "window": 5}},
    "rfa causal": {"estimator": "rfa", "is_causal": True, "bias": False},
}


def both(name, **more):
    """The two, in evaluation mode, with the same weights."""
    torch.manual_seed(0)
    one = for_torch.Attention(F, H, **{**CASES[name], **more}).eval()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other = for_flax.Attention(F, H, **{**CASES[name], **more}, rngs=nnx.Rngs(0))
    other.eval()
    other.load({key: value.numpy() for key, value in one.state_dict().items()})
    return one, other


def results(one, other, x=X, mask=None, **options):
    ours = one(torch.tensor(x), key_mask=None if mask is None else torch.tensor(mask), **options)
    return ours.detach().numpy(), np.asarray(
        other(jnp.asarray(x), key_mask=mask if mask is None else jnp.asarray(mask), **options)
    )


@pytest.mark.parametrize("mask", [None, KEEP], ids=["all", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_they_agree(name, mask):
    one, other = both(name)
    ours, theirs = results(one, other, mask=mask)
    assert ours.shape == (2, N, F)
    np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=1e-4)
    if mask is not None:
        changed = np.where(KEEP[..., None], X, 7).astype(np.float32)
        np.testing.assert_allclose(results(one, other, changed, mask)[0][KEEP], ours[KEEP], atol=1e-6)


@pytest.mark.parametrize("name", beyond(CASES, ("lara", "eva learned"), "numpy"))
def test_gradients_agree(name):
    """Gradients reach the inputs, through all weights."""
    one, other = both(name)
    x = torch.tensor(X, requires_grad=True)
    one(x, rng=3).square().sum().backward() if name != "softmax" else one(x).square().sum().backward()
    options = {} if name == "softmax" else {"rng": 3}
    theirs = jax.grad(lambda y: jnp.sum(other(y, **options) ** 2))(jnp.asarray(X))
    np.testing.assert_allclose(x.grad, theirs, atol=2e-3 * float(x.grad.abs().max()))
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for n, p in one.named_parameters()
        if "key.bias" not in n
    )


def test_as_pytorchs_own_layer():
    one, _ = both("softmax")
    theirs = torch.nn.MultiheadAttention(F, H, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([one.query.weight, one.key.weight, one.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([one.query.bias, one.key.bias, one.value.bias]))
        theirs.out_proj.load_state_dict(one.out.state_dict())
        x, y = torch.tensor(X), torch.tensor(X[:, :11])
        torch.testing.assert_close(one(y, x), theirs(y, x, x)[0])
        exact = theirs(x, x, x, key_padding_mask=torch.tensor(~KEEP))[0]
        torch.testing.assert_close(one(x, key_mask=torch.tensor(KEEP))[KEEP], exact[KEEP])
        other = torch.tensor(X[::-1].copy())
        exact = theirs(other, x, x, key_padding_mask=torch.tensor(~KEEP))[0]
        # As many queries as keys, and another mask.
        torch.testing.assert_close(one(other, x, key_mask=torch.tensor(KEEP)), exact)


@pytest.mark.parametrize("name", beyond(CASES, ("lara", "eva learned"), "numpy"))
def test_junk_in_padding(name):
    """Neither results nor gradients, of the weights either, depend on the padding of tokens."""
    one, other = both(name)
    weights = np.random.default_rng(1).standard_normal((2, N, F)).astype(np.float32) * KEEP[..., None]
    options = {} if name == "softmax" else {"rng": 3}

    def loss(other, x):
        if isinstance(x, torch.Tensor):
            return (one(x, key_mask=torch.tensor(KEEP), **options) * torch.tensor(weights)).sum()
        return jnp.sum(other(x, key_mask=jnp.asarray(KEEP), **options) * weights)

    def gradients(junk):
        x = np.where(KEEP[..., None], X, junk).astype(np.float32)
        leaf = torch.tensor(x, requires_grad=True)
        ours = torch.autograd.grad(loss(None, leaf), [leaf, *one.parameters()], allow_unused=True)
        theirs = nnx.grad(loss, argnums=(0, 1))(other, jnp.asarray(x))
        return [g for g in ours if g is not None], jax.tree.leaves(theirs)

    clean, junk = gradients(0.0), gradients(np.nan)
    for expected, found in zip(clean, junk, strict=True):
        assert len(found) == len(expected) > 3
        for x, y in zip(expected, found, strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(junk[0][0])[~KEEP], 0)


def test_learned_landmarks_and_bias_by_the_library():
    """A layer, written out."""
    one, _ = both("eva learned")
    x = torch.tensor(X[0])
    q, k, v = (project(x).reshape(N, H, F // H).movedim(0, 1) for project in (one.query, one.key, one.value))
    parts = np.split(np.arange(N), [7, 14, 22])
    means = [torch.stack([y[:, part].mean(dim=1) for part in parts], dim=1) for y in (q, k)]
    pair = (one.query_landmark(means[0]), one.key_landmark(means[1]))
    bias = one.relative_bias.weight[torch.as_tensor(buckets(8, 32, 128, is_causal=False))].movedim(-1, 0)
    out = randattn.eva(q, k, v, landmarks=pair, window=8, window_bias=bias)
    torch.testing.assert_close(one(x), one.out(out.movedim(0, 1).reshape(N, F)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_buckets_are_t5s(is_causal):
    """The buckets are those of transformers' T5."""
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(200)
    theirs = T5Attention._relative_position_bucket(
        place[None, :] - place[:, None], bidirectional=not is_causal, num_buckets=32, max_distance=128
    )
    np.testing.assert_array_equal(buckets(200, 32, 128, is_causal=is_causal), theirs)


@pytest.mark.thorough("numpy")
@pytest.mark.parametrize(
    "name", ["softmax", "rfa", "ra", "lara", "lara learned", "eva", "eva learned", "lara causal"]
)
def test_derivatives_of_each_order(name):
    """In both frameworks, along a direction, of each order those of the order before by differences."""
    draws = {} if name == "softmax" else {"rng": 0}
    one, other = both(name, options={**CASES[name].get("options", {}), **draws})
    one = one.double()
    x, along = np.random.default_rng(2).standard_normal((2, 2, N, F))
    weights = np.random.default_rng(3).standard_normal((2, N, F))

    def by_autograd(x, order):
        leaf = torch.tensor(x, requires_grad=True)
        value = (one(leaf).sin() * torch.tensor(weights)).sum()
        for _ in range(order):
            (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = (slope * torch.tensor(along)).sum()
        return value.item()

    step = 1e-5
    # PyTorch's own LayerNorm, which learned landmarks have, has a wrong third derivative (2.13).
    for order in (1, 2) if "learned" in name else (1, 2, 3):
        ends = [by_autograd(x + sign * step * along, order - 1) for sign in (1, -1)]
        assert by_autograd(x, order) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-5)

    def by_jax(x, order):
        value = lambda x: jnp.sum(jnp.sin(other(x)) * weights)  # noqa: E731
        for _ in range(order):
            value = lambda x, value=value: jnp.sum(jax.grad(value)(x) * along)  # noqa: E731
        return float(jax.jit(value)(jnp.asarray(x, jnp.float32)))

    # In single precision, where differences would say little.
    for order in (1, 2):
        assert by_jax(x, order) == pytest.approx(by_autograd(x, order), rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("name", ["rfa", "ra", "lara", "eva learned"])
def test_training_draws_anew(name):
    one, other = both(name)
    first, second = (results(one, other) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    one.train()
    other.train()
    ours, theirs = results(one, other)
    again = results(one, other)
    assert np.abs(ours - again[0]).max() > 1e-4
    assert np.abs(theirs - again[1]).max() > 1e-4
    torch.manual_seed(1)
    ours, _ = results(one, other)
    torch.manual_seed(1)
    np.testing.assert_array_equal(results(one, other)[0], ours)
    same = results(one, other, rng=5)
    np.testing.assert_allclose(*same, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["eva learned", "eva causal"])
def test_fewer_tokens_than_the_window(name):
    options = {"window": 64, "group_size": 4} if name == "eva causal" else {"window": 64, "num_groups": 4}
    np.testing.assert_allclose(*results(*both(name, options=options)), atol=3e-5, rtol=1e-4)


def test_under_jit():
    _, other = both("eva learned")
    jitted = nnx.jit(lambda layer, x: layer(x))
    np.testing.assert_allclose(jitted(other, jnp.asarray(X)), other(jnp.asarray(X)), atol=1e-5)


@pytest.mark.thorough("numpy")
def test_they_learn():
    """To look for the token that is marked, in both frameworks."""
    marked = RNG.integers(0, N, 64)
    x = RNG.standard_normal((64, N, F)).astype(np.float32)
    x[:, :, 0] = 0
    x[np.arange(64), marked, 0] = 4
    y = np.broadcast_to(x[np.arange(64), marked][:, None], x.shape)
    options = {"options": {"num_groups": 6, "window": 6}, "learned_landmarks": True, "relative_bias": True}
    torch.manual_seed(0)
    one = for_torch.Attention(F, H, **options)
    optimizer = torch.optim.Adam(one.parameters(), 0.02)
    losses = []
    for _ in range(40):
        loss = (one(torch.tensor(x)) - torch.tensor(y)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]

    other = for_flax.Attention(F, H, **options, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(other, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x, y):
        loss, gradient = nnx.value_and_grad(lambda layer: jnp.mean((layer(x) - y) ** 2))(layer)
        optimizer.update(layer, gradient)
        return loss

    losses = [float(step(other, optimizer, jnp.asarray(x), jnp.asarray(y))) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_refusals():
    for make in (for_torch.Attention, lambda *a, **o: for_flax.Attention(*a, **o, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match="estimator: expected one of"):
            make(F, H, estimator="performer")
        with pytest.raises(ValueError, match="num_heads: expected a divisor"):
            make(F, 5)
        with pytest.raises(ValueError, match="learned_landmarks"):
            make(F, H, estimator="rfa", learned_landmarks=True)
        with pytest.raises(ValueError, match="relative_bias"):
            make(F, H, estimator="lara", relative_bias=True)
        with pytest.raises(ValueError, match="relative_bias"):
            make(F, H, options={"window": (2, 2), "grid": (5, 6)}, relative_bias=True)
        for sizes in ({"num_buckets": 2}, {"num_buckets": 31}, {"max_distance": 8}):
            with pytest.raises(ValueError, match="num_buckets"):
                make(F, H, relative_bias=True, **sizes)
    one, other = both("eva learned")
    with pytest.raises(NotImplementedError, match="window_bias"):
        one(torch.tensor(X[:, :1]), torch.tensor(X))
    plain = for_flax.Attention(F, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="weights: this layer has no"):
        plain.load(one.state_dict())
    wide = for_flax.Attention(2 * F, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected shape"):
        wide.load(one.state_dict())
    with pytest.raises(KeyError):
        other.load({name: value for name, value in one.state_dict().items() if "landmark" not in name})
