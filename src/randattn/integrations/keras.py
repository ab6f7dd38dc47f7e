"""Keras 3: its attention layers with estimators inside, on all its back ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from randattn._core.describe import shown
from randattn._estimators.registry import ESTIMATORS

from ._layer import check_estimator
from ._layout import estimate

if TYPE_CHECKING:
    from collections.abc import Callable

Array = Any
_MODULE = "randattn"


class _Masks(NamedTuple):
    """In the place of a mask of pairs."""

    keys: Array | None
    queries: Array | None
    is_causal: bool


class _Estimated:
    """The part of the two layers beyond Keras's: an estimator in the place of the weights."""

    def __init__(self, *args: Any, estimator: str = "eva", options: dict[str, Any] | None = None, **own: Any):
        super().__init__(*args, **own)
        check_estimator(estimator)
        for name in ("dropout", "sliding_window"):
            value = getattr(self, f"_{name}", getattr(self, name, None))
            if value:
                raise NotImplementedError(
                    f"{name}: expected none, got {shown(value)}: estimators have no such thing"
                )
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
                "return_attention_scores: expected False: there are no weights to return"
            )
        if len(query.shape) != 4:
            raise NotImplementedError(
                f"query: expected (batch, tokens, features), got {len(query.shape) - 1} axes"
            )
        q, k, v = (keras.ops.swapaxes(x, 1, 2) for x in (query, key, value))
        masks = {
            name: mask[:, None, :]
            for name, mask in (("key_mask", attention_mask.keys), ("query_mask", attention_mask.queries))
            if mask is not None
        }
        out = self._estimate((*masks,), attention_mask.is_causal)(q, k, v, *masks.values())
        return keras.ops.swapaxes(out, 1, 2), None

    def _estimate(self, names: tuple[str, ...], is_causal: bool) -> Callable[..., Array]:
        """Return the estimator as a function of q, k, v and of masks by these names."""

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
        As for Keras's own layer, whose weights it has.
    estimator : {"eva", "adaptive_eva", "lara", "rfa", "ra", "softmax_attention"}, default "eva"
        The estimator.
    options : dict, optional
        As for the estimator.
    **own
        As for Keras's own layer.

    Raises
    ------
    ValueError
        Another name of an estimator.
    NotImplementedError
        Dropout of weights, a sliding window; when called, masks that are not the same for all queries, and
        weights to be returned. Never ignored.

    Notes
    -----
    Keras masks, `use_causal_mask`, and an `attention_mask` (batch, 1, keys) are honoured. On the TensorFlow
    back end JAX's programs compute (`jax.experimental.jax2tf`): JAX must be installed, the number of tokens
    known, and a whole batch has the same draws; adaptive_eva raises NotImplementedError there.

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

    See `MultiHeadAttention`, whose further parameters it has.
    """
