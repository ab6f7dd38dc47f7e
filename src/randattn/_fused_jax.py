"""`attend` for JAX: one compiled program, in blocks by its own loops, whose gradients make them again."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from . import _attend
from ._attend import Average, Keys, PairWeight
from ._fused import GPU_BLOCK_LOGITS
from ._fused_jax_mesh import attend_on_mesh, mesh_size
from ._tracing import hint, is_known
from ._tree import rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Array = Any

# Logits of a block that XLA computes as fast as smaller ones, and the most before keys are cut too.
_BLOCK_LOGITS, _MOST_LOGITS = 1 << 18, 1 << 22
_MIN_BLOCK_QUERIES = 64


def attend(
    q: Array,
    sets: Sequence[Keys],
    scale: float,
    pair_bias: Array | None,
    pair_weight: PairWeight | None,
    is_causal: bool,
) -> Average:
    """`_attend.attend`."""
    function, mask, arrays = pair_weight or (None, None, ())
    biased = tuple(keys.biased() for keys in sets)
    on_cpu = jax.default_backend() == "cpu"
    devices = mesh_size(q, *(keys.k for keys in sets))
    if devices > 1:
        most = devices * (_MOST_LOGITS if on_cpu else GPU_BLOCK_LOGITS)
        options = {"scale": scale, "function": function, "is_causal": is_causal}
        return attend_on_mesh(q, biased, pair_bias, mask, arrays, devices=devices, most=most, **options)
    out, log_norm = _compiled(
        *(q, biased, pair_bias, mask, arrays),
        scale=scale,
        function=function,
        is_causal=is_causal,
        block=_BLOCK_LOGITS if on_cpu else GPU_BLOCK_LOGITS,
        most=_MOST_LOGITS if on_cpu else GPU_BLOCK_LOGITS,
        fewest=_MIN_BLOCK_QUERIES,
    )
    return Average(out, log_norm)


def _blocks(
    q: Array,
    sets: tuple[Keys, ...],
    pair_bias: Array | None,
    mask: Array | None,
    arrays: tuple[Array, ...],
    first: Any = 0,
    *,
    scale: float,
    function: Any,
    is_causal: bool,
    block: int,
    most: int,
    fewest: int,
) -> Average:
    """Loops of the compiled program: over leading axes, then queries, then keys, as far as it takes."""
    n, m = q.shape[-2], sum(keys.k.shape[-2] for keys in sets)
    pair_weight = None if function is None else PairWeight(function, mask, arrays)
    lead = _attend.leading_axes(q, sets, pair_bias, pair_weight)
    operands = (q, sets, pair_bias, mask, arrays)
    options: dict[str, Any] = {"scale": scale, "function": function, "is_causal": is_causal}
    again = functools.partial(_blocks, block=block, most=most, fewest=fewest, **options)
    start = (first, 0) if is_causal else None
    if not is_known(n, m, *lead):
        # Sizes that tell nothing of what fits: one head and a few queries at a time.
        if lead:
            return _over_heads(again, operands, first, lead[0], 1)
        by_all_keys: Callable[..., Average] = functools.partial(_by_all_keys, **options)
        if hint(n) > fewest:
            return _over_symbolic(by_all_keys, operands, first, fewest)
        return by_all_keys(q, sets, pair_bias, mask, arrays, first)
    rows = max(fewest, block // m)
    splits = function is None and len(sets) == 1
    # What a loop takes of the keys is copied: for fewer queries than features that is the larger array.
    size = max(n, q.shape[-1]) * m
    if math.prod(lead) * size <= block or (not lead and n <= rows and not (splits and n * m > most)):
        return _attend.attend_whole(q, sets, scale, pair_bias, pair_weight, first=start)

    if lead:
        inside = math.prod(lead[1:]) * size
        if lead[0] == 1 or inside <= block:
            return _over_heads(again, operands, first, lead[0], block // inside)
        # One loop for two axes, or the arrays of a whole head would be copied for the inner one.
        if len(lead) > 1 and lead[1] > 1:
            inner = jax.tree.map(lambda x: x.shape[1] > 1, operands)
            held = _divisor(lead[1], max(1, block * lead[1] // inside))
            return _over_two(again, operands, inner, first, (lead[0], lead[1]), held, 0)
        if len(lead) == 1 and n > rows and 4 * m <= n and n % _even(n, rows) == 0:
            others = jax.tree.map(lambda _: False, (sets, arrays))
            inner = (
                True,
                others[0],
                None if pair_bias is None else True,
                None if mask is None else True,
                others[1],
            )
            return _over_two(again, operands, inner, first, (lead[0], n), _even(n, rows), 1)
        cols = _even(m, max(1, most // n))
        if len(lead) == 1 and n <= rows and splits and pair_bias is None and not is_causal and m % cols == 0:
            inner = (False, jax.tree.map(lambda _: True, sets), None, None, ())
            parts = _over_two(again, operands, inner, first, (lead[0], m // cols), cols, 0, of_keys=True)
            return _attend.average_of_all(jnp.moveaxis(parts.log_norm, 1, -1), jnp.moveaxis(parts.out, 1, -2))
        return _over_heads(again, operands, first, lead[0], 1)
    if n > rows:
        return _over_queries(again, operands, first, _even(n, rows))
    part = functools.partial(_attend.attend_whole, scale=scale, pair_weight=None)
    return _over_keys(part, q, sets[0], pair_bias, first if is_causal else None, _even(m, most // n))


def _by_all_keys(
    q: Array,
    sets: tuple[Keys, ...],
    pair_bias: Array | None,
    mask: Array | None,
    arrays: tuple[Array, ...],
    first: Any,
    *,
    scale: float,
    function: Any,
    is_causal: bool,
) -> Average:
    pair_weight = None if function is None else PairWeight(function, mask, arrays)
    start = (first, 0) if is_causal else None
    return _attend.attend_whole(q, sets, scale, pair_bias, pair_weight, first=start)


# By itself an eager call is one program; within a caller's jit this is a part of that one.
_compiled = jax.jit(_blocks, static_argnames=("scale", "function", "is_causal", "block", "most", "fewest"))


def _over_heads(again: Any, operands: Any, first: Any, size: int, most: int) -> Average:
    """A loop over the first axis, some of it at a time."""
    if size == 1:
        here = jax.tree.map(lambda x: x[0], operands)
        return jax.tree.map(lambda x: x[None], again(*here, first))
    held = _divisor(size, max(1, most)) if is_known(size) else 1
    leaves, structure = jax.tree.flatten(operands)
    cut = [x for x in leaves if x.shape[0] == size]
    if held > 1:
        cut = [x.reshape(size // held, held, *x.shape[1:]) for x in cut]

    def of_heads(parts: list[Array]) -> Average:
        left = iter(parts)
        here = [next(left) if x.shape[0] == size else x if held > 1 else x[0] for x in leaves]
        return again(*structure.unflatten(here), first)

    found = jax.lax.map(jax.checkpoint(of_heads), cut)
    return jax.tree.map(lambda x: x.reshape(size, *x.shape[1 if held == 1 else 2 :]), found)


def _over_two(
    again: Any,
    operands: Any,
    inner: Any,
    first: Any,
    sizes: tuple[int, int],
    held: int,
    step: int,
    *,
    of_keys: bool = False,
) -> Average:
    """A loop over the first axis and `held` at a time of the next, which not all operands have (`inner`).

    `of_keys`: the next axis is that of the keys, and each of its parts has a result of its own.
    """
    size, count = sizes
    pieces = count if of_keys else count // held
    leaves, structure = jax.tree.flatten(operands)
    has_inner = jax.tree.leaves(inner)
    cut = [
        x.reshape(x.shape[0] * pieces, held, *x.shape[2:]) if has else x
        for x, has in zip(leaves, has_inner, strict=True)
    ]
    looped = [has and x.shape[0] == size for x, has in zip(leaves, has_inner, strict=True)]

    def of_both(part: Any) -> Average:
        i, here = part
        left = iter(here)

        def one(x: Array, whole: Array, has: bool) -> Array:
            if whole.shape[0] == 1 and not has:
                return x[0]
            return jax.lax.dynamic_index_in_dim(x, i % pieces if has else i // pieces, keepdims=False)

        given = [
            next(left) if loops else one(x, whole, has)
            for x, whole, has, loops in zip(cut, leaves, has_inner, looped, strict=True)
        ]
        return again(*structure.unflatten(given), first + step * held * (i % pieces))

    numbers = jnp.arange(size * pieces)
    xs = [x for x, loops in zip(cut, looped, strict=True) if loops]
    found = jax.lax.map(jax.checkpoint(of_both), (numbers, xs))
    return jax.tree.map(lambda x: x.reshape(size, count, *x.shape[1 if of_keys else 2 :]), found)


def _over_queries(again: Any, operands: Any, first: Any, rows: int) -> Average:
    q, sets, pair_bias, mask, arrays = operands
    n = q.shape[0]
    whole = n - n % rows
    per_query = (q, pair_bias, None if mask is None else mask[:, None])

    def of_queries(part: Any) -> Average:
        (here, pairs, seen), start = part
        return again(here, sets, pairs, None if seen is None else seen[:, 0], arrays, start)

    cut = jax.tree.map(lambda x: x[:whole].reshape(whole // rows, rows, x.shape[-1]), per_query)
    found = jax.lax.map(jax.checkpoint(of_queries), (cut, first + jnp.arange(0, whole, rows)))
    found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), found)
    if whole == n:
        return found
    tail = of_queries((jax.tree.map(lambda x: x[whole:], per_query), first + whole))
    return jax.tree.map(lambda *parts: jnp.concat(parts), found, tail)


def _over_symbolic(average: Any, operands: Any, first: Any, rows: int) -> Average:
    """Loop over a symbolic number of queries, so many at a time, filled up by the first one."""
    q, sets, pair_bias, mask, arrays = operands
    n = q.shape[0]
    # One more than may be full: of no step JAX could tell that there is one.
    steps = n // rows + 1
    number = jnp.arange(steps * rows)
    index = jnp.where(number < n, number, 0)
    per_query = jax.tree.map(lambda x: jnp.take(x, index, axis=0), (q, pair_bias, mask))

    def of_queries(part: Any) -> Average:
        (here, pairs, seen), start = part
        return average(here, sets, pairs, seen, arrays, start)

    cut = jax.tree.map(lambda x: x.reshape(steps, rows, *x.shape[1:]), per_query)
    found = jax.lax.map(jax.checkpoint(of_queries), (cut, first + rows * jnp.arange(steps)))
    found = jax.tree.map(lambda x: x.reshape(steps * rows, *x.shape[2:]), found)
    return jax.tree.map(lambda x: jnp.take(x, jnp.arange(n), axis=0), found)


def _over_keys(average: Any, q: Array, keys: Keys, pair_bias: Array | None, first: Any, cols: int) -> Average:
    m = keys.k.shape[0]
    whole = m - m % cols
    bias = None if keys.bias is None else keys.bias[:, None]
    per_key = (keys._replace(bias=bias), None if pair_bias is None else pair_bias.T)

    def of_keys(part: Any, start: Any) -> Average:
        (k, v, bias, _), pairs = part
        here = Keys(k, v, None if bias is None else bias[:, 0])
        pairs = None if pairs is None else pairs.T
        return average(q, (here,), pair_bias=pairs, first=None if first is None else (first, start))

    def step(done: Average, part: Any) -> tuple[Average, None]:
        return _attend.merge(done, of_keys(*part)), None

    cut = jax.tree.map(lambda x: x[:whole].reshape(whole // cols, cols, x.shape[-1]), per_key)
    nothing = Average(jnp.zeros((len(q), keys.v.shape[-1]), q.dtype), jnp.full((len(q),), -math.inf, q.dtype))
    found, _ = jax.lax.scan(jax.checkpoint(step), nothing, (cut, jnp.arange(0, whole, cols)))
    if whole == m:
        return found
    return _attend.merge(found, of_keys(jax.tree.map(lambda x: x[whole:], per_key), whole))


def by_rows(function: Callable[..., Array], size: int, *arrays: tuple[Array, int]) -> Array:
    """`function` of so many rows at a time, which lie on the given axis of each array: (..., rows, E)."""
    (x, axis), *_ = arrays
    whole = x.shape[axis] - x.shape[axis] % size

    def blocks(x: Array, axis: int) -> Array:
        x = jnp.moveaxis(jax.lax.slice_in_dim(x, 0, whole, axis=axis), axis, 0)
        return jnp.moveaxis(x.reshape(whole // size, size, *x.shape[1:]), 1, axis)

    found = jax.lax.map(jax.checkpoint(lambda parts: function(*parts)), [blocks(*one) for one in arrays])
    found = jnp.moveaxis(found, 0, -3)
    found = found.reshape(*found.shape[:-3], whole, found.shape[-1])
    if whole == x.shape[axis]:
        return found
    tail = function(*(jax.lax.slice_in_dim(x, whole, x.shape[axis], axis=axis) for x, axis in arrays))
    return jnp.concat([found, tail], axis=-2)


def carry(
    function: Callable[..., tuple[Any, Array]], state: Any, *arrays: tuple[Array, int]
) -> tuple[Any, Array]:
    """Go along axis -2 of the arrays, so many rows of each at a time: (state, rows) -> (state, results)."""
    steps = min(x.shape[-2] // size for x, size in arrays)

    def blocks(x: Array, size: int) -> Array:
        x = jax.lax.slice_in_dim(x, 0, steps * size, axis=-2)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], steps, size, x.shape[-1]), -3, 0)

    step = jax.checkpoint(lambda state, rows: function(state, *rows))
    state, out = jax.lax.scan(step, state, [blocks(*one) for one in arrays])
    out = jnp.moveaxis(out, 0, -3)
    out = out.reshape(*out.shape[:-3], -1, out.shape[-1])
    tails = [jax.lax.slice_in_dim(x, steps * size, x.shape[-2], axis=-2) for x, size in arrays]
    if not tails[0].shape[-2]:
        return state, out
    state, tail = function(state, *tails)
    return state, jnp.concat([out, tail], axis=-2)


def sums_by_group(x: Array, index: Array, group: Array, count: int) -> Array:
    """`_tree.sums_by_group`."""
    lanes, blocks, _ = index.shape
    group = group + count * jnp.arange(lanes * blocks).reshape(lanes, blocks, 1)
    taken = rows(x, index).reshape(-1, x.shape[-1])
    total = jax.ops.segment_sum(taken, group.reshape(-1), lanes * blocks * count, indices_are_sorted=True)
    return total.reshape(lanes, blocks, count, x.shape[-1])


def when(condition: Array, function: Callable[[Any], Any], state: Any) -> Any:
    """The function of the state where the condition is true."""
    if isinstance(condition, jax.core.Tracer):
        return jax.lax.cond(condition, function, lambda state: state, state)
    # Not traced: a program would be made at every call.
    return function(state) if condition else state


def _even(size: int, most: int) -> int:
    """A size of blocks that divides, unless that would be far smaller than it may be."""
    divisor = _divisor(size, most)
    return divisor if 2 * divisor > most else most


def _divisor(size: int, most: int) -> int:
    """The largest divisor that is no larger than this."""
    return next(d for d in range(min(size, most), 0, -1) if size % d == 0)
