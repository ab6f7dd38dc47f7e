"""Loops of JAX's compiled program: an average in blocks, whose gradients recompute the blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from randattn._core import average as plain
from randattn._core.average import Average, Keys, PairWeight
from randattn._core.library import Array, hint, is_known


class Set(NamedTuple):
    """The arrays of a set of keys; `Rule` has its constants."""

    k: Array
    v: Array
    bias: Array | None
    pair_bias: Array | None
    mask: Array | None  # the mask of the pair weight
    arrays: tuple[Array, ...]  # the arrays of the pair weight


class Rule(NamedTuple):
    """The constants of a set of keys in a program."""

    function: Callable[..., Array] | None  # the function of the pair weight
    is_causal: bool


class Limits(NamedTuple):
    """Bounds of blocks: their logits, their logits before keys are cut too, their fewest queries."""

    block: int
    most: int
    fewest: int


def apart(sets: Sequence[Keys]) -> tuple[tuple[Set, ...], tuple[Rule, ...]]:
    """Split sets of keys into arrays and constants."""
    arrays, rules = [], []
    for keys in sets:
        k, v, bias, _, pair_bias, weight, is_causal = keys.biased()
        function, mask, own = weight or (None, None, ())
        arrays.append(Set(k, v, bias, pair_bias, mask, own))
        rules.append(Rule(function, is_causal))
    return tuple(arrays), tuple(rules)


def together(sets: Sequence[Set], rules: Sequence[Rule]) -> list[Keys]:
    """Make sets of keys from their arrays and constants again."""
    found = []
    for (k, v, bias, pair_bias, mask, arrays), (function, is_causal) in zip(sets, rules, strict=True):
        weight = None if function is None else PairWeight(function, mask, arrays)
        found.append(Keys(k, v, bias, None, pair_bias, weight, is_causal))
    return found


def _marks(operands: Any, *, of_queries: bool = False, of_keys: bool = False) -> Any:
    """Tell for each operand whether it has the axis of the inner loop: of queries, or of keys."""

    def fill(x: Any, mark: bool) -> Any:
        return jax.tree.map(lambda _: mark, x)

    q, sets = operands
    # In the order of the fields of `Set`.
    marks = (of_keys, of_keys, of_keys, of_queries, of_queries, False)
    return fill(q, of_queries), tuple(Set(*map(fill, one, marks)) for one in sets)


def blocks(
    q: Array, sets: tuple[Set, ...], first: Any = 0, *, rules: tuple[Rule, ...], scale: float, limits: Limits
) -> Average:
    """Attend by loops over leading axes, then over queries, then over keys, until a block fits.

    `first` is the number of the first query, for causal sets.
    """
    block, most, fewest = limits
    n, m = q.shape[-2], sum(one.k.shape[-2] for one in sets)
    lead = plain.leading_axes(q, together(sets, rules))
    operands = (q, sets)
    again = functools.partial(blocks, rules=rules, scale=scale, limits=limits)
    whole = functools.partial(_whole, rules=rules, scale=scale)
    if not is_known(n, m, *lead):
        # Symbolic sizes do not tell what fits in a block: one head and a few queries at a time.
        if lead:
            return _over_heads(again, operands, first, lead[0], 1)
        return _over_symbolic(whole, operands, first, fewest) if hint(n) > fewest else whole(q, sets, first)
    rows = max(fewest, block // m)
    splits = len(sets) == 1 and rules[0].function is None
    # A loop copies the keys of a step: with fewer queries than features this copy is larger than the logits.
    size = max(n, q.shape[-1]) * m
    if math.prod(lead) * size <= block or (not lead and n <= rows and not (splits and n * m > most)):
        return whole(q, sets, first)
    if lead:
        inside = math.prod(lead[1:]) * size
        if lead[0] == 1 or inside <= block:
            return _over_heads(again, operands, first, lead[0], block // inside)
        # One loop over two axes: an outer loop over heads would copy the arrays of a whole head.
        if len(lead) > 1 and lead[1] > 1:
            inner = jax.tree.map(lambda x: x.shape[1] > 1, operands)
            held = _divisor(lead[1], max(1, block * lead[1] // inside))
            return _over_two(again, operands, inner, first, (lead[0], lead[1]), held, 0)
        if len(lead) == 1 and n > rows and 4 * m <= n and n % _even(n, rows) == 0:
            inner = _marks(operands, of_queries=True)
            return _over_two(again, operands, inner, first, (lead[0], n), _even(n, rows), 1)
        cols = _even(m, max(1, most // n))
        has_pairs = sets[0].pair_bias is not None or rules[0].is_causal
        if len(lead) == 1 and n <= rows and splits and not has_pairs and m % cols == 0:
            inner = _marks(operands, of_keys=True)
            parts = _over_two(again, operands, inner, first, (lead[0], m // cols), cols, 0, of_keys=True)
            return plain.average_of_all(jnp.moveaxis(parts.log_norm, 1, -1), jnp.moveaxis(parts.out, 1, -2))
        return _over_heads(again, operands, first, lead[0], 1)
    if n > rows:
        return _over_queries(again, operands, first, _even(n, rows))
    return _over_keys(q, together(sets, rules)[0], scale, first, _even(m, most // n))


def _whole(q: Array, sets: tuple[Set, ...], first: Any, *, rules: tuple[Rule, ...], scale: float) -> Average:
    return plain.attend_whole(q, together(sets, rules), scale, first=(first, 0))


def _over_heads(again: Any, operands: Any, first: Any, size: int, most: int) -> Average:
    """Loop over the first axis, up to `most` entries at a time."""
    if size == 1:
        here = jax.tree.map(lambda x: x[0], operands)
        return jax.tree.map(lambda x: x[None], again(*here, first))
    held = _divisor(size, max(1, most)) if is_known(size) else 1
    leaves, structure = jax.tree.flatten(operands)
    # Operands of length one on this axis broadcast: the body takes them from outside of the loop.
    cut = [x for x in leaves if x.shape[0] == size]
    if held > 1:
        cut = [x.reshape(size // held, held, *x.shape[1:]) for x in cut]

    def of_heads(parts: list[Array]) -> Average:
        left = iter(parts)
        here = [next(left) if x.shape[0] == size else x if held > 1 else x[0] for x in leaves]
        return again(*structure.unflatten(here), first)

    # Without `checkpoint` the gradient of a loop would keep the logits of all its steps.
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
    """Loop over the first axis and over the next axis, `held` entries of it at a time.

    `inner` tells which operands have the next axis. With `of_keys` it is the axis of keys, and each part of
    the keys has a result of its own.
    """
    size, count = sizes
    pieces = count if of_keys else count // held
    leaves, structure = jax.tree.flatten(operands)
    has_inner = jax.tree.leaves(inner)
    cut = [
        x.reshape(x.shape[0] * pieces, held, *x.shape[2:]) if has else x
        for x, has in zip(leaves, has_inner, strict=True)
    ]
    # Operands with both axes are inputs of the loop. The others are indexed in the body: as inputs they would
    # be repeated for each step.
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


def _per_query(operands: Any) -> list[Array | None]:
    """Return the operands that have queries, which are on their axis 0."""
    q, sets = operands
    return [q, *(x for one in sets for x in (one.pair_bias, one.mask))]


def _with_queries(operands: Any, parts: Sequence[Array | None]) -> Any:
    """Replace the arrays of `_per_query` in the operands by parts of them."""
    q, *others = parts
    pairs = zip(others[::2], others[1::2], strict=True)
    sets = (
        one._replace(pair_bias=bias, mask=mask) for one, (bias, mask) in zip(operands[1], pairs, strict=True)
    )
    return q, tuple(sets)


def _mapped(again: Any, operands: Any, per_query: Any, first: Any, steps: Any, rows: int) -> Average:
    """Loop over arrays of `steps` times `rows` queries, which take the place of those in the operands."""

    def of_queries(part: Any) -> Average:
        here, start = part
        return again(*_with_queries(operands, here), start)

    cut = jax.tree.map(lambda x: x.reshape(steps, rows, *x.shape[1:]), per_query)
    found = jax.lax.map(jax.checkpoint(of_queries), (cut, first + rows * jnp.arange(steps)))
    return jax.tree.map(lambda x: x.reshape(steps * rows, *x.shape[2:]), found)


def _over_queries(again: Any, operands: Any, first: Any, rows: int) -> Average:
    """Loop over the queries, `rows` at a time; the remainder is a block after the loop."""
    per_query = _per_query(operands)
    n = operands[0].shape[0]
    whole = n - n % rows
    cut = jax.tree.map(lambda x: x[:whole], per_query)
    found = _mapped(again, operands, cut, first, whole // rows, rows)
    if whole == n:
        return found
    tail = again(*_with_queries(operands, jax.tree.map(lambda x: x[whole:], per_query)), first + whole)
    return jax.tree.map(lambda *parts: jnp.concat(parts), found, tail)


def _over_symbolic(average: Any, operands: Any, first: Any, rows: int) -> Average:
    """Loop over a symbolic number of queries, `rows` at a time; copies of the first query pad the end."""
    n = operands[0].shape[0]
    # One step more than full steps: JAX cannot tell that the symbolic n // rows is not zero.
    steps = n // rows + 1
    number = jnp.arange(steps * rows)
    index = jnp.where(number < n, number, 0)
    padded = jax.tree.map(lambda x: jnp.take(x, index, axis=0), _per_query(operands))
    found = _mapped(average, operands, padded, first, steps, rows)
    return jax.tree.map(lambda x: jnp.take(x, jnp.arange(n), axis=0), found)


def _over_keys(q: Array, keys: Keys, scale: float, first: Any, cols: int) -> Average:
    """Loop over the keys of one set, `cols` at a time; the remainder is a block after the loop."""
    m = keys.k.shape[0]
    whole = m - m % cols
    per_key = (keys.k, keys.v, keys.bias, None if keys.pair_bias is None else keys.pair_bias.T)

    def of_keys(part: Any, start: Any) -> Average:
        k, v, bias, pairs = part
        here = keys._replace(k=k, v=v, bias=bias, pair_bias=None if pairs is None else pairs.T)
        return plain.attend_whole(q, [here], scale, first=(first, start))

    def step(done: Average, part: Any) -> tuple[Average, None]:
        return plain.merge(done, of_keys(*part)), None

    cut = jax.tree.map(lambda x: x[:whole].reshape(whole // cols, cols, *x.shape[1:]), per_key)
    nothing = Average(jnp.zeros((len(q), keys.v.shape[-1]), q.dtype), jnp.full((len(q),), -math.inf, q.dtype))
    found, _ = jax.lax.scan(jax.checkpoint(step), nothing, (cut, jnp.arange(0, whole, cols)))
    if whole == m:
        return found
    return plain.merge(found, of_keys(jax.tree.map(lambda x: x[whole:], per_key), whole))


def by_rows(function: Callable[..., Array], size: int, *arrays: tuple[Array, int]) -> Array:
    """Compute `Backend.by_rows` where there is more than one block."""
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
    """Compute `Backend.carry` where there is more than one block."""
    steps = min(x.shape[-2] // size for x, size in arrays)

    def blocks(x: Array, size: int) -> Array:
        x = jax.lax.slice_in_dim(x, 0, steps * size, axis=-2)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], steps, size, x.shape[-1]), -3, 0)

    step = jax.checkpoint(lambda state, rows: function(state, *rows))
    state, out = jax.lax.scan(step, state, [blocks(*one) for one in arrays])
    out = jnp.moveaxis(out, 0, -3)
    out = out.reshape(*out.shape[:-3], out.shape[-3] * out.shape[-2], out.shape[-1])
    tails = [jax.lax.slice_in_dim(x, steps * size, x.shape[-2], axis=-2) for x, size in arrays]
    if not tails[0].shape[-2]:
        return state, out
    state, tail = function(state, *tails)
    return state, jnp.concat([out, tail], axis=-2)


def _even(size: int, most: int) -> int:
    """Return the largest divisor of `size` up to `most`, or `most` if the divisor is at most half of it."""
    # A remainder is one more block to compile; a small divisor (1 of a prime) makes far more steps.
    divisor = _divisor(size, most)
    return divisor if 2 * divisor > most else most


def _divisor(size: int, most: int) -> int:
    """Return the largest divisor of `size` up to `most`."""
    return next(d for d in range(min(size, most), 0, -1) if size % d == 0)
