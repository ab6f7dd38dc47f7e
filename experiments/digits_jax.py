"""The digits' training, in JAX: the same architecture of Flax's layers, with Flax's initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from randattn.integrations.flax import Attention

from .digits import batches, read_digits

if TYPE_CHECKING:
    from .runs import Mechanism, Run, Say


class Block(nnx.Module):
    """Attention and a perceptron, each after a norm."""

    def __init__(self, features: int, heads: int, layer: dict[str, Any], rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(features, epsilon=1e-5, rngs=rngs) for _ in range(2)])
        self.attention = Attention(features, heads, rngs=rngs, **layer)
        self.widen = nnx.Linear(features, 4 * features, rngs=rngs)
        self.narrow = nnx.Linear(4 * features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, F) to tokens."""
        x = x + self.attention(self.norms[0](x))
        return x + self.narrow(nnx.gelu(self.widen(self.norms[1](x)), approximate=False))


class Classifier(nnx.Module):
    """A vision transformer with a token a pixel; the mean of all tokens gives the class."""

    def __init__(self, sizes: dict[str, Any], mechanism: Mechanism, rngs: nnx.Rngs) -> None:
        features = sizes["features"]
        self.pixel = nnx.Linear(1, features, rngs=rngs)
        self.places = nnx.Param(0.5 * jax.random.normal(rngs.params(), (sizes["tokens"], features)))
        self.blocks = nnx.List(
            [Block(features, sizes["heads"], mechanism.layer(), rngs) for _ in range(sizes["depth"])]
        )
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(features, sizes["classes"], rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Return logits (B, classes) of pixels (B, tokens)."""
        x = self.pixel(pixels[..., None]) + self.places[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=-2))


def train(run: Run, mechanism: Mechanism, say: Say) -> dict[str, float]:
    """Train one model."""
    if (jax.default_backend() == "cpu") != (run.device == "cpu"):
        raise RuntimeError(f"jax: expected to compute on {run.device}, got {jax.default_backend()}")
    settings, rng = run.settings, np.random.default_rng(run.seed)
    (pixels, classes), test = read_digits()
    model = Classifier(settings, mechanism, nnx.Rngs(params=run.seed, draws=run.seed + 1))
    epochs, size = settings["epochs"], settings["batch"]
    steps = epochs * (len(pixels) // size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings["rate"], settings["warm_up"], steps)
    way = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=settings["weight_decay"],
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
    )
    optimizer = nnx.Optimizer(model, way, wrt=nnx.Param)

    def loss_of(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, slope = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, slope)
        return loss

    right = nnx.jit(lambda model, x, y: jnp.mean(jnp.argmax(model(x), axis=-1) == y))
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        for index in batches(len(pixels), size, rng):
            loss = step(model, optimizer, pixels[index], classes[index])
        model.eval()
        accuracy = float(right(model, *test))
        say(epoch + 1, epochs, f"accuracy {accuracy:.3f}")
    return {"accuracy": round(accuracy, 6), "loss": round(float(loss), 6)}
