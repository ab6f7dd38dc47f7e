"""Prepare the inputs of an estimator: checked arrays of one rank and precision, padding set to zero."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import library
from .checks import (
    as_scale,
    broadcast_shapes,
    check_arrays,
    check_attention_shapes,
    check_broadcast,
    check_flags,
    check_floating,
    check_like,
    check_mask,
    check_option,
)
from .library import Array, Namespace, is_known, known_library, namespace, placement

# Whether the layout was warned of in this process: a model would warn in each of its layers.
_is_warned: list[bool] = []
# Added to the error of leading axes that do not broadcast, by the array that does not fit.
_HINTS = {"k": " (enable_gqa=True shares key heads among queries)"}


@dataclass(frozen=True)
class Inputs:
    """The inputs of an estimator: arrays of one rank in float32 or float64, not scaled.

    A scaled copy of an array would cost as much as its product. So `scale` multiplies logits, and its `root`
    either side of them.

    With grouped queries the head axis is split in two: `q` (..., Hk, G, N, D), `k` (..., Hk, 1, M, D).
    """

    q: Array
    k: Array
    v: Array
    key_mask: Array | None
    scale: float
    dtype: Any  # the dtype of the caller's arrays
    heads: int | None  # the number of key heads, where the head axis is split
    xp: Namespace  # of the arrays; looked up once a call
    query_mask: Array | None = None
    tokens_first: bool = False  # the layout of the caller's arrays and of the result

    @property
    def device(self) -> Any:
        return placement(self.q)

    @property
    def root(self) -> float:
        """Return the factor of each side of the logits, the square root of the scale."""
        return math.sqrt(self.scale)

    @property
    def lead(self) -> tuple[int, ...]:
        """Return the leading axes of the result."""
        return broadcast_shapes(*(x.shape[:-2] for x in (self.q, self.k, self.v)))

    @property
    def key_bias(self) -> Array | None:
        """Return the logarithm of the key mask: 0 for a key to attend to, -inf for padding."""
        return log_mask(self.key_mask, self.q)

    def finish(self, out: Array) -> Array:
        """Return the result as the caller expects it: zeros for padding, one head axis, the inputs' dtype."""
        out = hide(out, self.query_mask)
        out = self.in_layout(self.merge_heads(out, 2), 2)
        return self.xp.astype(out, self.dtype, copy=False)

    def in_layout(self, x: Array, trailing: int) -> Array:
        """Return a result (..., H, N, ...) in the caller's layout; `trailing` counts the axes from N on."""
        return swapped(x, x.ndim - trailing - 1) if self.tokens_first else x

    def merge_heads(self, x: Array, trailing: int) -> Array:
        """Merge the two axes of split heads into one axis."""
        if self.heads is None:
            return x
        axis = x.ndim - trailing - 2
        lead, (heads, groups), rest = x.shape[:axis], x.shape[axis : axis + 2], x.shape[axis + 2 :]
        return self.xp.reshape(x, (*lead, heads * groups, *rest))

    def match(self, name: str, x: Array, trailing: int) -> Array:
        """Bring another array of the caller to the dtype, the rank and the split heads of the inputs."""
        check_like(name, x, self.q)
        check_floating(name, x)
        return self.with_heads(name, self.xp.astype(x, self.q.dtype, copy=False), trailing)

    def with_heads(self, name: str, x: Array, trailing: int) -> Array:
        """Bring an array to the rank and the split heads of the inputs, in its own dtype."""
        if self.heads is not None:
            x = _split_heads(name, x, trailing, self.heads)
        return with_rank(x, self.q.ndim - 2 + trailing)


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None,
    key_mask: Array | None,
    enable_gqa: bool,
    layout: str = "heads_first",
    query_mask: Array | None = None,
    is_self: bool = True,
    is_whole: bool = True,
    also: Sequence[tuple[Any, int]] = (),
) -> Inputs:
    """Check the arguments that every estimator has, and set padded keys and queries to zero.

    With `is_self` and as many keys as queries, the key mask is the query mask too, unless there is a
    `query_mask`. `is_whole` is False for a part of a sequence, whose tokens may be fewer than the heads.
    `also` has further arrays, each with the number of its trailing axes: the rank of the inputs has room for
    their leading axes.
    """
    check_flags(enable_gqa=enable_gqa)
    check_arrays(q=q, k=k, v=v)
    is_turned = is_tokens_first(layout)
    if is_turned:
        q, k, v, key_mask, query_mask = heads_first(q, k, v, key_mask, query_mask)
    check_attention_shapes(q, k, v)
    if is_whole and not is_turned:
        _warn_of_layout(q, k)
    # Symbolic numbers of features would double the time to compile, and no model changes them.
    library.compiler.specialize(q.shape[-1], v.shape[-1])
    heads = _key_heads(q, k, v) if enable_gqa else None
    if heads is None:
        check_broadcast(_HINTS, q=(q, 2), k=(k, 2), v=(v, 2))
    factor = as_scale(scale, q.shape[-1])
    for name, mask, x in (("key_mask", key_mask, k), ("query_mask", query_mask, q)):
        if mask is not None:
            check_mask(name, mask, x, _lead(q, k, v, enable_gqa=enable_gqa))

    dtype = q.dtype
    q, k, v = (working_precision(x) for x in (q, k, v))
    if heads is not None:
        q, k, v = (_split_heads(name, x, 2, heads) for name, x in (("q", q), ("k", k), ("v", v)))
        if key_mask is not None:
            key_mask = _split_heads("key_mask", key_mask, 1, heads)
    also = [*also, (query_mask, 1)]
    more = [getattr(x, "ndim", 0) - trailing + (heads is not None) for x, trailing in also]
    rank = max(q.ndim, k.ndim, v.ndim, getattr(key_mask, "ndim", 0) + 1, *[axes + 2 for axes in more])
    q, k, v = (with_rank(x, rank) for x in (q, k, v))
    if key_mask is not None:
        key_mask = with_rank(key_mask, rank - 1)
        # Dask would cut the keys at the borders of the mask's chunks too.
        key_mask = known_library(k).cut_as(key_mask, k)
        # By `where`, not by a product with the mask: NaN under the mask times zero is NaN.
        k, v = hide(k, key_mask), hide(v, key_mask)
    x = Inputs(q, k, v, key_mask, factor, dtype, heads, namespace(q), tokens_first=is_turned)
    if query_mask is not None:
        query_mask = x.with_heads("query_mask", query_mask, 1)
    elif key_mask is not None and is_self and q.shape[-2] == k.shape[-2]:
        query_mask = key_mask
    if query_mask is None:
        return x
    # Dask would cut the queries, and so the result, at the borders of the mask's chunks too.
    query_mask = known_library(q).cut_as(query_mask, q)
    # `finish` hides the results of padded queries, but a query of NaN would reach the gradients of real keys.
    return replace(x, q=hide(q, query_mask), query_mask=query_mask)


