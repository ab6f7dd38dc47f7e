"""Functions that the layers of PyTorch and Flax share: pooling, T5's buckets, heads, options."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from randattn._core.describe import shown
from randattn._core.inputs import hide, prepare
from randattn._core.library import Array, namespace
from randattn._estimators.registry import ESTIMATORS

if TYPE_CHECKING:
    import numpy as np


def check_estimator(name: str) -> None:
    """Raise if no row of the registry has this name."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {shown(name)}")


def draws_in_evaluation(name: str) -> dict[str, Any]:
    """Return the options of evaluation: a fixed seed for an estimator that needs draws, or else none."""
    return {"rng": 0} if ESTIMATORS[name].draws == "always" else {}


def check_layer(
    features: int,
    num_heads: int,
    estimator: str,
    options: dict[str, Any],
    *,
    learned_landmarks: bool,
    relative_bias: bool,
    num_buckets: int,
    max_distance: int,
    is_causal: bool,
) -> None:
    """Raise if sizes and options do not fit together."""
    check_estimator(estimator)
    row = ESTIMATORS[estimator]
    if features % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {features} features, got {shown(num_heads)}")
    if learned_landmarks and row.landmarks is None:
        having = " and ".join(name for name, one in ESTIMATORS.items() if one.landmarks is not None)
        raise ValueError(f"learned_landmarks: {having} have landmarks, {estimator} has none")
    if relative_bias:
        # Half of a direction's buckets are single distances. Without one of them, or with a largest distance
        # that they reach, the logarithm in `buckets` would be undefined.
        single = num_buckets // (2 if is_causal else 4)
        if single < 1 or num_buckets % 2 or max_distance <= single:
            raise ValueError(
                f"num_buckets: expected an even number, and max_distance above the {single} single ones, "
                f"got {num_buckets} and {max_distance}"
            )
    if relative_bias and ("window_bias" not in row.options or not isinstance(options.get("window", 64), int)):
        raise ValueError("relative_bias: expected estimator='eva' with a window of tokens in a row")


def split_heads(x: Array, num_heads: int) -> Array:
    """Split features by heads: (..., N, H D) -> (..., H, N, D)."""
    xp = namespace(x)
    x = xp.reshape(x, (*x.shape[:-1], num_heads, x.shape[-1] // num_heads))
    return xp.moveaxis(x, -2, -3)


def merge_heads(x: Array) -> Array:
    """Join the features of all heads: (..., H, N, D) -> (..., N, H D)."""
    xp = namespace(x)
    x = xp.moveaxis(x, -3, -2)
    return xp.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def masks_of(
    x: Array, context: Array | None, key_mask: Array | None, query_mask: Array | None
) -> tuple[Array, Array, dict[str, Any]]:
    """Return the tokens (..., N, F) and (..., M, F) with zeros for padding, and the masks of all heads.

    Gradients of the projections are products with the tokens: NaN in padding, times zero, would be NaN.
    """
    # In self-attention one mask serves queries and keys.
    if context is None:
        context, query_mask = x, key_mask if query_mask is None else query_mask
    masks = {
        name: None if mask is None else mask[..., None, :]
        for name, mask in (("key_mask", key_mask), ("query_mask", query_mask))
    }
    return hide(x, query_mask), hide(context, key_mask), masks


def pooled(
    estimator: str,
    q: Array,
    k: Array,
    options: dict[str, Any],
    *,
    is_causal: bool,
    key_mask: Array | None,
    query_mask: Array | None,
) -> tuple[Array, Array]:
    """Return the mean queries and mean keys (..., H, C, D) that the estimator has as its own landmarks."""
    # Unscaled: `landmarks` are in the units of q and k.
    x = prepare(
        q, k, k, scale=None, key_mask=key_mask, query_mask=query_mask, is_self=False, enable_gqa=False
    )
    make = ESTIMATORS[estimator].landmarks
    assert make is not None
    return make(x, options, is_causal)


def buckets(window: int, num_buckets: int, max_distance: int, *, is_causal: bool) -> np.ndarray:
    """Return T5's bucket of each query and key of a window, (W, W) (arXiv 1910.10683, section 2.1).

    Half of the buckets are single distances. The other half are ranges of distances that grow geometrically,
    up to `max_distance`. Without `is_causal` half of all buckets are for keys that come later.
    """
    import numpy as np

    place = np.arange(window)
    later = place[None, :] - place[:, None]
    # Equation: bucket = s + (count - s) log(distance / s) / log(max_distance / s) from s = count / 2 on. The
    # distance is at least one, or its logarithm would be -inf, which no integer holds.
    count = num_buckets if is_causal else num_buckets // 2
    distance = np.maximum(-later, 0) if is_causal else np.abs(later)
    single = count // 2
    grown = np.log(np.maximum(distance, 1) / single) / math.log(max_distance / single) * (count - single)
    far = np.minimum(single + grown.astype(np.int64), count - 1)
    found: np.ndarray = np.where(distance < single, distance, far) + (not is_causal) * count * (later > 0)
    return found
