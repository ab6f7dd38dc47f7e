"""CuPy's names: those of the recording alone, each called as CuPy's is, by NumPy's function of that name.

Where CuPy does something else than NumPy, or waits for the device, it stands here; both were looked up in
CuPy's source.
"""

from __future__ import annotations

import functools
import inspect
import json
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .arrays import COUNTS, ndarray, on_device, run
from .record import RECORDING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORDED: dict[str, Any] = json.loads(RECORDING.read_text())
VERSION: str = RECORDED["version"]

# What gives the same as NumPy's function of that name, beside the elementwise ones, and waits for nothing.
SAME = {
    "reductions": "all any argmax argmin count_nonzero cumsum max mean min prod std sum var",
    "creation": "arange empty empty_like eye full full_like linspace ones ones_like tri tril triu zeros zeros_like",
    "layout": "broadcast_arrays broadcast_to diagonal expand_dims flip meshgrid moveaxis ravel reshape squeeze "
    "swapaxes transpose",
    "copies": "concatenate copy fill flatten put_along_axis roll stack take take_along_axis tile",
    "products": "matmul tensordot trace",
    "no arrays": "broadcast_shapes can_cast isdtype issubdtype ndim promote_types result_type shape size",
}
# The same too, but its result's size is read from the device.
WAITING = ["argwhere", "bincount", "flatnonzero", "nonzero", "unique"]


def as_array(obj: Any, dtype: Any, copy: bool | None, order: str | None, ndmin: int = 0) -> Any:
    """An array of the device's; what is on the host is copied."""
    if isinstance(obj, ndarray):
        return run(np.array, obj, dtype=dtype, copy=copy, order=order, ndmin=ndmin)
    host = np.array(obj, dtype=dtype, order=order, ndmin=ndmin)
    if host.dtype.kind not in "?biufc":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    COUNTS.copies += 1
    return on_device(host)


def stable(kind: str | None) -> str:
    if kind not in (None, "stable"):
        raise ValueError(f"kind can only be None or 'stable', got {kind}")
    return "stable"


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    return run(np.nonzero, condition, waits=True) if x is None else run(np.where, condition, x, y)


class Generator:
    """CuPy's source of draws, which draws on the device."""

    __module__ = "cupy.random"

    def __init__(self, seed: Any = None) -> None:
        self._host = np.random.default_rng(seed)


def as_numpy(a: Any, *_: Any, **__: Any) -> np.ndarray:
    return a._read() if isinstance(a, ndarray) else np.asarray(a)


class NpzFile:
    """The result of `load` for several arrays: found by name alone, not listed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, key: str) -> Any:
        return as_array(self._file[key], None, None, "K")

    def close(self) -> None:
        self._file.close()


METHODS: dict[str, Callable[..., Any]] = {
    # It sorts all.
    "argpartition": lambda a, kth, axis=-1: METHODS["argsort"](a, axis),
    "argsort": lambda a, axis=-1, kind=None: run(np.argsort, a, axis, stable(kind)),
    "astype": lambda a, dtype, order="K", casting=None, subok=None, copy=True: run(
        np.ndarray.astype, a, dtype, order, casting or "unsafe", copy=copy
    ),
    "get": lambda a, stream=None, order="C", out=None, blocking=True: a._read(),
    "item": lambda a: a._read().item(),
    "tolist": lambda a: a._read().tolist(),
}
# By owner: functions, and classes as they are.
OTHERWISE: dict[str, dict[str, Any]] = {
    "cupy": {
        "argpartition": METHODS["argpartition"],
        "argsort": METHODS["argsort"],
        "array": lambda obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False: (
            as_array(obj, dtype, copy, order, ndmin)
        ),
        "asarray": lambda a, dtype=None, order=None, *, copy=None, blocking=False: as_array(
            a, dtype, copy, order
        ),
        "asnumpy": as_numpy,
        "astype": lambda x, dtype, /, *, copy=True: METHODS["astype"](x, dtype, copy=copy),
        "load": lambda file, mmap_mode=None, allow_pickle=None: NpzFile(np.load(file)),
        "ndarray": ndarray,
        "savez": lambda file, *args, **kwds: np.savez(
            file, *map(as_numpy, args), **{name: as_numpy(x) for name, x in kwds.items()}
        ),
        "sort": lambda a, axis=-1, kind=None: run(np.sort, a, axis, stable(kind)),
        "where": where,
    },
    "cupy.fft": {},
    "cupy.linalg": {
        "norm": functools.partial(run, np.linalg.norm),
        "qr": lambda a, mode="reduced": run(np.linalg.qr, a, mode),
    },
    "cupy.ndarray": METHODS,
    "cupy.random": {"Generator": Generator, "default_rng": Generator},
    "cupy.random.Generator": {
        "integers": lambda rng, *args, **options: run(rng._host.integers, *args, **options),
        "random": lambda rng, *args, **options: run(rng._host.random, *args, **options),
        "standard_normal": lambda rng, *args, **options: run(rng._host.standard_normal, *args, **options),
    },
}
PROPERTIES = ("dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size", "strides")
VIEWS = ("T", "imag", "mT", "real")


IMITATED = {*" ".join(SAME.values()).split(), *WAITING}


def members(owner: str, numpys: Any) -> Iterator[tuple[str, Any]]:
    """Each recorded name of the owner, and what stands in for it."""
    for name, signature in RECORDED["names"][owner].items():
        theirs, ours = getattr(numpys, name, None), OTHERWISE[owner].get(name)
        if signature is not None:
            if ours is None and (name in IMITATED or isinstance(theirs, np.ufunc)):
                ours = functools.partial(run, theirs, waits=name in WAITING)
            yield name, as_cupy(owner, name, signature, ours)
        elif ours is not None:
            yield name, ours
        elif owner == "cupy.ndarray" and name in PROPERTIES:
            yield name, property(lambda x, name=name: getattr(x._host, name))
        elif owner == "cupy.ndarray" and name in VIEWS:
            yield name, property(lambda x, name=name: run(getattr, x, name))
        elif owner == "cupy" and (isinstance(theirs, (type, float)) or name == "newaxis"):
            # Classes of numbers, and constants.
            yield name, theirs


def as_cupy(owner: str, name: str, recorded: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
    """The function, called with what CuPy's takes and nothing else."""
    # The recording is ours: parameters, and defaults that are plain.
    signature = inspect.signature(eval(f"lambda {recorded[1:-1]}: 0"))
    bound = owner in ("cupy.ndarray", "cupy.random.Generator")

    def call(*args: Any, **options: Any) -> Any:
        signature.bind(*args[bound:], **options)
        if function is None:
            raise NotImplementedError(f"the stand-in does not imitate {owner}.{name}")
        return function(*args, **options)

    call.__name__ = call.__qualname__ = name
    call.__module__ = owner
    return call


def fill_classes() -> None:
    """Give the classes the methods and the properties that CuPy's have."""
    for owner, kind, numpys in (
        ("cupy.ndarray", ndarray, np.ndarray),
        ("cupy.random.Generator", Generator, None),
    ):
        for name, member in members(owner, numpys):
            if name not in vars(kind):
                setattr(kind, name, member)


fill_classes()
