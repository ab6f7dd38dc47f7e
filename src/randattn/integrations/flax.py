"""Flax: the estimators as `attention_fn` of its attention modules, and the layer of the papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from randattn._core.describe import shown

from ._layer import attended, buckets, check_layer, check_relative_bias
from ._layout import estimate, key_mask_of


def attention_fn(estimator: Callable[..., jax.Array], /, **options: Any) -> Callable[..., jax.Array]:
    """Make an `attention_fn` of an estimator.

    Parameters
    ----------
    estimator : function
        An estimator, such as `randattn.eva`.
    **options
        Options of the estimator. Modules of linen need `is_causal` here, since they say it by a mask alone.

    Returns
    -------
    function
        A function with the signature of `flax.nnx.dot_product_attention`, which modules of `flax.linen` call
        as well: `query` (..., N, H, D), `key` (..., M, H, D), `value` (..., M, H, E). It raises
        NotImplementedError for a mask that is not the same for all queries, a bias, dropout of weights, and
        weights to be sown.

    Raises
    ------
    TypeError
        An estimator that is not callable.

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
        raise TypeError(f"estimator: expected a function, got {shown(estimator)}")

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
            raise NotImplementedError("bias: expected None: estimators take no bias of pairs")
        if dropout_rate and not deterministic:
            raise NotImplementedError(
                f"dropout_rate: expected 0, got {shown(dropout_rate)}: estimators have no weights to drop"
            )
        # Flax passes the module exactly where the weights are to be sown in it.
        if module is not None:
            raise NotImplementedError("sow_weights: expected False: estimators have no weights to sow")
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
            # Flax's masks can be floats, in which every number but zero means attend.
            key_mask=key_mask_of(None if mask is None else mask.astype(bool), k.shape[-2]),
            enable_gqa=q.shape[-3] != k.shape[-3],
        )
        return out.swapaxes(-2, -3)

    return attention


class Attention(nnx.Module):
    """Multi-head attention by an estimator, with the learned landmarks and the relative bias of the papers.

    Parameters
    ----------
    features : int
        Number of features of the inputs, of all heads together, and of the results.
    num_heads : int
        Number of heads, a divisor of `features`.
    estimator : {"eva", "adaptive_eva", "lara", "rfa", "ra", "softmax_attention"}, default "eva"
        Name of the estimator.
    options : dict, optional
        Options of the estimator.
    learned_landmarks : bool, default False
        For lara and eva: landmarks are ``LayerNorm(Linear(mean))`` of each segment's queries and keys.
    relative_bias : bool, default False
        For eva: T5's relative bias inside the window, learned for each head.
    num_buckets, max_distance : int, default 32, 128
        Number of buckets of the relative bias, and the distance from which on all keys are in the last one.
    is_causal : bool, default False
        Query n sees the keys up to n.
    bias : bool, default True
        True gives the projections a bias.
    rngs : nnx.Rngs
        Random numbers of the parameters; its stream `draws` serves the draws of the estimator.

    Raises
    ------
    ValueError
        Sizes and options that do not fit.

    Notes
    -----
    After ``train()`` each call draws anew. After ``eval()`` lara and eva draw nothing, rfa and ra draw from
    the seed 0. An `rng` or `noise` of a call has precedence. `load` takes the weights of
    `randattn.integrations.torch.Attention`; both layers then give the same results.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from randattn.integrations.flax import Attention
    >>> options = {"num_groups": 8, "window": 16}
    >>> layer = Attention(32, 4, options=options, learned_landmarks=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 100, 32))).shape
    (2, 100, 32)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        estimator: str = "eva",
        options: dict[str, Any] | None = None,
        learned_landmarks: bool = False,
        relative_bias: bool = False,
        num_buckets: int = 32,
        max_distance: int = 128,
        is_causal: bool = False,
        bias: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        options = dict(options or {})
        check_layer(features, num_heads, estimator, learned_landmarks=learned_landmarks)
        if relative_bias:
            check_relative_bias(estimator, options, num_buckets, max_distance, is_causal=is_causal)
        self.num_heads, self.estimator, self.is_causal = num_heads, estimator, is_causal
        self.options = nnx.static(options)
        self.deterministic = False
        self.rngs = rngs
        self.query, self.key, self.value, self.out = (
            nnx.Linear(features, features, use_bias=bias, rngs=rngs) for _ in range(4)
        )

        def landmark() -> nnx.Sequential | None:
            size = features // num_heads
            if not learned_landmarks:
                return None
            # Flax's default epsilon, 1e-6, would make results differ from those of PyTorch's layer.
            norm = nnx.LayerNorm(size, epsilon=1e-5, rngs=rngs)
            return nnx.Sequential(nnx.Linear(size, size, rngs=rngs), norm)

        self.query_landmark, self.key_landmark = landmark(), landmark()
        normal = nnx.initializers.normal(0.02)
        self.relative_bias = (
            nnx.Embed(num_buckets, num_heads, embedding_init=normal, rngs=rngs) if relative_bias else None
        )
        self.places = nnx.static((options.get("window", 64), num_buckets, max_distance))

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        key_mask: jax.Array | None = None,
        query_mask: jax.Array | None = None,
        **own: Any,
    ) -> jax.Array:
        """Attend from `x` (..., N, F) to `context` (..., M, F), by default to itself.

        `key_mask` (..., M) and `query_mask` (..., N) are False for padding. Without a context `query_mask` is
        `key_mask` by default. Further options are those of the estimator.
        """
        bias = None
        if self.relative_bias is not None:
            places = jnp.asarray(buckets(*self.places, is_causal=self.is_causal))
            bias = jnp.moveaxis(self.relative_bias(places), -1, 0)
        draw = None if self.deterministic else self._draw
        return attended(self, x, context, key_mask, query_mask, own, window_bias=bias, draw=draw)

    def _draw(self) -> jax.Array:
        return self.rngs.draws()

    def load(self, weights: Mapping[str, Any]) -> None:
        """Load the weights of PyTorch's layer: its ``state_dict()``, as NumPy arrays or objects like them.

        Raises
        ------
        KeyError
            A missing weight.
        ValueError
            A weight of another shape, or one that this layer does not have.
        """
        layers: dict[str, Any] = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "out": self.out,
            "relative_bias": self.relative_bias,
        }
        for name, both in (("query_landmark", self.query_landmark), ("key_landmark", self.key_landmark)):
            if both is not None:
                layers |= {f"{name}.{number}": layer for number, layer in enumerate(both.layers)}
        taken = set()

        def take(parameter: Any, name: str, *, turned: bool = False) -> None:
            # A kernel of Flax is (inputs, outputs), a weight of PyTorch (outputs, inputs).
            weight = jnp.asarray(weights[name])
            weight = weight.T if turned else weight
            if weight.shape != parameter.shape:
                raise ValueError(f"{name}: expected shape {parameter.shape}, got {weight.shape}")
            parameter[...] = weight
            taken.add(name)

        for name, layer in layers.items():
            if isinstance(layer, nnx.Linear):
                take(layer.kernel, f"{name}.weight", turned=True)
            elif isinstance(layer, nnx.LayerNorm):
                take(layer.scale, f"{name}.weight")
            elif layer is not None:
                take(layer.embedding, f"{name}.weight")
            if getattr(layer, "bias", None) is not None:
                take(layer.bias, f"{name}.bias")
        if set(weights) - taken:
            raise ValueError(f"weights: this layer has no {', '.join(sorted(set(weights) - taken))}")
