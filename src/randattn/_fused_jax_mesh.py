"""`attend` for JAX arrays that are laid over a mesh of devices, and what is asked of their layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from . import _attend
from ._attend import Average, Keys, PairWeight

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = Any


def mesh_size(*arrays: Array) -> int:
    """The devices that one of these arrays may be laid over; 1 where it lies on one."""
    # Before `jax.typeof` an array that is traced had no layout to ask for.
    return max(_devices(jax.typeof(x).sharding.mesh) for x in arrays) if hasattr(jax, "typeof") else 1


def _devices(mesh: Any) -> int:
    # Within `jax.shard_map` the mesh's axes are manual: nothing is left to lay out.
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind != jax.sharding.AxisType.Manual)


def everywhere(x: Array, trailing: int) -> Array:
    """All of `x` on each device, but for leading axes (heads, say), which stay as they are laid."""
    if not isinstance(x, jax.core.Tracer) or mesh_size(x) == 1:
        return x
    spec = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * (x.ndim - trailing), *[None] * trailing)
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.typeof(x).sharding.mesh, spec))


def laid_by_compiler(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call an estimator where a mesh's explicit axes are automatic; its result is laid as its inputs are."""
    known = hasattr(jax, "typeof") and all(isinstance(x, jax.Array) for x in args[:3])
    meshes = [jax.typeof(x).sharding.mesh for x in args[:3]] if known else []
    mesh = next((mesh for mesh in meshes if jax.sharding.AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*args, **options)
    leaves, structure = jax.tree.flatten((args, options))
    arrays = [x for x in leaves if isinstance(x, jax.Array)]

    def call(*arrays: Array) -> Any:
        left = iter(arrays)
        args, options = structure.unflatten([next(left) if isinstance(x, jax.Array) else x for x in leaves])
        return function(*args, **options)

    # Of q, k and v the axes that the result has; a state is on every device.
    rank = max(x.ndim for x in args[:3])
    specs = [(None,) * (rank - x.ndim) + tuple(jax.typeof(x).sharding.spec) for x in args[:3]]
    lead = [next((axis for axis in axes if axis is not None), None) for axes in zip(*specs, strict=True)]
    spec = PartitionSpec(*lead[:-2], specs[0][-2], specs[2][-1])
    layout: Any = NamedSharding(mesh, spec)
    found = jax.eval_shape(call, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    if isinstance(found, tuple):
        layout = (layout, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), found[1]))
    return jax.sharding.auto_axes(call, out_sharding=layout)(*arrays)


def _on_mesh(
    q: Array,
    sets: tuple[Keys, ...],
    pair_bias: Array | None,
    mask: Array | None,
    arrays: tuple[Array, ...],
    *,
    scale: float,
    function: Any,
    is_causal: bool,
    devices: int,
    most: int,
) -> Average:
    """The same on a mesh, where a loop along an axis would bring all of it to every device.

    The longer axis of tokens is cut in lanes, each on one device, and a loop goes along all of them at once.
    """
    n, m = q.shape[-2], sum(keys.k.shape[-2] for keys in sets)
    pair_weight = None if function is None else PairWeight(function, mask, arrays)
    lead = _attend.leading_axes(q, sets, pair_bias, pair_weight)
    by_keys = m > n and len(sets) == 1 and pair_weight is None and not is_causal
    tokens = m if by_keys else n
    lanes = math.gcd(tokens, devices)
    length = tokens // lanes
    rows = min(length, max(1, length * most // max(1, math.prod(lead) * n * m)))
    rows = next(r for r in range(rows, 0, -1) if length % r == 0)
    if rows == length:
        start = (0, 0) if is_causal else None
        return _attend.attend_whole(q, sets, scale, pair_bias, pair_weight, first=start)

    def cut(x: Array, axis: int) -> Array:
        """The tokens as (lanes, steps, rows), the steps first of all axes."""
        axis += x.ndim
        x = x.reshape(*x.shape[:axis], lanes, length // rows, rows, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    def of_keys(done: Average, part: Any) -> tuple[Average, None]:
        (k, v, bias, _), pairs = part
        pairs = None if pairs is None else jnp.moveaxis(pairs, -2, -3)
        return _attend.merge(done, _attend.attend_whole(q, (Keys(k, v, bias),), scale, pairs, None)), None

    if by_keys:
        (keys,) = sets
        bias = None if keys.bias is None else cut(keys.bias, -1)
        pairs = None if pair_bias is None else cut(pair_bias, -1)
        per_key = (Keys(cut(keys.k, -2), cut(keys.v, -2), bias), pairs)
        q = q[..., None, :, :]
        shape = (*lead, lanes, n)
        nothing = Average(jnp.zeros((*shape, keys.v.shape[-1]), q.dtype), jnp.full(shape, -math.inf, q.dtype))
        parts, _ = jax.lax.scan(jax.checkpoint(of_keys), nothing, per_key)
        return _attend.average_of_all(jnp.moveaxis(parts.log_norm, -2, -1), jnp.moveaxis(parts.out, -3, -2))

    shared = tuple(
        Keys(k[..., None, :, :], v[..., None, :, :], None if bias is None else bias[..., None, :])
        for k, v, bias, _ in sets
    )
    arrays = tuple(x[..., None, :, :] for x in arrays)

    def of_queries(part: Any) -> Average:
        here, pairs, seen, step = part
        weight = None if function is None else PairWeight(function, seen, arrays)
        start = (length * jnp.arange(lanes)[:, None, None] + rows * step, 0) if is_causal else None
        return _attend.attend_whole(here, shared, scale, pairs, weight, first=start)

    per_query = (
        cut(q, -2),
        None if pair_bias is None else cut(pair_bias, -2),
        None if mask is None else cut(mask, -1),
        jnp.arange(length // rows),
    )
    out, log_norm = jax.lax.map(jax.checkpoint(of_queries), per_query)
    out, log_norm = jnp.moveaxis(out, 0, -3), jnp.moveaxis(log_norm, 0, -2)
    return Average(out.reshape(*out.shape[:-4], n, out.shape[-1]), log_norm.reshape(*log_norm.shape[:-3], n))


attend_on_mesh = jax.jit(_on_mesh, static_argnames=("scale", "function", "is_causal", "devices", "most"))
