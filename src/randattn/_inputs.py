"""Check and normalize what a caller passes: namespace, shapes, dtypes, devices, masks, scale."""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _tracing
from ._tracing import library, specialize, tracing

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = Any
    Namespace = Any

namespace = _tracing.namespace


def is_array(x: Any) -> bool:
    """Whether this is an array of any library that array-api-compat knows."""
    return library(x) is not None


def placement(x: Array) -> Any:
    """The device to create arrays on beside `x`; None where what is created follows what it meets."""
    # The one check that Dynamo cannot make of a constant of its program, which is a tensor of PyTorch.
    is_tracer = not tracing() and hasattr(x, "sharding")
    return None if is_tracer else getattr(x, "device", None)


@dataclass(frozen=True)
class Inputs:
    """What an estimator works on: arrays of one rank in float32 or float64, not scaled.

    A scale on whole arrays would cost as much as their products; `scale` belongs to the logits, its `root`
    to each side.

    With grouped queries the head axis is split in two: `q` (..., Hk, G, N, D), `k` (..., Hk, 1, M, D).
    """

    q: Array
    k: Array
    v: Array
    key_mask: Array | None
    scale: float
    dtype: Any  # of the caller's arrays
    heads: int | None  # of the keys, where the head axis is split

    @property
    def xp(self) -> Namespace:
        return namespace(self.q)

    @property
    def device(self) -> Any:
        return placement(self.q)

    @property
    def root(self) -> float:
        """What scales each side of the logits."""
        return math.sqrt(self.scale)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the result."""
        shapes = [x.shape[:-2] for x in (self.q, self.k, self.v)]
        if self.key_mask is not None:
            shapes.append(self.key_mask.shape[:-1])
        return broadcast_shapes(*shapes)

    @property
    def key_bias(self) -> Array | None:
        """The logarithm of the key mask: 0 for a key to attend to, -inf for one that is not there."""
        return log_mask(self.key_mask, self.q)

    def finish(self, out: Array) -> Array:
        """The result as the caller expects it: heads in one axis again, in the inputs' dtype."""
        return self.xp.astype(self.merge_heads(out, 2), self.dtype, copy=False)

    def merge_heads(self, x: Array, trailing: int) -> Array:
        """Split heads in one axis again."""
        if self.heads is None:
            return x
        axis = x.ndim - trailing - 2
        lead, (heads, groups), rest = x.shape[:axis], x.shape[axis : axis + 2], x.shape[axis + 2 :]
        return self.xp.reshape(x, (*lead, heads * groups, *rest))

    def match(self, name: str, x: Array, trailing: int) -> Array:
        """Bring a further array of the caller's to these dtypes, ranks and split heads."""
        check_like(name, x, self.q)
        check_floating(name, x)
        return self.with_heads(name, self.xp.astype(x, self.q.dtype, copy=False), trailing)

    def with_heads(self, name: str, x: Array, trailing: int) -> Array:
        """Bring it to these ranks and split heads alone."""
        if self.heads is not None:
            x = _split_heads(name, x, trailing, self.heads)
        return with_rank(x, self.q.ndim - 2 + trailing)

    def match_mask(self, name: str, mask: Array, length: int) -> Array:
        """Bring a further boolean array (..., length) to these ranks and split heads."""
        check_mask(name, mask, self.q, length)
        if self.heads is not None:
            mask = _split_heads(name, mask, 1, self.heads)
        mask = with_rank(mask, self.q.ndim - 1)
        check_broadcast(q=(self.q, 2), k=(self.k, 2), v=(self.v, 2), **{name: (mask, 1)})
        return mask


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None,
    key_mask: Array | None,
    enable_gqa: bool,
    also: Sequence[tuple[Any, int]] = (),
) -> Inputs:
    """Check the arguments that every estimator has, hide masked keys.

    `also` names further arrays, with the number of their trailing axes, whose leading axes the result has.
    """
    check_flags(enable_gqa=enable_gqa)
    check_arrays(q=q, k=k, v=v)
    check_attention_shapes(q, k, v)
    specialize(q.shape[-1], v.shape[-1])
    heads = _key_heads(q, k, v) if enable_gqa else None
    if heads is None:
        check_broadcast(q=(q, 2), k=(k, 2), v=(v, 2))
    factor = check_scale(scale, q.shape[-1])
    if key_mask is not None:
        check_mask("key_mask", key_mask, q, k.shape[-2])

    dtype = q.dtype
    q, k, v = (working_precision(x) for x in (q, k, v))
    if heads is not None:
        q, k, v = (_split_heads(name, x, 2, heads) for name, x in (("q", q), ("k", k), ("v", v)))
        if key_mask is not None:
            key_mask = _split_heads("key_mask", key_mask, 1, heads)
    more = [getattr(x, "ndim", 0) - trailing + (heads is not None) for x, trailing in also]
    rank = max(q.ndim, k.ndim, v.ndim, getattr(key_mask, "ndim", 0) + 1, *[axes + 2 for axes in more])
    q, k, v = (with_rank(x, rank) for x in (q, k, v))
    if key_mask is not None:
        key_mask = with_rank(key_mask, rank - 1)
        check_broadcast(q=(q, 2), k=(k, 2), v=(v, 2), key_mask=(key_mask, 1))
        # Not a product: what lies under the mask may be NaN.
        k, v = hide(k, key_mask), hide(v, key_mask)
    return Inputs(q, k, v, key_mask, factor, dtype, heads)


