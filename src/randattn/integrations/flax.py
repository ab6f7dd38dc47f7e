"""Flax: the estimators as `attention_fn` of the attention modules of nnx and linen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._layout import estimate, key_mask_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax


def attention_fn(estimator: Callable[..., jax.Array], /, **options: Any) -> Callable[..., jax.Array]:
    """Make an `attention_fn` of an estimator.

    Parameters
    ----------
    estimator : function
        `randattn.eva` or another.
    **options
        As for the estimator. `is_causal` here is for linen, whose modules say it by a mask alone.

    Returns
    -------
    function
        With the signature of `flax.nnx.dot_product_attention`, which `flax.linen`'s modules call as well:
        `query` (..., N, H, D), `key` (..., M, H, D), `value` (..., M, H, E). It raises NotImplementedError
        for what estimators have not: a mask that is not the same for all queries, a bias, dropout of
        weights, weights to be sown.

    Raises
    ------
    TypeError
        An estimator that cannot be called.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from randattn import eva
    >>> from randattn.integrations.flax import attention_fn
    >>> layer = nnx.MultiHeadAttention(
    ...     2, 8, attention_fn=attention_fn(eva, window=16), decode=False, rngs=nnx.Rngs(0)
    ... )
    >>> layer(jnp.ones((1, 50, 8))).shape
    (1, 50, 8)
    """
    if not callable(estimator):
        raise TypeError(f"estimator: expected a function, got {estimator!r}")

    def attention(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,  # noqa: ARG001
        dropout_rng: jax.Array | None = None,  # noqa: ARG001
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,  # noqa: ARG001
        module: Any = None,
        is_causal: bool = False,
    ) -> jax.Array:
        if bias is not None:
            raise NotImplementedError("bias: expected None: estimators have no bias of pairs")
        if dropout_rate and not deterministic:
            raise NotImplementedError(
                f"dropout_rate: expected 0, got {dropout_rate}: no weights are there to drop"
            )
        if module is not None:
            raise NotImplementedError("sow_weights: expected False: no weights are there to sow")
        q, k, v = (x.swapaxes(-2, -3) for x in (query, key, value))
        if dtype is not None:
            q, k, v = (x.astype(dtype) for x in (q, k, v))
        out = estimate(
            estimator,
            options,
            q,
            k,
            v,
            is_causal=is_causal,
            # Flax makes masks of floats, too: what is not zero is there.
            key_mask=key_mask_of(None if mask is None else mask.astype(bool), k.shape[-2]),
            enable_gqa=q.shape[-3] != k.shape[-3],
        )
        return out.swapaxes(-2, -3)

    return attention
