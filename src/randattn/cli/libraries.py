"""Array libraries as programs use them: move arrays to a device and back, compile, differentiate, wait.

The command, the benchmarks and the tests open a library here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from randattn._core.library import Array

Function = Callable[..., Array]


class Unusable(Exception):  # noqa: N818  (a state of the machine, not of this program)
    """A library that is not installed, cannot be imported, or finds no device."""


class ArrayLibrary:
    """NumPy, and the base class of the other libraries.

    Attributes
    ----------
    name : str
        Name of the library in the command's options.
    xp : module
        The namespace of its functions.
    place : object or None
        The library's own object for the device of new arrays; None for its only device.
    device : str
        "cpu", or the name of a GPU.
    version : str
        Version of the library.
    half : tuple of str
        Names of its dtypes of half precision.
    """

    name = "numpy"
    module = "numpy"
    half: tuple[str, ...] = ("float16",)
    place: Any = None
    device = "cpu"

    def __init__(self) -> None:
        self.xp = importlib.import_module(self.module)
        top = importlib.import_module(self.module.partition(".")[0])
        self.version = str(getattr(top, "__version__", "unknown"))

    def find_device(self, device: str | None) -> None:
        """Find the device "cpu" or "cuda", by default the fastest; raise `Unusable` if there is none."""
        if device not in (None, "cpu"):
            raise ValueError(f"device: expected cpu for {self.name}, got {device}")

    def asarray(self, x: np.ndarray, dtype: str | None = None) -> Array:
        """Copy a NumPy array to the device, in the dtype of this name."""
        kind = None if dtype is None else getattr(self.xp, dtype)
        return self.xp.asarray(
            np.array(x), dtype=kind, **({} if self.place is None else {"device": self.place})
        )

    def to_numpy(self, x: Array) -> np.ndarray:
        """Return the values as a NumPy array; dtypes that NumPy does not have become float32."""
        return np.asarray(x)

    def wait(self, x: Array) -> None:
        """Wait until a result is computed."""

    def compiled(self, function: Function) -> Function:
        """Return a function in the form that users of the library call where time matters."""
        return function

    def generator(self, seed: int) -> Any:
        """Return a generator of the library, with this seed."""
        return np.random.default_rng(seed)

    def gradient(self, function: Function, cotangent: Array) -> Function | None:  # noqa: ARG002
        """Return a function of three arrays that computes result and gradients; None without gradients."""
        return None

    def copy(self, x: Array) -> Array:
        """Copy one array on its device."""
        return self.xp.copy(x)


class _Torch(ArrayLibrary):
    name = module = "torch"
    half = ("float16", "bfloat16")

    def find_device(self, device: str | None) -> None:
        torch = self.xp
        self.place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.device = torch.cuda.get_device_name(self.place) if self.place.type == "cuda" else "cpu"

    def to_numpy(self, x: Array) -> np.ndarray:
        x = x.detach()
        found: np.ndarray = (x.float() if x.dtype == self.xp.bfloat16 else x).cpu().numpy()
        return found

    def wait(self, x: Array) -> None:  # noqa: ARG002
        # A call on CUDA returns when its work is queued: a time without this would be that of the queue.
        if self.place.type == "cuda":
            self.xp.cuda.synchronize(self.place)

    def generator(self, seed: int) -> Any:
        return self.xp.Generator(self.place).manual_seed(seed)

    def gradient(self, function: Function, cotangent: Array) -> Function | None:
        def both(*arrays: Array) -> Array:
            leaves = [x.detach().requires_grad_() for x in arrays]
            return self.xp.autograd.grad(function(*leaves), leaves, cotangent)

        return both

    def copy(self, x: Array) -> Array:
        return x.clone()


class _Jax(ArrayLibrary):
    name, module = "jax", "jax.numpy"
    half = ("float16", "bfloat16")

    def __init__(self) -> None:
        super().__init__()
        self.jax = importlib.import_module("jax")
        self._copy = self.jax.jit(self.xp.copy)

    def find_device(self, device: str | None) -> None:
        if device == "cpu":
            # JAX has read the variable at its import; processes that are started from here read it again.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            self.jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        # JAX reads this one with its first device. Its memory pool would take most of a GPU's memory from
        # other libraries, and hide how much is used.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.place = self.jax.devices("gpu" if device == "cuda" else device)[0]
        self.device = "cpu" if self.place.platform == "cpu" else str(self.place.device_kind)

    def to_numpy(self, x: Array) -> np.ndarray:
        found = np.asarray(x)
        return (
            found.astype(np.float32) if found.dtype.kind == "V" or found.dtype.name == "bfloat16" else found
        )

    def wait(self, x: Array) -> None:
        self.jax.block_until_ready(x)

    def compiled(self, function: Function) -> Function:
        def in_float32(*arrays: Array) -> Array:
            # By default JAX multiplies in TensorFloat-32 on GPUs, of 11 bits: libraries would disagree.
            with self.jax.default_matmul_precision("float32"):
                return function(*arrays)

        result: Function = self.jax.jit(in_float32)
        return result

    def generator(self, seed: int) -> Any:
        return self.jax.random.key(seed)

    def gradient(self, function: Function, cotangent: Array) -> Function | None:
        def weighted(*arrays: Array) -> Array:
            return self.xp.sum(function(*arrays) * cotangent)

        # A program of the gradients alone would leave the result out.
        found: Function = self.jax.value_and_grad(weighted, argnums=(0, 1, 2))
        return found

    def copy(self, x: Array) -> Array:
        return self._copy(x)


class _Cupy(ArrayLibrary):
    name = module = "cupy"

    def find_device(self, device: str | None) -> None:
        super().find_device(None if device == "cuda" else device)
        # CuPy can be imported on a machine without a GPU: only a computation shows that a device works.
        try:
            properties = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.runtime.getDevice())
            self.xp.asarray(np.zeros(1)).sum()
        except Exception as error:  # CUDA's errors have no common base
            raise Unusable(f"{self.name}: finds no usable CUDA device ({error})") from error
        self.device = properties["name"].decode()

    def to_numpy(self, x: Array) -> np.ndarray:
        found: np.ndarray = self.xp.asnumpy(x)
        return found

    def wait(self, x: Array) -> None:  # noqa: ARG002
        self.xp.cuda.get_current_stream().synchronize()

    def generator(self, seed: int) -> Any:
        return self.xp.random.default_rng(seed)


class _Strict(ArrayLibrary):
    name, module = "array-api-strict", "array_api_strict"
    half = ()


class _Dask(ArrayLibrary):
    name, module = "dask", "dask.array"
    half = ()

    def asarray(self, x: np.ndarray, dtype: str | None = None) -> Array:
        return self.xp.from_array(np.array(x, dtype=dtype), chunks=-1)

    def wait(self, x: Array) -> None:
        x.compute()


CLASSES = {one.name: one for one in (ArrayLibrary, _Torch, _Jax, _Cupy, _Strict, _Dask)}
NAMES = tuple(CLASSES)
# Libraries for checks, not for computing: measured only if an option names them.
CHECKS = ("array-api-strict", "dask")


def installed() -> list[str]:
    """Return the libraries that are measured by default."""
    return [name for name in NAMES if name not in CHECKS and _is_installed(name)]


def open_library(name: str, device: str | None = None) -> ArrayLibrary:
    """Import a library and find its device, "cpu", "cuda" or the fastest; raise `Unusable` for a failure."""
    if not _is_installed(name):
        raise Unusable(f"{name}: is not installed for this Python")
    try:
        opened = CLASSES[name]()
    except (ImportError, OSError, AttributeError) as error:
        raise Unusable(f"{name}: cannot be imported ({error})") from error
    opened.find_device(device)
    return opened


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(CLASSES[name].module.partition(".")[0])
    # A folder of that name in the working directory is a namespace package, which has no origin.
    return spec is not None and spec.origin is not None
