"""JAX arrays on a mesh of devices: their average and their layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from randattn._core import average as plain
from randattn._core.average import Average, Keys, finite, nonzero
from randattn._core.library import Array

from .jax_loops import Rule, Set, together


def mesh_size(*arrays: Array) -> int:
    """Return the largest number of devices that one of the arrays may be laid over."""
    # In releases of JAX without `jax.typeof` a traced array has no layout to ask for.
    return max(_devices(jax.typeof(x).sharding.mesh) for x in arrays) if hasattr(jax, "typeof") else 1


def longest_axis(x: Array) -> int:
    """Return the number of devices along the longest axis of the array's mesh."""
    return max(jax.typeof(x).sharding.mesh.axis_sizes)


def _devices(mesh: Any) -> int:
    # Within `jax.shard_map` the mesh's axes are manual: nothing is left to lay out.
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind != jax.sharding.AxisType.Manual)


def everywhere(x: Array, trailing: int) -> Array:
    """Bring all of `x` to each device; leading axes (heads, for example) keep their layout."""
    if not isinstance(x, jax.core.Tracer) or mesh_size(x) == 1:
        return x
    spec = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * (x.ndim - trailing), *[None] * trailing)
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.typeof(x).sharding.mesh, spec))


def laid_by_compiler(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call an estimator with a mesh's explicit axes made automatic; lay its result as the inputs are laid."""
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

    # The result is laid as the inputs' leading axes, q's tokens and v's features; a state is on every device.
    rank = max(x.ndim for x in args[:3])
    specs = [(None,) * (rank - x.ndim) + tuple(jax.typeof(x).sharding.spec) for x in args[:3]]
    lead = [next((axis for axis in axes if axis is not None), None) for axes in zip(*specs, strict=True)]
    spec = PartitionSpec(*lead[:-2], specs[0][-2], specs[2][-1])
    layout: Any = NamedSharding(mesh, spec)
    found = jax.eval_shape(call, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    if isinstance(found, tuple):
        layout = (layout, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), found[1]))
    return jax.sharding.auto_axes(call, out_sharding=layout)(*arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def over_shards(
    function: Callable[..., Average], rule: Any, q: Array, k: Array, v: Array, mask: Array | None
) -> Array:
    """Return ``function(rule, q, k, v, mask).out``, merged over devices with a shard of the keys each."""
    mesh = jax.typeof(k).sharding.mesh
    axes = tuple(mesh.axis_names)
    # Queries that can be cut so have their results along the devices.
    is_even = q.shape[-2] % mesh.size == 0

    def of_shard(q: Array, *keys: Array | None) -> Array:
        out, log_norm = function(rule, q, *keys)
        # One sum over devices, as `merge` has it for two averages: no average travels as it is.
        top = finite(jax.lax.pmax(jax.lax.stop_gradient(log_norm), axes))
        weight = jnp.exp(log_norm - top)
        total = jnp.concat([weight[..., None] * out, weight[..., None]], axis=-1)
        if is_even:
            total = jax.lax.psum_scatter(total, axes, scatter_dimension=total.ndim - 2, tiled=True)
        else:
            total = jax.lax.psum(total, axes)
        return total[..., :-1] / nonzero(total[..., -1:])

    def along(x: Array | None, trailing: int) -> Any:
        return None if x is None else PartitionSpec(*[None] * (x.ndim - trailing), axes)

    rank = max(q.ndim, k.ndim, v.ndim)
    out = PartitionSpec(*[None] * (rank - 2), axes) if is_even else PartitionSpec()
    specs = (PartitionSpec(), along(k, 2), along(v, 2), along(mask, 1))
    program = jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return program(q, k, v, mask)


def _on_mesh(
    q: Array, sets: tuple[Set, ...], *, rules: tuple[Rule, ...], scale: float, devices: int, most: int
) -> Average:
    """Attend on a mesh by a loop along lanes of tokens.

    A loop along an axis that is laid over devices would bring all of it to every device. So the longer axis
    of tokens is cut in lanes, each on one device, and the loop goes along all lanes at once.
    """
    n, m = q.shape[-2], sum(one.k.shape[-2] for one in sets)
    lead = plain.leading_axes(q, together(sets, rules))
    has_pairs = any(rule.function is not None or rule.is_causal for rule in rules)
    by_keys = m > n and len(sets) == 1 and not has_pairs
    tokens = m if by_keys else n
    lanes = math.gcd(tokens, devices)
    length = tokens // lanes
    rows = min(length, max(1, length * most // max(1, math.prod(lead) * n * m)))
    # A divisor of the length: all steps then have one shape, and no lane has a remainder.
    rows = next(r for r in range(rows, 0, -1) if length % r == 0)
    if rows == length:
        return plain.attend_whole(q, together(sets, rules), scale)
    shape = (lanes, length // rows, rows)
    if by_keys:
        return _by_keys(q, together(sets, rules)[0], scale, lead, shape)

    def of_queries(part: Any) -> Average:
        step, here, *pairs = part
        first = length * jnp.arange(lanes)[:, None, None] + rows * step
        parts = [
            Set(
                one.k[..., None, :, :],
                one.v[..., None, :, :],
                None if one.bias is None else one.bias[..., None, :],
                pair_bias,
                mask,
                tuple(x[..., None, :, :] for x in one.arrays),
            )
            for one, pair_bias, mask in zip(sets, pairs[::2], pairs[1::2], strict=True)
        ]
        return plain.attend_whole(here, together(parts, rules), scale, first=(first, 0))

    per_query = [_cut(q, -2, shape)]
    for one in sets:
        per_query += [_cut(one.pair_bias, -2, shape), _cut(one.mask, -1, shape)]
    steps = (jnp.arange(length // rows), *per_query)
    out, log_norm = jax.lax.map(jax.checkpoint(of_queries), steps)
    out, log_norm = jnp.moveaxis(out, 0, -3), jnp.moveaxis(log_norm, 0, -2)
    return Average(out.reshape(*out.shape[:-4], n, out.shape[-1]), log_norm.reshape(*log_norm.shape[:-3], n))


def _cut(x: Array | None, axis: int, shape: tuple[int, int, int]) -> Array | None:
    """Reshape the tokens to (lanes, steps, rows), and move the steps to axis 0."""
    if x is None:
        return None
    axis += x.ndim
    x = x.reshape(*x.shape[:axis], *shape, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)


def _by_keys(
    q: Array, keys: Keys, scale: float, lead: tuple[int, ...], shape: tuple[int, int, int]
) -> Average:
    """Loop along the lanes of the keys, then merge the averages of the lanes."""

    def of_keys(done: Average, part: Any) -> tuple[Average, None]:
        k, v, bias, pairs = part
        pairs = None if pairs is None else jnp.moveaxis(pairs, -2, -3)
        return plain.merge(done, plain.attend_whole(q, [Keys(k, v, bias, pair_bias=pairs)], scale)), None

    per_key = (_cut(keys.k, -2, shape), _cut(keys.v, -2, shape), _cut(keys.bias, -1, shape))
    q = q[..., None, :, :]
    whole = (*lead, shape[0], q.shape[-2])
    nothing = Average(jnp.zeros((*whole, keys.v.shape[-1]), q.dtype), jnp.full(whole, -math.inf, q.dtype))
    parts, _ = jax.lax.scan(jax.checkpoint(of_keys), nothing, (*per_key, _cut(keys.pair_bias, -1, shape)))
    return plain.average_of_all(jnp.moveaxis(parts.log_norm, -2, -1), jnp.moveaxis(parts.out, -3, -2))


attend_on_mesh = jax.jit(_on_mesh, static_argnames=("rules", "scale", "devices", "most"))
