"""TensorFlow's tensors are not of the array API: JAX's programs compute on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = Any


def by_jax(function: Callable[..., Array], arrays: int) -> Callable[..., Array]:
    """A function of TensorFlow's tensors from one of JAX arrays, to be differentiated and traced as any.

    The first axis, whose length may be unknown, is the batch, the first array's: others are broadcast to it.
    `function` does not see it: what it draws is the same for all of it.

    Raises
    ------
    ImportError
        Where JAX is not installed.
    """
    try:
        import jax
        from jax.experimental import jax2tf
    except ImportError as error:
        raise ImportError(
            "randattn on Keras's TensorFlow back end computes by JAX's programs: pip install jax"
        ) from error
    import tensorflow as tf

    program = jax2tf.convert(jax.vmap(function), polymorphic_shapes=["(batch, ...)"] * arrays)

    def whole(first: Array, *others: Array) -> Array:
        batch = tf.shape(first)[0]
        return program(first, *(tf.broadcast_to(x, (batch, *x.shape[1:])) for x in others))

    # Traced once for each kind of arrays, by TensorFlow alone.
    traced: Callable[..., Array] = tf.function(whole, autograph=False)
    return traced
