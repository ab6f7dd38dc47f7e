"""The array libraries: how to bring arrays to each, compile, and wait for what it computes."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = Any
    Function = Callable[..., Array]

# Of each library's name the module and its distribution's name, where they differ.
_MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "jax": "jax",
    "cupy": "cupy",
    "array-api-strict": "array_api_strict",
    "dask": "dask.array",
}
NAMES = tuple(_MODULES)
# Libraries to check against, not to compute with: measured only where they are asked for.
CHECKS = ("array-api-strict", "dask")


class Unusable(Exception):  # noqa: N818  (a state of the machine, not of this program)
    """A library that is not installed, cannot be imported or has no device to run on."""


def _same(function: Function) -> Function:
    return function


def _nothing(_: Array) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One array library on one device."""

    name: str
    version: str
    device: str
    asarray: Callable[[np.ndarray], Array]
    to_numpy: Callable[[Array], np.ndarray] = np.asarray
    wait: Callable[[Array], object] = _nothing
    compile: Callable[[Function], Function] = _same


def installed() -> list[str]:
    """The libraries to measure where none is asked for."""
    return [name for name in NAMES if name not in CHECKS and _is_installed(name)]


def open_backend(name: str) -> Backend:
    """Import a library and find its device; `Unusable` where that does not work."""
    if not _is_installed(name):
        raise Unusable(f"{name}: is not installed for this Python")
    try:
        return _OPEN[name](name)
    except (ImportError, OSError, AttributeError) as error:
        raise Unusable(f"{name}: cannot be imported ({error})") from error


def _is_installed(name: str) -> bool:
    top = _MODULES[name].partition(".")[0]
    spec = importlib.util.find_spec(top)
    # A folder that happens to have the name has no origin.
    return spec is not None and spec.origin is not None


def _numpy(name: str) -> Backend:
    return Backend(name, np.__version__, "cpu", np.asarray)


def _torch(name: str) -> Backend:
    torch = importlib.import_module("torch")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    return Backend(
        name,
        torch.__version__,
        torch.cuda.get_device_name(device) if on_cuda else "cpu",
        lambda x: torch.asarray(x, device=device),
        to_numpy=lambda x: np.asarray(x.cpu()),
        wait=(lambda _: torch.cuda.synchronize(device)) if on_cuda else _nothing,
    )


def _jax(name: str) -> Backend:
    # It would take most of a GPU's memory, which other libraries are to use too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = importlib.import_module("jax")

    def compiled(function: Function) -> Function:
        def in_float32(*arrays: Array) -> Array:
            # Its default on GPUs has the precision of half a float32.
            with jax.default_matmul_precision("float32"):
                return function(*arrays)

        result: Function = jax.jit(in_float32)
        return result

    device = jax.devices()[0]
    return Backend(
        name,
        jax.__version__,
        "cpu" if device.platform == "cpu" else str(device.device_kind),
        jax.numpy.asarray,
        wait=jax.block_until_ready,
        compile=compiled,
    )


def _cupy(name: str) -> Backend:
    cupy = importlib.import_module("cupy")
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        cupy.asarray(np.zeros(1)).sum()
    except Exception as error:  # CUDA's errors have no common base
        raise Unusable(f"{name}: finds no usable CUDA device ({error})") from error
    return Backend(
        name,
        cupy.__version__,
        properties["name"].decode(),
        cupy.asarray,
        to_numpy=cupy.asnumpy,
        wait=lambda _: cupy.cuda.get_current_stream().synchronize(),
    )


def _array_api_strict(name: str) -> Backend:
    strict = importlib.import_module("array_api_strict")
    return Backend(name, strict.__version__, "cpu", strict.asarray)


def _dask(name: str) -> Backend:
    dask = importlib.import_module("dask.array")
    return Backend(
        name,
        _version_of("dask"),
        "cpu",
        lambda x: dask.from_array(x, chunks=-1),
        wait=lambda x: x.compute(),
    )


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


_OPEN: dict[str, Callable[[str], Backend]] = {
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
    "array-api-strict": _array_api_strict,
    "dask": _dask,
}