def hide(x: Array, mask: Array | None) -> Array:
    """Zeros where the mask (one rank less) is False, whatever is there."""
    if mask is None:
        return x
    return namespace(x).where(mask[..., None], x, 0.0)


def log_mask(mask: Array | None, like: Array) -> Array | None:
    """0 where the mask is True, -inf where it is False."""
    if mask is None:
        return None
    xp = namespace(like)
    return xp.where(mask, xp.zeros_like(mask, dtype=like.dtype), -math.inf)


def with_rank(x: Array, rank: int) -> Array:
    """Prepend axes of length one, so that no operation promotes a rank."""
    if x.ndim >= rank:
        return x
    return namespace(x).reshape(x, (1,) * (rank - x.ndim) + tuple(x.shape))


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape; ValueError where there is none."""
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, start=rank - len(shape)):
            if size != 1 and result[axis] != 1 and result[axis] != size:
                raise ValueError(f"shapes {list(map(tuple, shapes))} do not broadcast")
            if size != 1:
                result[axis] = size
    return tuple(result)


def check_arrays(**arrays: Array) -> None:
    """Arrays of one library, one device and one real floating dtype."""
    (first_name, first), *_ = arrays.items()
    for name, x in arrays.items():
        check_like(name, x, first, first_name)
        check_floating(name, x)
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name}, {first.dtype}, got {x.dtype}")


def check_like(name: str, x: Any, like: Array, like_name: str = "q") -> None:
    """An array of the same library and device as another."""
    if "numpy.ma" in type(x).__module__:
        raise TypeError(f"{name}: expected a plain array; of a masked one pass .filled() and a key_mask")
    if not is_array(x):
        raise TypeError(f"{name}: expected an array (NumPy, PyTorch, JAX, CuPy, ...), got {_type_name(x)}")
    if namespace(x) is not namespace(like):
        raise TypeError(
            f"{name}: expected an array of the library of {like_name}, {_type_name(like)}, "
            f"got {_type_name(x)}"
        )
    here, there = (getattr(array, "device", None) for array in (x, like))
    # A tracer has no device, and one that is not committed to its device follows the others.
    if (
        here is None
        or there is None
        or not getattr(x, "committed", True)
        or not getattr(like, "committed", True)
    ):
        return
    # Arrays laid out differently over the same devices mix well.
    if getattr(here, "device_set", here) != getattr(there, "device_set", there):
        raise ValueError(f"{name}: expected an array on the device of {like_name}, {there}, got {here}")


def check_floating(name: str, x: Array) -> None:
    if not namespace(x).isdtype(x.dtype, "real floating"):
        raise TypeError(f"{name}: expected a real floating dtype, got {x.dtype}")


def check_attention_shapes(q: Array, k: Array, v: Array) -> None:
    """``q (..., N, D), k (..., M, D), v (..., M, E)`` with at least one token and one feature."""
    for name, x, axes in (("q", q, "N, D"), ("k", k, "M, D"), ("v", v, "M, E")):
        if x.ndim < 2:
            raise ValueError(f"{name}: expected shape (..., {axes}), got {tuple(x.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k: expected the {q.shape[-1]} features of q on its last axis, got shape {tuple(k.shape)}"
        )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"v: expected the {k.shape[-2]} tokens of k on its axis -2, got shape {tuple(v.shape)}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-2] < 1 or x.shape[-1] < 1:
            raise ValueError(
                f"{name}: expected at least one token and one feature, got shape {tuple(x.shape)}"
            )


def check_broadcast(**arrays: tuple[Array, int]) -> None:
    """Leading axes that broadcast; the number counts an array's trailing axes."""
    done: tuple[int, ...] = ()
    for name, (x, trailing) in arrays.items():
        lead = tuple(x.shape[: x.ndim - trailing])
        try:
            done = broadcast_shapes(done, lead)
        except ValueError:
            hint = " (enable_gqa=True shares key heads among queries)" if name == "k" else ""
            raise ValueError(
                f"{name}: expected leading axes that broadcast with {done}, got {lead}{hint}"
            ) from None


