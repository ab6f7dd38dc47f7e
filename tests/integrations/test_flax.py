"""Flax's attention modules, on their own exact attention and on the estimators."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from randattn import eva, lara, rfa, softmax_attention
from randattn.integrations.flax import attention_fn

FEATURES, N = 16, 24
X = jax.random.normal(jax.random.key(0), (2, N, FEATURES))
KEEP = jnp.arange(N) < jnp.asarray([[N], [N - 7]])
EXACT = attention_fn(softmax_attention)
WHOLE = attention_fn(eva, window=N)


def layer(fn=None, **options):
    """Each with the same weights."""
    options = {"decode": False, "rngs": nnx.Rngs(0), **options}
    if fn is not None:
        options["attention_fn"] = fn
    return nnx.MultiHeadAttention(4, FEATURES, **options)


def linen_layer(fn=None, **options):
    if fn is not None:
        options["attention_fn"] = fn
    made = linen.MultiHeadDotProductAttention(4, **options)
    return partial(made.apply, made.init(jax.random.key(1), X))


def close(x, y):
    np.testing.assert_allclose(x, y, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("fn", [EXACT, WHOLE])
@pytest.mark.parametrize("mask", [None, KEEP[:, None, None, :], KEEP[:, None, None, :].astype(jnp.float32)])
def test_nnx(fn, mask):
    close(layer(fn)(X, mask=mask), layer()(X, mask=mask))
    close(nnx.jit(lambda one, x: one(x, mask=mask))(layer(fn), X), layer()(X, mask=mask))


@pytest.mark.parametrize("fn", [EXACT, WHOLE])
@pytest.mark.parametrize("mask", [None, KEEP[:, None, None, :]])
def test_linen(fn, mask):
    close(linen_layer(fn)(X, mask=mask), linen_layer()(X, mask=mask))
    close(linen_layer(fn)(X, X[:, :5]), linen_layer()(X, X[:, :5]))


def test_causal():
    causal = nnx.make_causal_mask(X[..., 0])
    close(layer(EXACT)(X, is_causal=True), layer()(X, mask=causal))
    close(linen_layer(attention_fn(softmax_attention, is_causal=True))(X), linen_layer()(X, mask=causal))
    first = layer(attention_fn(rfa, rng=0, num_samples=8))(X, is_causal=True)
    later = layer(attention_fn(rfa, rng=0, num_samples=8))(X.at[:, 9:].set(0), is_causal=True)
    np.testing.assert_array_equal(first[:, :9], later[:, :9])


def test_decoding_is_exact():
    exact, ours = layer(decode=True), layer(attention_fn(lara), decode=True)
    for one in (exact, ours):
        one.init_cache(X.shape)
    for token in range(4):
        close(ours(X[:, token : token + 1]), exact(X[:, token : token + 1]))


def test_gradients_and_training():
    """The exact one's gradients; and the estimators learn."""

    def loss(one):
        return jnp.mean((one(X) - jnp.flip(X, axis=1)) ** 2)

    theirs, ours = (jax.tree.leaves(nnx.grad(loss)(layer(fn))) for fn in (None, EXACT))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    for fn in (attention_fn(eva, window=4, num_groups=4), attention_fn(lara, num_landmarks=4)):
        one = layer(fn)
        before = loss(one)
        for _ in range(5):
            gradient = nnx.grad(loss)(one)
            nnx.update(one, jax.tree.map(lambda x, g: x - 0.3 * g, nnx.state(one, nnx.Param), gradient))
        assert loss(one) < 0.97 * before


def test_what_is_not_supported_is_refused():
    with pytest.raises(NotImplementedError, match="mask: expected one that is the same for all queries"):
        layer(EXACT)(X, mask=nnx.make_causal_mask(X[..., 0]))
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        layer(EXACT, dropout_rate=0.1)(X, deterministic=False)
    close(layer(EXACT, dropout_rate=0.1)(X, deterministic=True), layer()(X))
    with pytest.raises(NotImplementedError, match="sow_weights"):
        layer(EXACT)(X, sow_weights=True)
    with pytest.raises(NotImplementedError, match="bias"):
        EXACT(*[X[:, :, None]] * 3, bias=jnp.zeros((N, N)))
    with pytest.raises(TypeError, match="estimator"):
        attention_fn("eva")
    with pytest.raises(TypeError, match="key_mask: expected of the call"):
        layer(attention_fn(eva, key_mask=KEEP))(X)


def test_a_scale_of_ones_own_holds_in_decoding():
    fn = attention_fn(softmax_attention, scale=3.0)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 4, 8)) for i in range(3))
    close(fn(q[:, :1], k, v), fn(q, k, v)[:, :1])
