"""Tell the library of an array, and which sizes a compiler keeps symbolic.

PyTorch and JAX trace with sizes that are expressions, for programs that serve many of them. A comparison
of such a size is a guard for `torch.compile`, refused by `torch.export`, and an error on JAX: what is only
a matter of speed or memory asks `hint`, and what cannot do without the size `check_known`.
"""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any

import array_api_compat as compat

if TYPE_CHECKING:
    Array = Any
    Namespace = Any

# Looked up by type: array-api-compat asks every library in turn, on every call.
_libraries: dict[type, str | None] = {}
_namespaces: dict[type, Namespace] = {}


def tracing() -> bool:
    """Tell whether PyTorch makes a program."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def dynamo_traces() -> bool:
    """Tell whether Dynamo makes it, which reads this code; `torch.export` runs it."""
    return tracing() and bool(sys.modules["torch"].compiler.is_dynamo_compiling())


def library(x: Any) -> str | None:
    """Name the library of an array: "other" for one that nothing depends on, None where this is no array."""
    if tracing() and isinstance(x, sys.modules["torch"].Tensor):
        # Not from the table: what a trace finds there, or writes, is a guard of the program.
        return "torch"
    kind = type(x)
    if kind not in _libraries:
        _libraries[kind] = _library(x)
    return _libraries[kind]


def _library(x: Any) -> str | None:
    for name in ("numpy", "torch", "jax", "cupy", "dask"):
        if getattr(compat, f"is_{name}_array")(x):
            return name
    return "other" if x is not None and compat.is_array_api_obj(x) else None


def namespace(x: Array) -> Namespace:
    """Return the array-API namespace of one array."""
    if tracing() and isinstance(x, sys.modules["torch"].Tensor):
        import array_api_compat.torch

        return array_api_compat.torch
    kind = type(x)
    if kind not in _namespaces:
        _namespaces[kind] = compat.array_namespace(x)
    return _namespaces[kind]


def constant_tensor(x: Any, device: Any) -> Array:
    """Make a constant of PyTorch's programs of a NumPy array: of a parameter no size is symbolic."""
    torch = sys.modules["torch"]
    return torch.nn.Parameter(torch.as_tensor(x, device=device), requires_grad=False)


def is_known(*sizes: Any) -> bool:
    """Tell whether all sizes are numbers, not expressions that a compiler keeps."""
    if tracing():
        known = sys.modules["torch"].fx.experimental.symbolic_shapes.has_static_value
        return all(known(size) for size in sizes)
    return all(isinstance(size, int) for size in sizes)


def hint(size: Any) -> int:
    """Return the size itself, or that of the caller's example; without one, as large as it may be.

    For choices after which the program is right for every size: PyTorch adds no guard.
    """
    if tracing() or not isinstance(size, int):
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(size, int | torch.SymInt):
            return sys.maxsize
        found: int = torch.fx.experimental.symbolic_shapes.optimization_hint(size)
        return found
    return size


def bound(size: Any, most: int) -> None:
    """Let a compiled program serve no larger size; an exported one has to serve all."""
    if tracing() and not sys.modules["torch"].compiler.is_exporting():
        sys.modules["torch"].fx.experimental.symbolic_shapes.guard_or_true(size <= most)


def specialize(*sizes: Any) -> None:
    """Let a compiled program have these as constants, which no model changes: it is made in half the time."""
    if dynamo_traces() and not sys.modules["torch"].compiler.is_exporting():
        for size in sizes:
            operator.index(size)


def check_known(name: str, why: str, *sizes: Any) -> None:
    """Fail where a size has to stay symbolic that must be known; `torch.compile` takes it as a constant."""
    for size in sizes:
        if not is_known(size) and _stays(size):
            raise ValueError(
                f"{name}: expected sizes that are known when the program is made, for {why}, got the "
                f"symbolic {size}: leave it static (no Dim of torch.export, no symbol of jax.export)"
            )


def _stays(size: Any) -> bool:
    """Tell whether the caller has asked for a program of all such sizes."""
    if dynamo_traces():
        # PyTorch's own error names the size.
        return False
    if not hasattr(size, "node"):
        return True
    if not sys.modules["torch"].compiler.is_exporting():
        return False
    asked = set()
    for one in size.node.shape_env.tracked_fakes or ():
        # Dim.AUTO has no constraint: it lets the program take the size as a constant.
        constraints = one.symbolic_context.constraint_sizes if hasattr(one.fake, "shape") else ()
        for axis, constraint in zip(getattr(one.fake, "shape", ()), constraints, strict=True):
            if constraint is not None and not is_known(axis):
                asked |= axis.node.expr.free_symbols
    return bool(asked & size.node.expr.free_symbols)