def check_mask(name: str, mask: Any, like: Array, length: int) -> None:
    """A boolean array (..., length) of the same library and device."""
    check_like(name, mask, like)
    if not namespace(mask).isdtype(mask.dtype, "bool"):
        raise TypeError(f"{name}: expected a boolean array (True = attend), got dtype {mask.dtype}")
    if mask.ndim < 1 or mask.shape[-1] != length:
        raise ValueError(f"{name}: expected shape (..., {length}), got {tuple(mask.shape)}")


def check_scale(scale: Any, features: int) -> float:
    if scale is None:
        return 1 / math.sqrt(features)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: expected a real number or None, got {_type_name(scale)}")
    return _checked_float("scale", scale, math.ulp(0.0), "a positive finite number")


def check_real(name: str, value: Any) -> float:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a real number, got {_type_name(value)}")
    return _checked_float(name, value, 0.0, "a finite number of at least 0")


def _checked_float(name: str, value: Any, least: float, expected: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not least <= number < math.inf:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return number


def check_flags(**flags: Any) -> None:
    """Booleans alone: a string would count as True."""
    for name, value in flags.items():
        # NumPy's own boolean is told by its name: NumPy may not be there.
        if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {_type_name(value)}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return operator.index(value)


def resolve_count(name: str, value: Any, default: int, **given: tuple[Array | None, int]) -> int:
    """A count as given; or else as a given array's axis has it; or the default."""
    if value is not None:
        return check_count(name, value)
    for array, axis in given.values():
        if array is not None and is_array(array) and array.ndim >= -axis and array.shape[axis] > 0:
            size: int = array.shape[axis]
            return size
    return default


def check_option(name: str, value: Any, options: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def check_causal(x: Inputs, is_causal: bool) -> None:
    """With another number of keys than queries, which of them is a query's past has no one answer."""
    check_flags(is_causal=is_causal)
    n, m = x.q.shape[-2], x.k.shape[-2]
    if is_causal and n != m:
        raise ValueError(f"is_causal: expected as many keys as queries ({n}), got {m}")


def refuse_causal(estimator: str, is_causal: bool) -> None:
    check_flags(is_causal=is_causal)
    if is_causal:
        raise NotImplementedError(
            f"is_causal: {estimator} has no causal form; softmax_attention, rfa, lara and eva have"
        )


def dot(x: Array, y: Array) -> Array:
    """``x . y`` over the last axis, as a product of matrices: elementwise it would take an array as large."""
    return namespace(x).matmul(x[..., None, :], y[..., None])[..., 0, 0]


def working_precision(x: Array) -> Array:
    """Half precision is summed in float32: sums of exponentials do not survive fewer bits."""
    xp = namespace(x)
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x


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
    """(..., heads * G or heads or 1, *trailing) -> (..., heads or 1, G or 1, *trailing)."""
    lead, rest = tuple(x.shape[: x.ndim - trailing]), tuple(x.shape[x.ndim - trailing :])
    if not lead:
        return x
    *outer, size = lead
    if size != 1 and size % heads:
        raise ValueError(f"{name}: expected 1 or a multiple of {heads} heads, got shape {tuple(x.shape)}")
    inner = (1, 1) if size == 1 else (heads, size // heads)
    return namespace(x).reshape(x, (*outer, *inner, *rest))


def _type_name(x: Any) -> str:
    kind = type(x)
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
