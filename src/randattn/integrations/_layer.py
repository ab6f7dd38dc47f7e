"""Functions that the layers of PyTorch and Flax share: checks, attention of all heads, T5's buckets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from randattn._core.describe import shown
from randattn._core.inputs import hide, prepare
from randattn._core.library import Array, namespace
from randattn._estimators.registry import ESTIMATORS

from ._layout import estimate

# Options of lara and eva that change their draws alone.
_OF_DRAWS = ("antithetic", "noise_scale")

if TYPE_CHECKING:
    import numpy as np


def check_estimator(name: str) -> None:
    """Raise if no row of the registry has this name."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {shown(name)}")


def check_layer(features: int, num_heads: int, estimator: str, *, learned_landmarks: bool) -> None:
    """Raise if the features do not fit the heads, or the estimator has no landmarks to learn."""
    check_estimator(estimator)
    if features % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {features} features, got {shown(num_heads)}")
    if learned_landmarks and ESTIMATORS[estimator].landmarks is None:
        having = " and ".join(name for name, one in ESTIMATORS.items() if one.landmarks is not None)
        raise ValueError(f"learned_landmarks: {having} have landmarks, {estimator} has none")


def check_relative_bias(
    estimator: str, options: dict[str, Any], num_buckets: int, max_distance: int, *, is_causal: bool
) -> None:
    """Raise if there is no window that a relative bias could be in, or if its buckets do not fit."""
    # Half of a direction's buckets are single distances. Without one of them, or with a largest distance that
    # they reach, the logarithm in `buckets` would be undefined.
    single = num_buckets // (2 if is_causal else 4)
    if single < 1 or num_buckets % 2 or max_distance <= single:
        raise ValueError(
            f"num_buckets: expected an even number, and max_distance above the {single} single ones, "
            f"got {num_buckets} and {max_distance}"
        )
    if "window_bias" not in ESTIMATORS[estimator].options or not isinstance(options.get("window", 64), int):
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


def attended(
    layer: Any,
    x: Array,
    context: Array | None,
    key_mask: Array | None,
    query_mask: Array | None,
    own: dict[str, Any],
    *,
    window_bias: Array | None,
    draw: Callable[[], Any] | None,
) -> Array:
    """Return the result (..., N, F) of a layer for its tokens, by its projections and its estimator.

    `own` has the options of this call. In training `draw` returns a source of draws; in evaluation it is
    None, and an estimator that needs draws has a fixed seed.
    """
    # In self-attention one mask serves queries and keys.
    if context is None:
        context, query_mask = x, key_mask if query_mask is None else query_mask
    # Gradients of the projections are products with the tokens: NaN in padding, times zero, would be NaN.
    x, context = hide(x, query_mask), hide(context, key_mask)
    given = (("key_mask", key_mask), ("query_mask", query_mask))
    masks: dict[str, Any] = {name: m if m is None else m[..., None, :] for name, m in given}
    projections = ((layer.query, x), (layer.key, context), (layer.value, context))
    q, k, v = (split_heads(project(y), layer.num_heads) for project, y in projections)
    row, options = ESTIMATORS[layer.estimator], {**layer.options, **own}
    if options.get("rng") is None and options.get("noise") is None and row.draws != "never":
        if draw is not None:
            options = {"rng": draw(), **options}
        elif row.draws == "always":
            options = {"rng": 0, **options}
        else:
            # Options of the draws, for training: an estimator refuses them where it draws nothing.
            options = {name: value for name, value in options.items() if name not in _OF_DRAWS}
    if layer.query_landmark is not None and row.landmarks is not None:
        # Unscaled: `landmarks` are in the units of q and k.
        means = prepare(q, k, k, scale=None, is_self=False, enable_gqa=False, **masks)
        qt, kt = row.landmarks(means, options, layer.is_causal)
        qt, kt = (namespace(q).astype(y, q.dtype, copy=False) for y in (qt, kt))
        options["landmarks"] = (layer.query_landmark(qt), layer.key_landmark(kt))
        # The landmarks have the number in their shape.
        for name in ("num_landmarks", "num_groups"):
            options.pop(name, None)
    if window_bias is not None:
        options["window_bias"] = window_bias
    out = estimate(row.function, options, q, k, v, is_causal=layer.is_causal, **masks)
    return layer.out(merge_heads(out))


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
