"""Find the backend of an array, once for each type of array.

Estimators call `attend`, and ``backend_of(x)`` for all other operations. Each file here has one class:
`numpy` and `cupy` write in place (`inplace`), `torch` has a kernel, blocks in place and gradients of its own,
`torch_tracing` is PyTorch while it traces a program, `jax` compiles loops over blocks, `dask` makes a task
for each pair of chunks, `generic` is the array API alone. A module that imports a library is itself imported
with the first array of that library.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import array_api_compat as compat

from randattn._core import library
from randattn._core.average import Average, Keys
from randattn._core.library import Array

from .generic import Backend
from .torch_tracing import TorchCompiler

F = TypeVar("F", bound="Callable[..., Any]")

_NAMES = ("numpy", "torch", "jax", "cupy", "dask")
_GENERIC = Backend()


def _find(x: Any) -> Backend | None:
    for name in _NAMES:
        if getattr(compat, f"is_{name}_array")(x):
            module = importlib.import_module(f"randattn._backends.{name}")
            return cast("Backend", module.BACKEND)
    return _GENERIC if x is not None and compat.is_array_api_obj(x) else None


# The core imports no backend, and so gets the function and the compiler from here, at import.
library.find = _find
library.compiler = TorchCompiler()


# Each library that `_find` returns is a backend. A small call asks for it twenty times: a wrapper would cost.
backend_of = cast("Callable[[Array], Backend]", library.known_library)


def attend(q: Array, *sets: Keys, scale: float = 1) -> Average:
    """Average the values of all sets with weights ``exp(scale q . k + bias)``, as fast as the library can."""
    return backend_of(q).attend(q, sets, scale)


def undisturbed(function: F) -> F:
    """Keep the context of an estimator's caller from changing its operations.

    PyTorch's autocast would compute the products, and so the logits, in half precision. A JAX mesh with
    explicit axes would need a layout for each operation. NumPy would warn of each operation that overflows.
    """

    @functools.wraps(function)
    def call(q: Any, *args: Any, **options: Any) -> Any:
        own = library.library_of(q)
        if own is None:
            # The estimator raises the error, which names the argument.
            return function(q, *args, **options)
        return cast("Backend", own).call(function, q, *args, **options)

    return cast("F", call)
