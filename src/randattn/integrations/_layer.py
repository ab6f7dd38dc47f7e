"""What the layers of PyTorch and Flax share: the papers' pooling, T5's buckets, heads, options."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from randattn import _eva_choice, _lara, eva, lara, ra, rfa, softmax_attention
from randattn._inputs import hide, prepare
from randattn._plans import blocks
from randattn._segments import blocks_of_queries, check_grid, pool
from randattn._shown import shown
from randattn._tracing import namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    Array = Any

ESTIMATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (softmax_attention, rfa, ra, lara, eva)
}


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
    """What fits together."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {shown(estimator)}")
    if features % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {features} features, got {shown(num_heads)}")
    if learned_landmarks and estimator not in ("lara", "eva"):
        raise ValueError(f"learned_landmarks: lara and eva have landmarks, {estimator} has none")
    if relative_bias:
        single = num_buckets // (2 if is_causal else 4)
        if single < 1 or num_buckets % 2 or max_distance <= single:
            raise ValueError(
                f"num_buckets: expected an even number, and max_distance above the {single} single ones, "
                f"got {num_buckets} and {max_distance}"
            )
    if relative_bias and (estimator != "eva" or not isinstance(options.get("window", 64), int)):
        raise ValueError("relative_bias: expected estimator='eva' with a window of tokens in a row")


def split_heads(x: Array, num_heads: int) -> Array:
    """(..., N, H D) -> (..., H, N, D)."""
    xp = namespace(x)
    x = xp.reshape(x, (*x.shape[:-1], num_heads, x.shape[-1] // num_heads))
    return xp.moveaxis(x, -2, -3)


def merge_heads(x: Array) -> Array:
    """(..., H, N, D) -> (..., N, H D)."""
    xp = namespace(x)
    x = xp.moveaxis(x, -3, -2)
    return xp.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def masks_of(
    x: Array, context: Array | None, key_mask: Array | None, query_mask: Array | None
) -> tuple[Array, Array, dict[str, Any]]:
    """Return the tokens (..., N, F) and (..., M, F) with zeros for padding, and the masks of all heads.

    The weights' gradients are products with the tokens, where NaN times zero would be NaN.
    """
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
    """Return the means of queries and keys (..., H, C, D) that the estimator's own landmarks would be."""
    x = prepare(
        q, k, k, scale=None, key_mask=key_mask, query_mask=query_mask, is_self=False, enable_gqa=False
    )
    grid = options.get("grid")
    if estimator == "lara":
        qt, kt, _ = _lara.landmarks_of(x, options.get("num_landmarks"), None, None, grid)
        return qt, kt
    tokens = check_grid(grid, q.shape[-2], k.shape[-2])
    counts = options.get("num_groups"), options.get("group_size")
    if is_causal:
        _, sizes = _eva_choice.causal_sizes(tokens, options.get("window", 64), *counts, grid, disjoint=True)
        groups = blocks(tokens, "tiles", sizes)
    else:
        groups = blocks(tokens, *_eva_choice.check_groups(tokens, *counts, None, None))
    (qt, _), (kt, _) = pool(x.q, blocks_of_queries(x, groups), x.query_mask), pool(x.k, groups, x.key_mask)
    return qt, kt


def buckets(window: int, num_buckets: int, max_distance: int, *, is_causal: bool) -> np.ndarray:
    """T5's bucket of each query and key of a window, (W, W) (arXiv 1910.10683, section 2.1).

    Half of the buckets are single distances, the other half grow with their logarithm up to the largest;
    without a direction of time, half of all are for keys that come later.
    """
    import numpy as np

    place = np.arange(window)
    later = place[None, :] - place[:, None]
    count = num_buckets if is_causal else num_buckets // 2
    distance = np.maximum(-later, 0) if is_causal else np.abs(later)
    single = count // 2
    grown = np.log(np.maximum(distance, 1) / single) / math.log(max_distance / single) * (count - single)
    far = np.minimum(single + grown.astype(np.int64), count - 1)
    found: np.ndarray = np.where(distance < single, distance, far) + (not is_causal) * count * (later > 0)
    return found
