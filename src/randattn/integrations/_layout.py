"""Translate the arguments of frameworks into arguments of estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from randattn import softmax_attention
from randattn._core.library import Array, namespace, placement
from randattn._estimators.registry import row_of


def key_mask_of(mask: Array | None, keys: int, name: str = "mask") -> Array | None:
    """Return the key mask (..., H, M) of a mask (..., H, 1, M), which is the same for all queries."""
    if mask is None:
        return None
    shape = tuple(mask.shape)
    if len(shape) < 2 or shape[-2] != 1 or shape[-1] != keys:
        raise NotImplementedError(
            f"{name}: expected one that is the same for all queries, shape (..., 1, {keys}), got {shape}; "
            "for a causal one pass is_causal=True"
        )
    # A mask of floats is added to logits: it can hold any bias, and estimators have none of pairs.
    if "bool" not in str(mask.dtype):
        raise NotImplementedError(f"{name}: expected booleans, True = attend, got {mask.dtype}")
    return mask[..., 0, :]


def estimate(
    estimator: Callable[..., Array],
    options: dict[str, Any],
    q: Array,
    k: Array,
    v: Array,
    *,
    is_causal: bool,
    **ours: Any,
) -> Array:
    """Return the estimate of heads-first arrays, with the caller's options and a framework's arguments."""
    n, m = q.shape[-2], k.shape[-2]
    for name in ours:
        if options.get(name) is not None:
            raise TypeError(f"{name}: expected of the call, not among the estimator's options")
    if options.get("layout") is not None:
        raise TypeError("layout: expected none among the estimator's options: that of the framework is known")
    has_query_mask = options.get("query_mask") is not None or ours.get("query_mask") is not None
    if n == m and not has_query_mask and ours.get("key_mask") is not None:
        # Estimators take the key mask for the queries where N = M. A framework that masks keys alone expects
        # a row for every query, which may be of another sequence.
        ours["query_mask"] = namespace(q).ones((n,), dtype=namespace(q).bool, device=placement(q))
    if n != m and options.get("window_bias") is not None:
        raise NotImplementedError(f"window_bias: expected as many keys as queries ({n}), got {m}")
    options = {name: value for name, value in options.items() if name not in ours}
    if n == 1 and not is_causal:
        # A single query (a step with a cache, a query that pools) costs no more exactly than by an estimate.
        ours.setdefault("scale", options.get("scale"))
        return softmax_attention(q, k, v, **ours)
    if is_causal:
        ours["is_causal"] = True
    row = row_of(estimator)
    if row is not None and n != m:
        # Options for N != M, such as a window of 0.
        ours |= row.across
    return estimator(q, k, v, **{**options, **ours})