def hide(x: Array, mask: Array | None) -> Array:
    """Return `x` with zeros where the mask (one rank less) is False, whatever `x` holds there."""
    if mask is None:
        return x
    return namespace(x).where(mask[..., None], x, 0.0)


def log_mask(mask: Array | None, like: Array) -> Array | None:
    """Return 0 where the mask is True and -inf where it is False, in the dtype of `like`."""
    if mask is None:
        return None
    xp = namespace(like)
    return xp.where(mask, xp.zeros_like(mask, dtype=like.dtype), -math.inf)


def swapped(x: Array, axis: int) -> Array:
    """Return `x` with an axis and the next one swapped."""
    axes = list(range(x.ndim))
    axes[axis], axes[axis + 1] = axis + 1, axis
    return namespace(x).permute_dims(x, tuple(axes))


def is_tokens_first(layout: Any) -> bool:
    """Tell whether arrays are (..., N, H, D); raise for a layout that is not known."""
    check_option("layout", layout, ("heads_first", "tokens_first"))
    return bool(layout == "tokens_first")


def heads_first(q: Array, k: Array, v: Array, key_mask: Any, query_mask: Any) -> tuple[Any, ...]:
    """Return arrays (..., N, H, D) and masks (..., N), or (..., N, H), in the other layout."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            raise ValueError(f"{name}: expected shape (..., tokens, heads, features), got {tuple(x.shape)}")
    masks = (_mask_heads_first(mask, x) for mask, x in ((key_mask, k), (query_mask, q)))
    return *(swapped(x, x.ndim - 3) for x in (q, k, v)), *masks


def _mask_heads_first(mask: Any, tokens: Array) -> Any:
    axes = getattr(mask, "ndim", 0)
    if axes == tokens.ndim - 1:
        return swapped(mask, axes - 2)
    return mask[..., None, :] if 1 < axes == tokens.ndim - 2 else mask


def _warn_of_layout(q: Array, k: Array) -> None:
    """Warn, once, of arrays (B, N, H, D) whose heads would be taken for tokens and their tokens for heads."""
    # Asked first: a compiled call would guard the list, and compile again after a warning.
    if library.compiler.is_tracing() or _is_warned or q.ndim < 4:
        return
    heads, tokens = q.shape[-3:-1]
    # One token is a prompt of one, or a step.
    if not is_known(heads, tokens, k.shape[-2]) or tokens == 1 or max(tokens, k.shape[-2]) >= heads:
        return
    _is_warned.append(True)
    warnings.warn(
        f"q: {heads} heads of {tokens} tokens in shape {tuple(q.shape)}, which is read as (..., H, N, D): "
        'pass layout="tokens_first" for (..., N, H, D)',
        # The caller of the public function, which is wrapped twice.
        stacklevel=6,
    )


def with_rank(x: Array, rank: int) -> Array:
    """Prepend axes of length one, so that no operation promotes a rank."""
    if x.ndim >= rank:
        return x
    return namespace(x).reshape(x, (1,) * (rank - x.ndim) + tuple(x.shape))


def check_causal(x: Inputs, is_causal: bool) -> None:
    """Raise where the numbers of keys and queries differ: the past of a query would be ambiguous."""
    check_flags(is_causal=is_causal)
    n, m = x.q.shape[-2], x.k.shape[-2]
    if is_causal and n != m:
        raise ValueError(f"is_causal: expected as many keys as queries ({n}), got {m}")


def check_last(x: Inputs, is_causal: bool) -> None:
    """Raise where there are more queries than keys: causal queries are the last of the tokens."""
    check_flags(is_causal=is_causal)
    n, m = x.q.shape[-2], x.k.shape[-2]
    # Symbolic sizes are compared for equality alone: they stand for one number of tokens.
    if is_causal and n != m and not (is_known(n, m) and n < m):
        raise ValueError(f"is_causal: expected at most as many queries as keys ({m}), got {n}")


def refuse_causal(estimator: str, is_causal: bool) -> None:
    check_flags(is_causal=is_causal)
    if is_causal:
        raise NotImplementedError(
            f"is_causal: {estimator} has no causal form; "
            "softmax_attention, rfa, lara, eva and adaptive_eva have"
        )


def dot(x: Array, y: Array) -> Array:
    """Return ``x . y`` over the last axis."""
    # As a product of matrices: an elementwise product would be a new array of the size of x.
    return namespace(x).matmul(x[..., None, :], y[..., None])[..., 0, 0]


def working_precision(x: Array) -> Array:
    """Return `x` in float32 where it is in half precision: sums of exponentials need the bits."""
    xp = namespace(x)
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x


def _lead(q: Array, k: Array, v: Array, *, enable_gqa: bool) -> tuple[int, ...]:
    """Return the leading axes of the result, of which grouped queries have as many heads as `q`."""
    heads = int(enable_gqa)
    outer = broadcast_shapes(*(x.shape[: x.ndim - 2 - heads] for x in (q, k, v)))
    return (*outer, *q.shape[q.ndim - 2 - heads : q.ndim - 2])


def _key_heads(q: Array, k: Array, v: Array) -> int | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            raise ValueError(
                f"{name}: enable_gqa expects a head axis, (..., H, tokens, features), got {tuple(x.shape)}"
            )
    heads: int = k.shape[-3]
    queries: int = q.shape[-3]
    if v.shape[-3] != heads:
        raise ValueError(f"v: expected the {heads} heads of k, got shape {tuple(v.shape)}")
    if heads == 0 or queries % heads:
        raise ValueError(f"q: expected a multiple of the {heads} heads of k, got {queries}")
    check_broadcast(q=(q, 3), k=(k, 3), v=(v, 3))
    return heads


def _split_heads(name: str, x: Array, trailing: int, heads: int) -> Array:
    """Reshape (..., heads * G or heads or 1, *trailing) to (..., heads or 1, G or 1, *trailing)."""
    lead, rest = tuple(x.shape[: x.ndim - trailing]), tuple(x.shape[x.ndim - trailing :])
    if not lead:
        return x
    *outer, size = lead
    if size != 1 and size % heads:
        raise ValueError(f"{name}: expected 1 or a multiple of {heads} heads, got shape {tuple(x.shape)}")
    inner = (1, 1) if size == 1 else (heads, size // heads)
    return namespace(x).reshape(x, (*outer, *inner, *rest))
