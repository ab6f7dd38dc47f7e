"""PyTorch while it traces a program: `torch.compile` and `torch.export`. PyTorch is not imported here.

`TorchCompiler` tells which sizes are known; `TracedTorch` has the operations that can be part of a program.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable
from typing import Any

from randattn._core.library import Array, Compiler, Library
from randattn._core.tracing import TENSORS, Held

from .generic import Backend, mean_by_product


class TracedTorch(Backend):
    """Tensors of a program that is being traced, whose values are unknown."""

    name = "torch"

    def namespace(self, x: Array) -> Any:  # noqa: ARG002
        """Return array-api-compat's namespace, without its caches: Dynamo would guard on them."""
        import array_api_compat.torch

        return array_api_compat.torch

    def beside(self, rows: Any, like: Array) -> Array:
        """Bring a NumPy array, or the `Held` that a trace has in its place, to the device of `like`."""
        if isinstance(rows, Held):
            return TENSORS[rows.place](like.device)
        return super().beside(rows, like)

    def call(self, function: Callable[..., Any], q: Array, *args: Any, **options: Any) -> Any:
        """Call an estimator with autocast off."""
        kind = q.device.type
        torch = sys.modules["torch"]
        # The context only where autocast is on: it is an operation of the traced program.
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return function(q, *args, **options)
        return function(q, *args, **options)

    def full_precision(self, x: Array) -> contextlib.AbstractContextManager[object]:
        """Return a context with autocast off."""
        kind, torch = x.device.type, sys.modules["torch"]
        if not torch.amp.is_autocast_available(kind):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[object] = torch.autocast(kind, enabled=False)
        return context

    def cumulative_sum(self, x: Array, axis: int) -> Array:
        """Return the running sums along an axis; each sum includes its own entry."""
        # The function of array-api-compat reads a cache, which Dynamo would guard on.
        return x.cumsum(axis)

    def mean_of_rows(self, x: Array) -> Array:
        """Return the means (..., D) of rows (..., L, D)."""
        return mean_by_product(x)

    def constant(self, x: Array) -> Array:
        """Return `x` without gradients."""
        return x.detach()

    def largest(self, x: Array, count: int) -> Array:
        """Return the places of the `count` largest entries of the last axis, in any order."""
        return x.topk(count, sorted=False).indices

    def marked(self, index: Array, count: int) -> Array:
        """Return whether each entry is in the index."""
        found = index.new_zeros((*index.shape[:-1], count), dtype=sys.modules["torch"].bool)
        return found.scatter(-1, index, True)

    def put(self, x: Array, new: Array, start: Array, axis: int) -> Array:
        """Return a copy of `x` with `new` along an axis from `start` on."""
        size = new.shape[axis]
        number = self.namespace(x).arange(size, dtype=start.dtype, device=x.device)
        return x.index_copy(axis, start.clamp(max=x.shape[axis] - size) + number, new)


_TRACED = TracedTorch()


class TorchCompiler(Compiler):
    """Dynamo, which reads this code, and `torch.export`, which runs it."""

    def is_tracing(self) -> bool:
        """Tell whether PyTorch is tracing a program."""
        torch = sys.modules.get("torch")
        found: bool = torch is not None and torch.compiler.is_compiling()
        return found

    def reads_code(self) -> bool:
        """Tell whether Dynamo is tracing, which reads this code."""
        return self.is_tracing() and bool(sys.modules["torch"].compiler.is_dynamo_compiling())

    def library(self, x: Any) -> Library | None:
        """Return the `TracedTorch` for a tensor of the program; None for every other object."""
        return _TRACED if isinstance(x, sys.modules["torch"].Tensor) else None

    def constant(self, x: Any, device: Any) -> Array:
        """Return a parameter with the values of a NumPy array: sizes of parameters are never symbolic."""
        torch = sys.modules["torch"]
        return torch.nn.Parameter(torch.as_tensor(x, device=device), requires_grad=False)

    def is_known(self, *sizes: Any) -> bool:
        """Tell whether all sizes are numbers, not expressions."""
        if self.is_tracing():
            known = sys.modules["torch"].fx.experimental.symbolic_shapes.has_static_value
            return all(known(size) for size in sizes)
        return all(isinstance(size, int) for size in sizes)

    def hint(self, size: Any) -> int:
        """Return the size, or its value in the caller's example, without a guard; else the largest int."""
        if self.is_tracing() or not isinstance(size, int):
            torch = sys.modules.get("torch")
            if torch is None or not isinstance(size, int | torch.SymInt):
                return sys.maxsize
            found: int = torch.fx.experimental.symbolic_shapes.optimization_hint(size)
            return found
        return size

    def bound(self, size: Any, most: int) -> None:
        """Guard that a compiled program serves no size above `most`; an exported program serves all sizes."""
        if self.is_tracing() and not sys.modules["torch"].compiler.is_exporting():
            sys.modules["torch"].fx.experimental.symbolic_shapes.guard_or_true(size <= most)

    def specialize(self, *sizes: Any) -> None:
        """Make these sizes constants of a compiled program, which then compiles in half the time."""
        if self.reads_code() and not sys.modules["torch"].compiler.is_exporting():
            for size in sizes:
                operator.index(size)

    def stays(self, size: Any) -> bool:
        """Tell whether the caller asked for a program that serves all values of this size."""
        if self.reads_code():
            # Dynamo makes the size a constant, or PyTorch's own error names it where the caller forbade that.
            return False
        # An expression of JAX, which has no node, stays symbolic.
        if not hasattr(size, "node"):
            return True
        if not sys.modules["torch"].compiler.is_exporting():
            return False
        asked = set()
        for one in size.node.shape_env.tracked_fakes or ():
            # Dim.AUTO has no constraint: it lets the program take the size as a constant.
            constraints = one.symbolic_context.constraint_sizes if hasattr(one.fake, "shape") else ()
            for axis, constraint in zip(getattr(one.fake, "shape", ()), constraints, strict=True):
                if constraint is not None and not self.is_known(axis):
                    asked |= axis.node.expr.free_symbols
        return bool(asked & size.node.expr.free_symbols)
