"""Keras 3: its attention layers with estimators inside, on all back ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from randattn._core.describe import shown
from randattn._estimators.registry import ESTIMATORS

from ._layer import check_estimator
from ._layout import estimate

Array = Any
_MODULE = "randattn"


class _Masks(NamedTuple):
    """The masks of keys and queries, which take the place of Keras's mask of pairs."""

    keys: Array | None
    queries: Array | None
    is_causal: bool


class _Estimated:
    """The common part of the two layers: an estimator in place of Keras's attention weights."""

    def __init__(self, *args: Any, estimator: str = "eva", options: dict[str, Any] | None = None, **own: Any):
        super().__init__(*args, **own)
        check_estimator(estimator)
        for name in ("dropout", "sliding_window"):
            value = getattr(self, f"_{name}", getattr(self, name, None))
            if value:
                raise NotImplementedError(
                    f"{name}: expected none, got {shown(value)}: estimators do not support it"
                )
        # Programs of TensorFlow, kept by masks: each new one would be traced and compiled.
        self.estimator, self.options = estimator, dict(options or {})
        self._programs: dict[Any, Callable[..., Array]] = {}

    def get_config(self) -> dict[str, Any]:
        config = {"estimator": self.estimator, "options": self.options}
        return {**super().get_config(), **config}  # type: ignore[misc]

    def _compute_attention_mask(
        self,
        query: Array,  # noqa: ARG002
        value: Array,
        query_mask: Array | None = None,
        value_mask: Array | None = None,
        key_mask: Array | None = None,
        attention_mask: Array | None = None,
        use_causal_mask: bool = False,
    ) -> _Masks:
        masks = [keras.ops.cast(mask, "bool") for mask in (value_mask, key_mask) if mask is not None]
        if attention_mask is not None:
            if len(attention_mask.shape) != 3 or tuple(attention_mask.shape[1:]) != (1, value.shape[1]):
                raise NotImplementedError(
                    f"attention_mask: expected (batch, 1, {value.shape[1]}), the same for all queries, "
                    f"got {tuple(attention_mask.shape)}; for a causal one pass use_causal_mask"
                )
            masks.append(keras.ops.cast(attention_mask[..., 0, :], "bool"))
        # A key is seen if no mask hides it. Keras would join these masks and the queries' in one of pairs.
        keys = None
        for mask in masks:
            keys = mask if keys is None else keras.ops.logical_and(keys, mask)
        queries = None if query_mask is None else keras.ops.cast(query_mask, "bool")
        return _Masks(keys, queries, use_causal_mask)

    def _compute_attention(
        self,
        query: Array,
        key: Array,
        value: Array,
        attention_mask: _Masks,
        training: bool | None = None,  # noqa: ARG002
        return_attention_scores: bool = False,
    ) -> tuple[Array, None]:
        if return_attention_scores or getattr(self, "_return_attention_scores", False):
            raise NotImplementedError(
                "return_attention_scores: expected False: estimators have no weights to return"
            )
        if len(query.shape) != 4:
            raise NotImplementedError(
                f"query: expected (batch, tokens, features), got {len(query.shape) - 1} axes"
            )
        # Keras has (batch, tokens, heads, features); estimators have the heads first.
        q, k, v = (keras.ops.swapaxes(x, 1, 2) for x in (query, key, value))
        masks = {
            name: mask[:, None, :]
            for name, mask in (("key_mask", attention_mask.keys), ("query_mask", attention_mask.queries))
            if mask is not None
        }
        out = self._estimate((*masks,), attention_mask.is_causal)(q, k, v, *masks.values())
        return keras.ops.swapaxes(out, 1, 2), None

    def _estimate(self, names: tuple[str, ...], is_causal: bool) -> Callable[..., Array]:
        """Return the estimator as a function of q, k, v and of masks with these names."""

        def function(q: Array, k: Array, v: Array, *masks: Array) -> Array:
            named = {"key_mask": None, **dict(zip(names, masks, strict=True))}
            own = ESTIMATORS[self.estimator].function
            return estimate(own, self.options, q, k, v, is_causal=is_causal, **named)

        if keras.backend.backend() != "tensorflow":
            return function
        if self.estimator == "adaptive_eva":
            raise NotImplementedError("adaptive_eva: TensorFlow cannot read JAX's top_k")
        from ._tensorflow import by_jax

        if (names, is_causal) not in self._programs:
            self._programs[names, is_causal] = by_jax(function, 3 + len(names))
        return self._programs[names, is_causal]


@keras.saving.register_keras_serializable(_MODULE)
class MultiHeadAttention(_Estimated, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with an estimator inside.

    Parameters
    ----------
    *args
        Arguments of Keras's own layer. The weights are the same.
    estimator : {"eva", "adaptive_eva", "lara", "rfa", "ra", "softmax_attention"}, default "eva"
        Name of the estimator.
    options : dict, optional
        Options of the estimator.
    **own
        Keywords of Keras's own layer.

    Raises
    ------
    ValueError
        A name that no estimator has.
    NotImplementedError
        Dropout of weights, or a sliding window. In a call: a mask that is not the same for all queries, or
        weights to be returned. None of these is ignored.

    Notes
    -----
    Keras masks, `use_causal_mask`, and an `attention_mask` (batch, 1, keys) are honoured. On the TensorFlow
    back end programs of JAX compute (`jax.experimental.jax2tf`): JAX must be installed, the number of tokens
    must be known, and a whole batch has the same draws. There adaptive_eva raises NotImplementedError.

    Examples
    --------
    >>> import os
    >>> _ = os.environ.setdefault("KERAS_BACKEND", "jax")
    >>> import numpy as np
    >>> from randattn.integrations.keras import MultiHeadAttention
    >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, estimator="eva", options={"window": 16})
    >>> x = np.ones((1, 50, 8), dtype="float32")
    >>> layer(x, x).shape == (1, 50, 8)
    True
    """


@keras.saving.register_keras_serializable(_MODULE)
class GroupQueryAttention(_Estimated, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with an estimator inside.

    The parameters `estimator` and `options` are those of `MultiHeadAttention`.
    """
