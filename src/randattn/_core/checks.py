"""Check the arguments of a caller: an error names the argument, the expected value and the actual value."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from .describe import shown
from .describe import type_name as _type_name
from .library import Array, is_array, namespace

# Kinds of PyTorch tensors that few operations take: the property of each kind, and the remedy for the error.
_NOT_DENSE = {
    "is_nested": "a nested one: pass .to_padded_tensor(0.0) and a key_mask",
    "is_quantized": "a quantized one: pass .dequantize()",
    "is_sparse": "a sparse one: pass .to_dense()",
    "is_mkldnn": "an MKL-DNN one: pass .to_dense()",
}
_MASKED = ("MaskedArray", "MaskedTensor")
_NO_HINTS: Mapping[str, str] = {}


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the common shape; raise ValueError where the shapes do not broadcast."""
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
    """Raise unless all arrays have one library, one device and one real floating dtype."""
    (first_name, first), *_ = arrays.items()
    for name, x in arrays.items():
        check_like(name, x, first, first_name)
        check_floating(name, x)
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name}, {first.dtype}, got {x.dtype}")


def check_like(name: str, x: Any, like: Array, like_name: str = "q") -> None:
    """Raise where `x` is no dense array of the library and the device of `like`."""
    check_dense(name, x)
    if not is_array(x):
        raise TypeError(f"{name}: expected an array (NumPy, PyTorch, JAX, CuPy, ...), got {_type_name(x)}")
    if namespace(x) is not namespace(like):
        raise TypeError(
            f"{name}: expected an array of the library of {like_name}, {_type_name(like)}, "
            f"got {_type_name(x)}"
        )
    here, there = (getattr(array, "device", None) for array in (x, like))
    # A tracer has no device, and JAX moves an uncommitted array to the device of the others.
    if (
        here is None
        or there is None
        or not getattr(x, "committed", True)
        or not getattr(like, "committed", True)
    ):
        return
    # JAX computes with arrays that are sharded differently over one set of devices: the sets are compared.
    if getattr(here, "device_set", here) != getattr(there, "device_set", there):
        raise ValueError(f"{name}: expected an array on the device of {like_name}, {there}, got {here}")


def check_dense(name: str, x: Any) -> None:
    """Raise where `x` is masked, nested, quantized or sparse: its own library has few operations for it."""
    kind = None
    if type(x).__name__ in _MASKED:
        kind = "a masked one: pass its data, and a key_mask"
    elif hasattr(x, "is_nested") and (x.is_nested or x.is_quantized or not str(x.layout).endswith("strided")):
        found = (kind for flag, kind in _NOT_DENSE.items() if getattr(x, flag))
        # Tensors of compressed rows or columns have none of these flags: the layout tells them.
        kind = next(found, _NOT_DENSE["is_sparse"])
    if kind is not None:
        raise TypeError(f"{name}: expected a dense array, got {kind}")


def out_of_range(arrays: dict[str, Array]) -> ValueError:
    """Return the error for inputs that overflow, which names the first array with too large an entry."""
    for name, x in arrays.items():
        xp, limit = namespace(x), math.sqrt(namespace(x).finfo(x.dtype).max / x.shape[-1])
        largest = float(xp.max(xp.abs(x)))
        # Not `largest > limit`, which is False for NaN.
        if not largest <= limit:
            held = f"whose squared norm {x.dtype} holds"
            return ValueError(f"{name}: expected entries up to {limit:.0e}, {held}, got {largest:.0e}")
    return ValueError("q: expected logits and sums that its dtype holds, got some that overflow")


def check_floating(name: str, x: Array) -> None:
    if not namespace(x).isdtype(x.dtype, "real floating"):
        raise TypeError(f"{name}: expected a real floating dtype, got {x.dtype}")


def check_attention_shapes(q: Array, k: Array, v: Array) -> None:
    """Raise unless ``q (..., N, D), k (..., M, D), v (..., M, E)`` agree; no size of these may be zero."""
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


