"""The array libraries that the suite runs on."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace, device

from randattn.cli.libraries import CLASSES
from randattn.cli.libraries import open_library as open_adapter
from tests.libraries import cupy_standin as standin

if TYPE_CHECKING:
    from collections.abc import Callable

    from randattn.cli.libraries import ArrayLibrary


# Without optimization, which is how the suite has programs compiled, XLA's fusions of some right gradients give
# single NaNs, other ones for each length; they are gone with its fusion pass or at the next level.
FOR_GRADIENTS = {"xla_backend_optimization_level": 1}


@dataclass(frozen=True)
class Library:
    """One library, whose arrays the tests make, read and compare."""

    name: str
    own: ArrayLibrary
    device: Any = None

    @property
    def xp(self) -> Any:
        return self.own.xp

    @property
    def half(self) -> tuple[str, ...]:
        """Names of the half precision dtypes."""
        return self.own.half

    def asarray(self, x: Any, dtype: str | None = None) -> Any:
        """A copy of NumPy data on this library's device; read-only where the library can."""
        x = np.array(x)
        if self.name == "numpy":
            x = x if dtype is None else x.astype(dtype)
            x.flags.writeable = False
            return x
        if self.name == "dask":
            # Several blocks on the token axis: what works on one block alone is not supported.
            x = x if dtype is None else x.astype(dtype)
            chunks = tuple(
                -1 if axis != x.ndim - 2 else max(1, -(-x.shape[axis] // 2)) for axis in range(x.ndim)
            )
            return self.xp.asarray(x).rechunk(chunks)
        kind = None if dtype is None else getattr(self.xp, dtype)
        # CuPy's own function takes no device.
        on_device = {} if self.name == "cupy" else {"device": self.device}
        return self.xp.asarray(x, dtype=kind, **on_device)

    def arrays(self, *data: Any, dtype: str | None = None) -> list[Any]:
        return [self.asarray(x, dtype) for x in data]

    def numpy(self, x: Any) -> np.ndarray:
        """The values in NumPy, half precision as float32."""
        if self.name == "strict":
            x = x.to_device(self.xp.Device("CPU_DEVICE"))
        x = self.own.to_numpy(x)
        return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind == "f" else x

    def generator(self, seed: int) -> Any:
        """A native source of draws."""
        return self.own.generator(seed)

    def gradients(self, function: Callable[..., Any], *arrays: Any) -> list[np.ndarray]:
        """Give the gradients of a scalar function in each of its arrays: PyTorch's backward, JAX's compiled program."""
        if self.name == "jax":
            return list(map(self.numpy, jax_gradient(function, tuple(range(len(arrays))))(*arrays)))
        leaves = [x.detach().requires_grad_() for x in arrays]
        return list(map(self.numpy, self.xp.autograd.grad(function(*leaves), leaves)))

    def check(self, x: Any, like: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The values of a result that must be of the library, device and dtype of an input."""
        assert array_namespace(x) is array_namespace(like)
        assert x.dtype == like.dtype
        assert device(x) == device(like)
        assert tuple(x.shape) == shape
        return self.numpy(x)

    def close(self, actual: Any, expected: Any, rtol: float = 1e-11) -> None:
        """Equal to rounding, in relative norm."""
        actual, expected = self.numpy(actual), np.asarray(expected)
        assert actual.shape == expected.shape
        assert np.all(np.isfinite(actual))
        error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300)
        assert error <= rtol, f"relative error {error:.3g} > {rtol:g}"


def jax_gradient(function: Callable[..., Any], argnums: tuple[int, ...]) -> Callable[..., Any]:
    """The gradient, compiled."""
    jax = importlib.import_module("jax")
    options = FOR_GRADIENTS if jax.default_backend() == "cpu" else None
    return jax.jit(jax.grad(function, argnums), compiler_options=options)


def _numpy(_: str | None) -> Library:
    return Library("numpy", open_adapter("numpy"))


def _torch(device: str | None) -> Library:
    own = open_adapter("torch", device or "cpu")
    own.xp.set_num_threads(1)
    return Library("torch", own, own.place)


def _jax(device: str | None) -> Library:
    on_cpu = device in (None, "cpu")
    os.environ["XLA_FLAGS"] = _flags_to_compile_fast(os.environ.get("XLA_FLAGS"), on_cpu)
    jax = importlib.import_module("jax")
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "float32")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    own = open_adapter("jax", device)
    return Library("jax", own, own.place if device else None)


def _flags_to_compile_fast(given: str | None, on_cpu: bool) -> str:
    """XLA's flags: compiling, not running, is what the suite's time goes to."""
    if not on_cpu:
        # Else each product is tried by many kernels; and level 0 is far slower there.
        return "--xla_gpu_autotune_level=0" if given is None else given
    flags = "--xla_backend_optimization_level=0" if given is None else given
    release = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
    # Halves the time. Newer ones abort the process at a flag that they have no more.
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if release < (0, 11) else flags


def _cupy(_: str | None) -> Library:
    return Library("cupy", open_adapter("cupy"))


def _cupy_standin(_: str | None) -> Library:
    standin.install()
    return Library("cupy", CLASSES["cupy"]())


def _strict(_: str | None) -> Library:
    own = open_adapter("array-api-strict")
    own.xp.set_array_api_strict_flags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    )
    # Not the default device: an array made without device= meets the others and fails.
    return Library("strict", own, own.xp.Device("device1"))


def _dask(_: str | None) -> Library:
    importlib.import_module("dask").config.set(scheduler="synchronous")
    return Library("dask", open_adapter("dask"))


LIBRARIES = {
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
    "cupy-standin": _cupy_standin,
    "strict": _strict,
    "dask": _dask,
}


def open_library(name: str, device: str | None) -> Library:
    return LIBRARIES[name](device)
