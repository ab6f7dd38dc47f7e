"""The average and its gradient in blocks that stay in the cache, for arrays that can be written to.

Results are those of `_core.average.attend`. Nothing may be traced, and no set may have a pair bias.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

from randattn._core import block_sizes
from randattn._core.average import Average, Keys, PairWeight, finite, leading_axes, log_of_sum, past
from randattn._core.indexing import slices
from randattn._core.inputs import dot
from randattn._core.library import Array, namespace, placement

from .inplace_ops import BufferedOperations

At = tuple[slice, ...]
# Returns the factors, then the gradients of sum(factors * d) to the queries and the arrays.
Pullback = Callable[[PairWeight, Array, Array], Sequence[Array | None]]

# Bounds of a sum of exponentials without a maximum subtracted, and of a bias as a factor (in nats). A weight
# that underflows float32 is below 1e-38, times exp(30) below 1e-25: 1e-13 of the least sum. The largest sum
# times values up to 1e18 is far from 3e38, where float32 overflows. Tighter bounds cost more second tries.
_SAFE_SUMS, _SAFE_BIAS = (1e-12, 1e18), 30


class _Weights(NamedTuple):
    """The weights of the keys of a step for a block of queries."""

    weights: list[Array]  # for each piece (..., M, n), divided by exp(top)
    values: list[Array]  # for each piece (..., M, E), the bias as a factor included
    total: Array  # the sums of the weights (..., n)
    top: Array


class _Block(NamedTuple):
    """A block of queries and the keys that they attend to, a step for each part of the keys."""

    at: At  # the block's leading axes and queries in the result
    q: Array
    passes: list[list[_Piece]]

    def weights(
        self, pieces: Sequence[_Piece], scale: float, ops: BufferedOperations, top: Array | None
    ) -> _Weights:
        """Return the weights divided by ``exp`` of the running maximum, which includes `top`."""
        xp = namespace(self.q)
        logits = [piece.logits(self.q, scale, ops) for piece in pieces]
        # The maximum of a row without a key is -inf, and -inf - -inf is NaN: the least float takes its place.
        highest = reduce(xp.maximum, [xp.max(x, axis=-2) for x in logits])
        highest = ops.at_least(highest, xp.finfo(highest.dtype).min)
        top = highest if top is None else xp.maximum(highest, top)
        weights = [
            piece.paired(ops.exp(ops.subtract(x, top[..., None, :])), self.q, ops)
            for x, piece in zip(logits, pieces, strict=True)
        ]
        total = reduce(operator.add, [xp.sum(x, axis=-2) for x in weights])
        return _Weights(weights, [piece.keys.v for piece in pieces], total, top)

    def plain_weights(
        self, pieces: Sequence[_Piece], scale: float, ops: BufferedOperations
    ) -> _Weights | None:
        """Return weights without a maximum subtracted, two passes less; None where a sum is not safe."""
        xp = namespace(self.q)
        weights, values, totals = [], [], []
        # An overflow is no fault here, since the caller tries again with a maximum.
        with ops.quietly():
            for piece in pieces:
                # With a factor the sums are products, which are slow on many small tiles with short rows.
                factor = piece.factor(self.q) if ops.long_rows or len(pieces) == 1 else None
                x = ops.exp(piece.logits(self.q, scale, ops, biased=factor is None))
                x = piece.paired(x, self.q, ops)
                weights.append(x)
                if factor is None:
                    values.append(piece.keys.v)
                    totals.append(xp.sum(x, axis=-2))
                    continue
                # The factor is of all tiles: keys that one tile leaves out get the weight 0 in that tile.
                absent = piece.keys.bias == -math.inf
                if piece.has_own_bias(self.q) and xp.any(absent):
                    x[xp.nonzero(xp.broadcast_to(absent, x.shape[:-1]))] = 0
                values.append(piece.keys.v * factor[..., None])
                totals.append(xp.matmul(factor[..., None, :], x)[..., 0, :])
            total = reduce(operator.add, totals)
            # By `not (... and ...)`, since every comparison with NaN is False.
            if not (xp.min(total) > _SAFE_SUMS[0] and xp.max(total) < _SAFE_SUMS[1]):
                return None
        return _Weights(weights, values, total, xp.zeros_like(total))


class _Piece(NamedTuple):
    """A part of the keys of one set."""

    keys: Keys
    number: int  # the number of the set
    at: At  # the leading axes and the keys of the piece in its set
    past: Array | None  # the causal mask (..., M, n), where it hides any key

    def paired(self, weights: Array, q: Array, ops: BufferedOperations) -> Array:
        """Return the weights times the factors of the pairs."""
        if self.keys.pair_weight is None:
            return weights
        return ops.multiply(weights, self.keys.pair_weight.of(q, ops))

    def has_own_bias(self, q: Array) -> bool:
        """Tell whether tiles of queries share these keys but have a bias each."""
        k, bias = self.keys.k, self.keys.bias
        return bias is not None and k.ndim > 2 and k.shape[-3] == 1 < bias.shape[-2] == q.shape[-3]

    def factor(self, q: Array) -> Array | None:
        """Return ``exp(bias)`` as a factor of the values; None where it is unsafe, or keys are not far fewer.

        A tile may have a bias of its own if it differs from the others by leaving out keys alone.
        """
        k, v, bias = self.keys[:3]
        tiles = q.shape[-3] if k.ndim > 2 and k.shape[-3] == 1 else 1
        if bias is None or 4 * k.shape[-2] > tiles * q.shape[-2]:
            return None
        xp = namespace(bias)
        common = xp.max(bias, axis=-2, keepdims=True) if self.has_own_bias(q) else bias
        if not tuple(common.shape[:-1]) == tuple(k.shape[:-2]) == tuple(v.shape[:-2]):
            return None
        safe = (bias == -math.inf) | ((bias == common) & (xp.abs(common) < _SAFE_BIAS))
        return xp.exp(common) if xp.all(safe) else None

    def logits(self, q: Array, scale: float, ops: BufferedOperations, *, biased: bool = True) -> Array:
        """Return the logits, keys first: (..., M, n)."""
        x = ops.products(f"logits {self.number}", self.keys.k, q, scale)
        if biased and self.keys.bias is not None:
            bias = self.keys.bias[..., None]
            first = _first_other(bias) if ops.looks and bias.shape[:-2] == x.shape[:-2] else 0
            if first:
                ops.add(x[..., first:, :], bias[..., first:, :])
            else:
                x = ops.add(x, bias)
        return x if self.past is None else namespace(x).where(self.past, x, -math.inf)


def attend_in_blocks(
    q: Array, sets: Sequence[Keys], ops: BufferedOperations, scale: float, block: int
) -> Average:
    """Average the values of all sets, in blocks of about `block` logits."""
    xp, device = namespace(q), placement(q)
    lead, n = leading_axes(q, sets), q.shape[-2]
    out = xp.empty((*lead, n, sets[0].v.shape[-1]), dtype=q.dtype, device=device)
    tops, totals = (xp.empty((*lead, n), dtype=q.dtype, device=device) for _ in range(2))
    if 0 in lead:
        # An empty batch has no minimum and no maximum to look at.
        return Average(out, tops)
    smallest = xp.asarray(xp.finfo(q.dtype).smallest_normal, dtype=q.dtype, device=device)
    plain = ops.looks
    for here in _blocks(q, sets, lead, block, ops.together):
        top = total = acc = None
        target = out[here.at]
        # A block of `_cut` is contiguous in `out`, which is then the buffer of its sums. A block of all heads
        # is not: the flat view in `hold` would be a copy.
        direct = not ops.together and _product_shape(here.q, here.passes[0][0].keys) == tuple(target.shape)
        ops.hold("acc", target if direct else None)
        for pieces in here.passes:
            part = here.plain_weights(pieces, scale, ops) if plain else None
            if part is None:
                plain, part = False, here.weights(pieces, scale, ops, top)
            if top is None:
                total = part.total
            else:
                shrink = xp.exp(top - part.top)
                total, acc = total * shrink + part.total, ops.multiply(acc, shrink[..., None])
            top, weights = part.top, part.weights
            if len(here.passes) == 1:
                # The weights are divided, not the sums: a pass over the short rows of sums takes longer.
                share = (1 / xp.maximum(total, smallest))[..., None, :]
                weights = [ops.multiply(x, share) for x in weights]
            for x, v in zip(weights, part.values, strict=True):
                acc = ops.sums(x, v, acc)
        tops[here.at], totals[here.at] = top, total
        if len(here.passes) > 1:
            acc = ops.multiply(acc, 1 / xp.maximum(total, smallest)[..., None])
        if not direct:
            target[...] = acc
    return Average(out, log_of_sum(tops, totals))


def gradients(
    q: Array,
    sets: Sequence[Keys],
    ops: BufferedOperations,
    *,
    average: Average,
    cotangent: Average,
    wanted: Iterable[bool],
    scale: float,
    pullback: Pullback,
    block: int,
) -> tuple[Array | None, list[list[Array | None]], list[list[Array]]]:
    """Return the gradients of `attend` from its result; the weights are recomputed, block by block.

    `wanted` has a flag for the gradient of `q`, then of each k, v and bias. The last list has the gradients
    of the arrays of each `pair_weight`.
    """
    xp = namespace(q)
    lead = tuple(average.log_norm.shape[:-1])
    wanted = iter(wanted)
    dq = _Sum(q, 2, lead) if next(wanted) else None
    # Blocks cut a causal set at different places: without `lead` its sums start at zero.
    dsets = [
        [
            None if x is None or not next(wanted) else _Sum(x, n, None if keys.is_causal else lead)
            for x, n in _trailing(keys)
        ]
        for keys in sets
    ]
    dpairs = [
        [] if keys.pair_weight is None else [_Sum(x, 2, lead) for x in keys.pair_weight.arrays]
        for keys in sets
    ]
    # With weights w that add up to 1 the gradient of a logit is w (g . v - g . out + g_norm), with the
    # cotangents g of out and g_norm of log_norm. `level` is the part without v.
    level = cotangent.log_norm - dot(cotangent.out, average.out)
    for here in _blocks(q, sets, lead, block, ops.together):
        g, norm = cotangent.out[here.at], finite(average.log_norm[here.at])
        for piece in itertools.chain.from_iterable(here.passes):
            k, v = piece.keys[:2]
            weights = ops.exp(ops.subtract(piece.logits(here.q, scale, ops), norm[..., None, :]))
            d = ops.add(ops.products("d", v, g), level[here.at][..., None, :])
            d = ops.multiply(d, weights)
            if piece.keys.pair_weight is not None:
                factor, drows, *darrays = pullback(piece.keys.pair_weight, here.q, d)
                everywhere = (*here.at[:-1], slice(None))
                for whole, at, part in [
                    (dq, here.at, drows),
                    *((x, everywhere, y) for x, y in zip(dpairs[piece.number], darrays, strict=True)),
                ]:
                    if whole is not None and part is not None:
                        whole.add(at, part)
                d, weights = ops.multiply(d, factor), ops.multiply(weights, factor)
            dk, dv, dbias = dsets[piece.number]
            if dv is not None:
                dv.add(piece.at, ops.matmul("along k", weights, g))
            if dbias is not None:
                dbias.add(piece.at, xp.sum(d, axis=-1))
            if scale != 1:
                d = ops.multiply(d, scale)
            if dq is not None:
                dq.add(here.at, ops.sums(d, k))
            if dk is not None:
                dk.add(piece.at, ops.matmul("along k", d, here.q))
    return (
        None if dq is None else dq.total,
        [[None if x is None else x.total for x in keys] for keys in dsets],
        [[x.total for x in arrays] for arrays in dpairs],
    )


class _Sum:
    """The gradient of an array, the sum of parts from blocks, also over axes along which it is broadcast."""

    def __init__(self, x: Array, trailing: int, lead: tuple[int, ...] | None) -> None:
        self._trailing = trailing
        self._seen: set[tuple[int, ...]] = set()
        # An array that is not broadcast need not start at zero: the first part at a place is written (a pass
        # less). All blocks must cut at the same places, or memory that was never written is added to.
        self._is_whole = tuple(x.shape[: x.ndim - trailing]) == lead
        self.total = (namespace(x).empty_like if self._is_whole else namespace(x).zeros_like)(x)

    def add(self, at: At, part: Array) -> None:
        target = self.total[_index(self.total, at, self._trailing)]
        where = tuple(-1 if one.start is None else one.start for one in at)
        if self._is_whole and where not in self._seen:
            self._seen.add(where)
            target[...] = part
            return
        shared = tuple(
            axis for axis, (a, b) in enumerate(zip(target.shape, part.shape, strict=True)) if a == 1 < b
        )
        target += namespace(part).sum(part, axis=shared, keepdims=True) if shared else part


def _trailing(keys: Keys) -> zip[tuple[Array | None, int]]:
    """Return k, v and bias of a set, each with the number of its trailing axes."""
    return zip(keys[:3], (2, 2, 1), strict=True)


def _blocks(
    q: Array, sets: Sequence[Keys], lead: tuple[int, ...], block: int, together: bool
) -> Iterator[_Block]:
    """Yield blocks of the leading axes and of the queries, with the keys that they attend to."""
    n = q.shape[-2]
    m = sum(keys.k.shape[-2] for keys in sets)
    rows = block // max(1, math.prod(lead) * m)
    if together and block_sizes.INPLACE_FEW_QUERIES <= rows < n:
        whole = tuple(slice(0, size) for size in lead)
        places = [(*whole, part) for part in slices(n, rows)]
    else:
        places = list(_cut(lead, n, m, block))
    # One width for all blocks: `_Sum` needs keys that are cut at the same places.
    longest = max((rows.stop - rows.start for *_, rows in places), default=1)
    width = max(block_sizes.INPLACE_MIN_KEYS, block // longest)
    for at in places:
        queries = at[-1]
        passes = []
        for number, keys in enumerate(sets):
            m = keys.k.shape[-2]
            # Several sets share one step, and a pair weight needs all keys of a query: such keys are not cut.
            is_whole = len(sets) > 1 or keys.pair_weight is not None
            for part in slices(queries.stop if keys.is_causal else m, m if is_whole else width):
                here = (*at[:-1], part)
                seen = None
                if keys.is_causal and part.stop > queries.start + 1:
                    seen = past(q[..., queries, :], part.stop - part.start, queries.start, part.start)
                passes.append([_Piece(_of_block(keys, at, here), number, here, seen)])
        if len(sets) > 1:
            passes = [list(itertools.chain.from_iterable(passes))]
        yield _Block(at, _part(q, at, 2), passes)


def _of_block(keys: Keys, queries: At, here: At) -> Keys:
    """Return the keys of a set at `here`, with the pair weight of the queries at `queries`."""
    weight = keys.pair_weight
    if weight is not None:
        everywhere = (*queries[:-1], slice(None))
        arrays = tuple(_part(x, everywhere, 2) for x in weight.arrays)
        weight = weight._replace(mask=_part(weight.mask, queries, 1), arrays=arrays)
    k, v, bias = (_part(x, here, trailing) for x, trailing in _trailing(keys))
    return Keys(k, v, bias, pair_weight=weight)


def _cut(lead: tuple[int, ...], n: int, m: int, block: int) -> Iterator[At]:
    """Yield places of blocks of about `block` logits; leading axes are cut before the queries."""
    if not lead:
        yield from ((rows,) for rows in slices(n, max(block_sizes.INPLACE_MIN_QUERIES, block // m)))
        return
    size, *rest = lead
    inside = math.prod(rest) * n * m
    # An odd number of heads: rows that lie a power of two apart would evict each other from the cache.
    held = max(1, block // max(1, inside))
    for part in slices(size, held - 1 if held % 2 == 0 and held < size else held):
        whole = [tuple(slice(0, length) for length in (*rest, n))]
        yield from (
            (part, *others) for others in (whole if inside <= block else _cut(tuple(rest), n, m, block))
        )


def _first_other(bias: Array) -> int:
    """Count the keys (axis -2) before the first key with a bias other than 0."""
    xp, keys = namespace(bias), bias.shape[-2]
    has = xp.any(xp.moveaxis(bias, -2, 0) != 0, axis=tuple(range(1, bias.ndim)))
    return int(xp.argmax(xp.astype(has, xp.int8))) if xp.any(has) else keys


def _part(x: Array | None, at: At, trailing: int) -> Array | None:
    """Return the part of an array that belongs to a block; the first trailing axis is cut too."""
    if x is None:
        return None
    return x[_index(x, at, trailing)]


def _index(x: Array, at: At, trailing: int) -> tuple[Any, ...]:
    *lead, rows = at
    own = x.shape[: x.ndim - trailing]
    lead = lead[len(lead) - len(own) :]
    axes = (slice(None) if size == 1 else part for size, part in zip(own, lead, strict=True))
    return (*axes, rows, ...)


def _product_shape(q: Array, keys: Keys) -> tuple[int, ...]:
    return (*leading_axes(q, [keys]), q.shape[-2], keys.v.shape[-1])
