"""Exact softmax attention: ``attend(q, k, v, 0).out``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._attend import attend
from ._inputs import prepare

if TYPE_CHECKING:
    Array = Any


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, enable_gqa=enable_gqa)
    if is_causal and x.q.shape[-2] != x.k.shape[-2]:
        raise ValueError(
            f"is_causal: expected as many keys as queries, {x.q.shape[-2]}, got {x.k.shape[-2]}"
        )
    out, _ = attend(x.q, x.k, x.v, x.key_bias, is_causal=is_causal)
    return x.finish(out)