def check_broadcast(hints: Mapping[str, str] = _NO_HINTS, /, **arrays: tuple[Array, int]) -> None:
    """Raise unless leading axes broadcast; the number beside each array counts its trailing axes."""
    done: tuple[int, ...] = ()
    for name, (x, trailing) in arrays.items():
        lead = tuple(x.shape[: x.ndim - trailing])
        try:
            done = broadcast_shapes(done, lead)
        except ValueError:
            raise ValueError(
                f"{name}: expected leading axes that broadcast with {done}, got {lead}{hints.get(name, '')}"
            ) from None


def check_mask(name: str, mask: Any, tokens: Array, lead: Sequence[int]) -> None:
    """Raise unless `mask` is boolean, and is (M,) or has the axes of `tokens` (..., M, D) without the last.

    Axes are not matched from the right: the mask (B, M) of a batch would be one of heads where B = H.
    `lead` has the leading axes of the result, which the mask may have where `tokens` is shared.
    """
    check_like(name, mask, tokens)
    if not namespace(mask).isdtype(mask.dtype, "bool"):
        raise TypeError(f"{name}: expected a boolean array (True = attend), got dtype {mask.dtype}")
    *axes, length = tokens.shape[:-1]
    shape = tuple(mask.shape)
    allowed = zip_longest(reversed(lead), reversed(axes))
    if (
        shape[-1:] == (length,)
        and len(shape) - 1 in (0, len(axes), len(lead))
        and all(
            size == 1 or size in sizes for size, sizes in zip(reversed(shape[:-1]), allowed, strict=False)
        )
    ):
        return
    expected = f"({length},)"
    if axes:
        sizes = [str(size) if size == 1 else f"{size} or 1" for size in axes]
        expected += f" or ({', '.join(sizes)}, {length})"
    remedy = ""
    if len(shape) == 2 and len(axes) == 2 and shape[-1] == length:
        remedy = f": pass {name}[:, None, :] for a mask of the batch"
    elif len(shape) == len(axes) + 2 and shape[-2] == 1:
        remedy = f": pass {name}[..., 0, :] for a mask of logits"
    raise ValueError(f"{name}: expected shape {expected}, got {shape}{remedy}")


def as_scale(scale: Any, features: int) -> float:
    if scale is None:
        return 1 / math.sqrt(features)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: expected a real number or None, got {_type_name(scale)}")
    return _checked_float("scale", scale, math.ulp(0.0), "a positive finite number")


def as_real(name: str, value: Any) -> float:
    """Return a finite number of at least zero as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a real number, got {_type_name(value)}")
    return _checked_float(name, value, 0.0, "a finite number of at least 0")


def _checked_float(name: str, value: Any, least: float, expected: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        # An int may be larger than any float: infinity then gets the error below.
        number = math.inf
    if not least <= number < math.inf:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return number


def check_flags(**flags: Any) -> None:
    """Raise unless each flag is a boolean: a string would count as True."""
    for name, value in flags.items():
        # NumPy's boolean is recognized by its name, since NumPy may not be imported.
        if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
            raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def as_count(name: str, value: Any, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {_type_name(value)}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {shown(value)}")
    return operator.index(value)


def resolve_count(name: str, value: Any, default: int, **given: tuple[Array | None, int]) -> int:
    """Return the caller's count, or else the size of an axis of a given array, or else the default."""
    if value is not None:
        return as_count(name, value)
    for array, axis in given.values():
        if array is not None and is_array(array) and array.ndim >= -axis and array.shape[axis] > 0:
            size: int = array.shape[axis]
            return size
    return default


def check_effect(need: str, *, is_met: bool, **options: bool) -> None:
    """Raise for an option that is given and would have no effect without `need`."""
    for name, is_given in options.items():
        if is_given and not is_met:
            raise ValueError(f"{name}: expected {need} with it, or it has no effect")


def check_option(name: str, value: Any, options: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {shown(value)}")
