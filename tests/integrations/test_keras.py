"""Keras's attention layers, exact and estimated, on the back end that KERAS_BACKEND names."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from randattn.integrations.keras import GroupQueryAttention, MultiHeadAttention

# Keras's own variables, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
N, FEATURES = 20, 12
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, N, FEATURES)).astype("float32")
Y = RNG.standard_normal((2, 7, FEATURES)).astype("float32")
KEEP = np.arange(N) < np.array([[N], [13]])
LAYERS = [
    (keras.layers.MultiHeadAttention, MultiHeadAttention, {"num_heads": 3, "key_dim": 4}),
    (
        keras.layers.GroupQueryAttention,
        GroupQueryAttention,
        {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2},
    ),
]
EXACT = [("softmax_attention", {}), ("eva", {"window": N})]


def both(theirs, ours, sizes, estimator, options):
    """The two layers with the same weights."""
    one, other = theirs(**sizes), ours(**sizes, estimator=estimator, options=options)
    for each in (one, other):
        each(X, X)
    other.set_weights(one.get_weights())
    return one, other


def close(x, y):
    x, y = map(keras.ops.convert_to_numpy, (x, y))
    np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("estimator", "options"), EXACT)
@pytest.mark.parametrize(("theirs", "ours", "sizes"), LAYERS)
def test_as_keras_own(theirs, ours, sizes, estimator, options):
    one, other = both(theirs, ours, sizes, estimator, options)
    close(other(X, X), one(X, X))
    close(other(X, X, value_mask=KEEP), one(X, X, value_mask=KEEP))
    close(other(X, X, attention_mask=KEEP[:, None]), one(X, X, attention_mask=KEEP[:, None]))
    close(other(X, X, use_causal_mask=True), one(X, X, use_causal_mask=True))
    for_all = KEEP[1:, None]
    close(other(X, X, attention_mask=for_all), one(X, X, attention_mask=for_all))
    both_masks = {"value_mask": KEEP, "use_causal_mask": True}
    close(other(X, X, **both_masks), one(X, X, **both_masks))
    if estimator == "softmax_attention":
        close(other(Y, X), one(Y, X))
    close(other(Y[:, :1], X, value_mask=KEEP), one(Y[:, :1], X, value_mask=KEEP))


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("rfa", {"rng": 0, "num_samples": 8}),
        ("ra", {"rng": 0}),
        ("lara", {"num_landmarks": 4}),
        ("eva", {"num_groups": 4, "window": 4}),
        ("adaptive_eva", {"group_size": 4, "num_exact": 4}),
    ],
)
def test_estimators_and_padding(estimator, options):
    """Tokens under the mask are not seen; a Keras mask, which embeddings make, is one."""
    layer = MultiHeadAttention(2, 4, estimator=estimator, options=options)
    if keras.backend.backend() == "tensorflow" and "exact" in options:
        with pytest.raises(NotImplementedError, match="exact"):
            layer(X, X)
        return
    first = layer(X, X, value_mask=KEEP)
    other = np.where(KEEP[..., None], X, 9).astype("float32")
    if estimator in ("rfa", "ra"):
        close(layer(X, other, value_mask=KEEP), first)
    embedded = keras.layers.Embedding(30, FEATURES, mask_zero=True)
    tokens = np.where(KEEP, RNG.integers(1, 30, (2, N)), 0)
    x = embedded(tokens)
    by_mask = keras.ops.convert_to_numpy(layer(x, x))[KEEP]
    unmasked = keras.ops.convert_to_numpy(layer(*[keras.ops.convert_to_numpy(x)] * 2))[KEEP]
    assert np.abs(unmasked - by_mask).max() > 1e-4
    # Keras tells which queries are padding, so that no estimator pools them.
    (table,) = embedded.get_weights()
    table[0] = 9
    embedded.set_weights([table])
    x = embedded(tokens)
    close(keras.ops.convert_to_numpy(layer(x, x))[KEEP], by_mask)


def test_a_model_is_saved_and_loaded(tmp_path):
    inputs = keras.Input((N, FEATURES))
    out = MultiHeadAttention(2, 4, estimator="lara", options={"num_landmarks": 4})(inputs, inputs)
    out = GroupQueryAttention(4, 2, 1, estimator="eva", options={"window": 5})(out, out)
    model = keras.Model(inputs, out)
    path = tmp_path / "model.keras"
    model.save(path)
    close(keras.models.load_model(path).predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.skipif(keras.backend.backend() == "numpy", reason="NumPy has no gradients")
def test_training():
    inputs = keras.Input((N, FEATURES))
    model = keras.Model(
        inputs, MultiHeadAttention(2, 4, options={"window": 4, "num_groups": 5})(inputs, inputs)
    )
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(X, X[:, ::-1], epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="for TensorFlow")
@pytest.mark.parametrize(
    ("estimator", "options"), [("eva", {"window": 4}), ("lara", {"num_landmarks": 4}), ("rfa", {"rng": 0})]
)
def test_tensorflow_computes_what_jax_does(estimator, options):
    import jax.numpy as jnp
    import tensorflow as tf

    from randattn.integrations._layer import ESTIMATORS

    layer = MultiHeadAttention(2, 4, estimator=estimator, options=options)
    q, k, v = RNG.standard_normal((3, 5, N, 2, 4)).astype("float32")

    def attend(q, k, v):
        return layer._compute_attention(q, k, v, layer._compute_attention_mask(q, v))[0]

    program = tf.function(attend, input_signature=[tf.TensorSpec((None, N, 2, 4))] * 3)
    for size in (5, 1):
        heads_first = [jnp.asarray(x[:size].swapaxes(1, 2)) for x in (q, k, v)]
        expected = np.stack(
            [ESTIMATORS[estimator].function(*each, **options) for each in zip(*heads_first, strict=True)]
        )
        close(program(q[:size], k[:size], v[:size]), expected.swapaxes(1, 2))
    with tf.GradientTape() as tape:
        x = tf.constant(q)
        tape.watch(x)
        total = tf.reduce_sum(program(x, k, v) ** 2)
    slope = tape.gradient(total, x).numpy()
    step = 1e-2 * slope / np.abs(slope).max()
    grown = float(tf.reduce_sum(program(q + step, k, v) ** 2) - tf.reduce_sum(program(q - step, k, v) ** 2))
    np.testing.assert_allclose(grown, 2 * (slope * step).sum(), rtol=0.05)


def test_what_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="estimator: expected one of"):
        MultiHeadAttention(2, 4, estimator="performer")
    for option in ({"dropout": 0.1}, {"sliding_window": 3}):
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            MultiHeadAttention(2, 4, **option)
    with pytest.raises(NotImplementedError, match="dropout"):
        MultiHeadAttention(2, 4, None, 0.5)
    with pytest.raises(NotImplementedError, match="dropout"):
        GroupQueryAttention(4, 2, 1, 0.5)
    image = np.zeros((2, 3, 4, FEATURES), dtype="float32")
    with pytest.raises(NotImplementedError, match="query: expected"):
        MultiHeadAttention(2, 4, attention_axes=(1,))(image, image)
    layer = MultiHeadAttention(2, 4)
    with pytest.raises(NotImplementedError, match="attention_mask"):
        layer(X, X, attention_mask=np.tri(N, dtype=bool)[None])
    for each in (layer, GroupQueryAttention(4, 2, 1)):
        with pytest.raises(NotImplementedError, match="return_attention_scores"):
            each(X, X, return_attention_scores=True)
