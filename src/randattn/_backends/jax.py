"""JAX: one compiled program for an average, in blocks by the loops of `jax_loops`."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax

from randattn._core import block_sizes
from randattn._core.average import Average, Keys
from randattn._core.indexing import rows
from randattn._core.library import Array, check_known, hint

from . import jax_loops, jax_mesh
from .generic import Backend

# An eager call is one program; in a caller's `jit` it is a part of the caller's program. Static arguments are
# compared by equality: a pair weight with a new function in each call would compile a program in each call.
_compiled = jax.jit(jax_loops.blocks, static_argnames=("rules", "scale", "limits"))
_as_function = partial(
    jax.jit, lambda function, rule, *arrays: function(rule, *arrays), static_argnums=(0, 1)
)
_compiled_function = _as_function()
# LLVM's last passes are a quarter of the time to compile, and gain no time of products.
_QUICKLY = {"xla_backend_optimization_level": 1}


@lru_cache
def _quickly_compiled_function() -> Any:
    """Return `_compiled_function` with less optimization, where JAX takes options and the caller has none."""
    knows = "compiler_options" in inspect.signature(jax.jit).parameters
    if not knows or any(name in os.environ.get("XLA_FLAGS", "") for name in _QUICKLY):
        return _compiled_function
    return _as_function(compiler_options=_QUICKLY)


def _on_a_cpu(arrays: tuple[Array | None, ...]) -> bool:
    """Tell whether no array is traced, as a program within another has its options, and all are on CPUs."""
    given = [x for x in arrays if x is not None]
    return not any(isinstance(x, jax.core.Tracer) for x in given) and all(
        device.platform == "cpu" for x in given for device in x.devices()
    )


class Jax(Backend):
    """JAX's arrays and tracers."""

    name = "jax"
    compiles_loops = True

    def placement(self, x: Array) -> Any:  # noqa: ARG002
        """Return None: a new array takes the devices of other operands, which may be several."""
        return None

    def call(self, function: Callable[..., Any], q: Array, *args: Any, **options: Any) -> Any:
        """Call an estimator with the explicit axes of a mesh made automatic."""
        return jax_mesh.laid_by_compiler(function, q, *args, **options)

    def attend_together(self, q: Array, sets: tuple[Keys, ...], scale: float) -> Average:
        """Compute the average in one program; on a mesh the program loops along lanes of tokens."""
        on_cpu = jax.default_backend() == "cpu"
        most = block_sizes.COMPILED_MOST_LOGITS if on_cpu else block_sizes.GPU_LOGITS
        devices = jax_mesh.mesh_size(q, *(keys.k for keys in sets))
        arrays, rules = jax_loops.apart(sets)
        if devices > 1:
            return jax_mesh.attend_on_mesh(
                q, arrays, rules=rules, scale=scale, devices=devices, most=devices * most
            )
        block = block_sizes.COMPILED_LOGITS if on_cpu else block_sizes.GPU_LOGITS
        limits = jax_loops.Limits(block, most, block_sizes.COMPILED_MIN_QUERIES)
        return Average(*_compiled(q, arrays, rules=rules, scale=scale, limits=limits))

    def by_rows(self, function: Callable[..., Array], size: int, *arrays: tuple[Array, int]) -> Array:
        """Apply `function` to `size` rows at a time, in a loop of the program."""
        x, axis = arrays[0]
        if hint(x.shape[axis]) <= size:
            return function(*(x for x, _ in arrays))
        check_known("q", "blocks of queries", x.shape[axis])
        return jax_loops.by_rows(function, size, *arrays)

    def carry_blocks(
        self, function: Callable[..., tuple[Any, Array]], state: Any, *arrays: tuple[Array, int]
    ) -> tuple[Any, Array]:
        """Go along the arrays in blocks, by a scan of the program."""
        return jax_loops.carry(function, state, *arrays)

    def as_program(self, function: Callable[..., Array], rule: Any, *arrays: Array | None) -> Array:
        """Return ``function(rule, *arrays)`` by one program: each operation would be a program of its own."""
        compiled = _quickly_compiled_function() if _on_a_cpu(arrays) else _compiled_function
        return compiled(function, rule, *arrays)

    def is_sharded(self, x: Array) -> bool:
        """Tell whether the tokens may be cut into one shard for each device of a mesh with one axis."""
        # With more axes the layout of a traced array is not known: shards might move to other devices.
        return 1 < jax_mesh.mesh_size(x) == self.lanes_of(x) == jax_mesh.longest_axis(x)

    def over_shards(
        self,
        function: Callable[..., Average],
        rule: Any,
        size: int,  # noqa: ARG002
        *arrays: tuple[Array | None, int],
    ) -> Array:
        """Return ``function(rule, q, *keys).out``, merged over the devices of the mesh."""
        return jax_mesh.over_shards(function, rule, *(x for x, _ in arrays))

    def constant(self, x: Array) -> Array:
        """Return `x` without gradients."""
        return jax.lax.stop_gradient(x)

    def is_at_hand(self, x: Array) -> bool:
        """Tell whether the values are known: a tracer has none."""
        return not isinstance(x, jax.core.Tracer)

    def largest(self, x: Array, count: int) -> Array:
        """Return the places of the `count` largest entries of the last axis, in any order."""
        return jax.lax.top_k(x, count)[1]

    def sums_by_group(self, x: Array, index: Array, group: Array, count: int) -> Array:
        """Sum rows by their groups."""
        heads, blocks, _ = index.shape
        group = group + count * jax.numpy.arange(heads * blocks).reshape(heads, blocks, 1)
        taken = rows(x, index).reshape(-1, x.shape[-1])
        total = jax.ops.segment_sum(taken, group.reshape(-1), heads * blocks * count, indices_are_sorted=True)
        return total.reshape(heads, blocks, count, x.shape[-1])

    def marked(self, index: Array, count: int) -> Array:
        """Return whether each entry is in the index."""
        flat = index.reshape(-1, index.shape[-1])
        number = jax.numpy.arange(flat.shape[0])[:, None]
        found = jax.numpy.zeros((flat.shape[0], count), dtype=bool).at[number, flat].set(True)
        return found.reshape(*index.shape[:-1], count)

    def put(self, x: Array, new: Array, start: Array, axis: int) -> Array:
        """Return `x` with `new` along an axis from `start` on, in the memory of an `x` that is given up."""
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis % x.ndim)

    def when(self, condition: Array, function: Callable[[Any], Any], state: Any) -> Any:
        """Return ``function(state)`` where the condition is true; else the state."""
        if isinstance(condition, jax.core.Tracer):
            return jax.lax.cond(condition, function, lambda state: state, state)
        # An eager `cond` would compile at every call: this branch waits for one boolean instead.
        return function(state) if condition else state

    def lanes_of(self, x: Array) -> int:
        """Return the number of lanes: equal parts of the tokens that may be on different devices."""
        # A divisor of both numbers: lanes have one length, and a device has tokens of one lane alone.
        return math.gcd(x.shape[-2], jax_mesh.mesh_size(x))

    def everywhere(self, x: Average) -> Average:
        """Bring averages of groups to all devices that have tokens."""
        out, log_norm = (jax_mesh.everywhere(array, axes) for array, axes in zip(x, (2, 1), strict=True))
        return x._replace(out=out, log_norm=log_norm)


BACKEND = Jax()
