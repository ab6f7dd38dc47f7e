"""The stand-in's array: NumPy's underneath, none of it to be had by accident, and everything counted."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class Counts:
    """Count how often the device, and the host for it, had something to do.

    Attributes
    ----------
    launches : int
        Operations that are no views; each is a kernel at least.
    copies : int
        From the host to the device.
    syncs : int
        Times that the host waits for a value.
    """

    launches: int = 0
    copies: int = 0
    syncs: int = 0

    def reset(self) -> None:
        self.launches = self.copies = self.syncs = 0


COUNTS = Counts()


class Device:
    """CuPy's `cuda.Device`, of which there is one here."""

    def __init__(self, device: Any = None) -> None:
        self.id = 0 if device is None else int(device)
        if self.id:
            raise RuntimeError(f"cudaErrorInvalidDevice: invalid device ordinal {self.id}")

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return self.id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def synchronize(self) -> None:
        COUNTS.syncs += 1


def on_device(x: Any) -> Any:
    """The array that holds what NumPy gave, or several; what is no array as it is."""
    if isinstance(x, (tuple, list)):
        return (list if isinstance(x, list) else tuple)(map(on_device, x))
    if not isinstance(x, (np.ndarray, np.generic)):
        return x
    made = object.__new__(ndarray)
    made._host = np.asarray(x)
    return made


def run(function: Callable[..., Any], *args: Any, waits: bool = False, **options: Any) -> Any:
    """Call a NumPy function on the device's arrays alone, count it, and give its results on the device."""
    given: list[np.ndarray] = []

    def plain(x: Any) -> Any:
        if isinstance(x, ndarray):
            given.append(x._host)
            return x._host
        if isinstance(x, np.ndarray):
            raise TypeError(f"Unsupported type {type(x)}")
        return type(x)(map(plain, x)) if type(x) in (tuple, list) else x

    args, options = plain(args), {name: plain(option) for name, option in options.items()}
    # A device warns of nothing.
    with np.errstate(all="ignore"):
        result = function(*args, **options)
    writes = isinstance(function, np.ufunc) or options.get("out") is not None or result is None
    results = result if isinstance(result, (tuple, list)) else [result]
    COUNTS.launches += writes or any(is_new(x, given) for x in results)
    COUNTS.syncs += waits
    return on_device(result)


def is_new(x: Any, given: list[np.ndarray]) -> bool:
    """Tell whether a result is an array, and no view of these."""
    return isinstance(x, (np.ndarray, np.generic)) and not any(np.may_share_memory(x, one) for one in given)


class ndarray:  # noqa: N801 (CuPy's name)
    """CuPy's array: other libraries' arrays are refused, and reading a value waits for the device."""

    __slots__ = ("_host",)
    __module__ = "cupy"
    __array_priority__ = 100
    # NumPy's operators leave theirs to ours, which refuse.
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    _host: np.ndarray

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, *_: Any) -> Any:
        # NumPy's functions too: those of CuPy are called by their own names here.
        return NotImplemented

    @property
    def device(self) -> Device:
        return Device()

    # What waits for the device.

    def _read(self) -> np.ndarray:
        COUNTS.syncs += 1
        return self._host.copy()

    def __bool__(self) -> bool:
        return bool(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __repr__(self) -> str:
        return repr(self._read())

    # What does not.

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        key = index(key)
        # With the ellipsis single elements are views too.
        whole = key if any(part is Ellipsis for part in key) else (*key, ...)
        return run(operator.getitem, self, whole, waits=has_mask(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        key = index(key)
        run(operator.setitem, self, key, value, waits=has_mask(key))


def index(key: Any) -> tuple[Any, ...]:
    """The parts of a key, none of which is copied to the device."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if isinstance(part, (np.ndarray, list, tuple)):
            raise TypeError(f"an index on the host, {type(part)}, would be copied at each use")
    return parts


def has_mask(key: tuple[Any, ...]) -> bool:
    """Tell whether an index has a mask, whose true entries CuPy counts on the host."""
    return any(isinstance(part, ndarray) and part._host.dtype == bool for part in key)


def add_operators() -> None:
    """Give the array Python's operators, those that write over their left side too."""

    def binary(function: Any) -> tuple[Any, Any, Any]:
        return (
            lambda x, y: run(function, x, y),
            lambda x, y: run(function, y, x),
            lambda x, y: run(function, x, y, out=x),
        )

    for name, function in BINARY.items():
        for prefix, method in zip(("", "r", "i"), binary(function), strict=True):
            setattr(ndarray, f"__{prefix}{name}__", method)
    # CuPy has none.
    del ndarray.__imatmul__  # type: ignore[attr-defined]
    for name, function in COMPARISONS.items():
        setattr(ndarray, f"__{name}__", binary(function)[0])
    for name, function in UNARY.items():
        setattr(ndarray, f"__{name}__", lambda x, function=function: run(function, x))


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "pow": np.power,
    "matmul": np.matmul,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNARY = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}
add_operators()
