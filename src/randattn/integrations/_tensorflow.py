"""Compute on TensorFlow's tensors by programs of JAX, since they are not arrays of the array API."""

from __future__ import annotations

from collections.abc import Callable

from randattn._core.library import Array


def by_jax(function: Callable[..., Array], arrays: int) -> Callable[..., Array]:
    """Make a function of TensorFlow's tensors from one of JAX arrays, which TensorFlow can differentiate.

    The first axis is the batch, whose length may be unknown. It is that of the first tensor; the others are
    broadcast to it. `function` does not see the batch: all of it has the same draws.

    Raises
    ------
    ImportError
        If JAX is not installed.
    """
    try:
        import jax
        from jax.experimental import jax2tf
    except ImportError as error:
        raise ImportError(
            "randattn on Keras's TensorFlow back end computes by programs of JAX: pip install jax"
        ) from error
    import tensorflow as tf

    # A symbolic batch serves all lengths with one program; vmap hides it from code that must know its sizes.
    program = jax2tf.convert(jax.vmap(function), polymorphic_shapes=["(batch, ...)"] * arrays)

    def whole(first: Array, *others: Array) -> Array:
        batch = tf.shape(first)[0]
        return program(first, *(tf.broadcast_to(x, (batch, *x.shape[1:])) for x in others))

    # TensorFlow traces it once for each kind of tensors. Autograph would rewrite JAX's own Python code.
    traced: Callable[..., Array] = tf.function(whole, autograph=False)
    return traced
