"""The average and its gradient in blocks that stay in the cache, for arrays that can be written to.

The same as `_attend.attend` (tests/shared/test_fused.py), where nothing is traced: NumPy, CuPy and torch.
"""

from __future__ import annotations

import itertools
import math
import operator
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from ._attend import Average, Keys, PairWeight, finite, leading_axes, log_of_sum, past, slices
from ._inputs import dot, placement
from ._tracing import namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ._writing import Writing

    Array = Any
    At = tuple[slice, ...]
    # The factors of some queries; of sum(factors * d), the gradients to the queries and to the arrays.
    Pullback = Callable[[PairWeight, Array, Array], Sequence[Array | None]]

# Logits of a block, over all its axes: the fewest at which the products are as fast as whole ones.
BLOCK_LOGITS = 1 << 20
_MIN_BLOCK_KEYS, _MIN_BLOCK_QUERIES = 1024, 64
_FEW_QUERIES = 512
# Sums of exponentials that need no maximum subtracted, and the most that a bias as a factor may be, in
# nats: what falls out of float32 is 1e-13 of such a sum, and times values up to 1e18 it stays within.
_SAFE_SUMS, _SAFE_BIAS = (1e-12, 1e18), 30


class _Weights(NamedTuple):
    """What the keys of a step weigh for a block of queries."""

    weights: list[Array]  # of each set, (..., M, n), over exp(top)
    values: list[Array]  # that they weigh
    total: Array  # (..., n)
    top: Array


class _Block(NamedTuple):
    """A block of queries, and the keys that it meets: a step for each part of them that is held at a time."""

    at: At  # of the result: its leading axes and its queries
    q: Array
    steps: list[list[_Piece]]
    pair_weight: PairWeight | None

    def weights(self, pieces: Sequence[_Piece], scale: float, steps: Writing, top: Array | None) -> _Weights:
        """With the maxima subtracted, of `top` too."""
        xp = namespace(self.q)
        logits = [piece.logits(self.q, scale, steps) for piece in pieces]
        # A row of nothing but -inf has no weight at all, and a maximum that can be subtracted.
        highest = reduce(xp.maximum, [xp.max(x, axis=-2) for x in logits])
        highest = steps.at_least(highest, xp.finfo(highest.dtype).min)
        top = highest if top is None else xp.maximum(highest, top)
        weights = [self._paired(steps.exp(steps.subtract(x, top[..., None, :])), steps) for x in logits]
        total = reduce(operator.add, [xp.sum(x, axis=-2) for x in weights])
        return _Weights(weights, [piece.keys.v for piece in pieces], total, top)

    def plain_weights(self, pieces: Sequence[_Piece], scale: float, steps: Writing) -> _Weights | None:
        """Without maxima, which is two passes less; None where the exponentials leave what floats hold."""
        xp = namespace(self.q)
        weights, values, totals = [], [], []
        with steps.quietly():
            for piece in pieces:
                # Sums with factors are products, and those of many small tiles slow where rows are short.
                factor = piece.factor(self.q) if steps.long_rows or len(pieces) == 1 else None
                x = self._paired(steps.exp(piece.logits(self.q, scale, steps, biased=factor is None)), steps)
                weights.append(x)
                if factor is None:
                    values.append(piece.keys.v)
                    totals.append(xp.sum(x, axis=-2))
                    continue
                absent = piece.keys.bias == -math.inf
                if piece.has_own_bias(self.q) and xp.any(absent):
                    x[xp.nonzero(xp.broadcast_to(absent, x.shape[:-1]))] = 0
                values.append(piece.keys.v * factor[..., None])
                totals.append(xp.matmul(factor[..., None, :], x)[..., 0, :])
            total = reduce(operator.add, totals)
            if not (xp.min(total) > _SAFE_SUMS[0] and xp.max(total) < _SAFE_SUMS[1]):
                return None
        return _Weights(weights, values, total, xp.zeros_like(total))

    def _paired(self, weights: Array, steps: Writing) -> Array:
        """The weights with those of the pairs."""
        if self.pair_weight is None:
            return weights
        return steps.multiply(weights, self.pair_weight.of(self.q, steps))


class _Piece(NamedTuple):
    """Keys of one set."""

    keys: Keys
    number: int  # of the set
    at: At  # of the set: its leading axes and its keys
    past: Array | None

    def has_own_bias(self, q: Array) -> bool:
        """Whether tiles of queries that share these keys have each a bias of their own."""
        k, _, bias, _ = self.keys
        return bias is not None and k.ndim > 2 and k.shape[-3] == 1 < bias.shape[-2] == q.shape[-3]

    def factor(self, q: Array) -> Array | None:
        """The bias as a factor of the values: where they are far fewer than the logits, and none is lost.

        Tiles may have biases of their own if all they do is leave out keys.
        """
        k, v, bias, _ = self.keys
        tiles = q.shape[-3] if k.ndim > 2 and k.shape[-3] == 1 else 1
        if bias is None or 4 * k.shape[-2] > tiles * q.shape[-2]:
            return None
        xp = namespace(bias)
        common = xp.max(bias, axis=-2, keepdims=True) if self.has_own_bias(q) else bias
        if not tuple(common.shape[:-1]) == tuple(k.shape[:-2]) == tuple(v.shape[:-2]):
            return None
        safe = (bias == -math.inf) | ((bias == common) & (xp.abs(common) < _SAFE_BIAS))
        return xp.exp(common) if xp.all(safe) else None

    def logits(self, q: Array, scale: float, steps: Writing, *, biased: bool = True) -> Array:
        """(..., M, n)."""
        x = steps.products(f"logits {self.number}", self.keys.k, q, scale)
        if biased and self.keys.bias is not None:
            bias = self.keys.bias[..., None]
            first = _first_other(bias) if steps.looks and bias.shape[:-2] == x.shape[:-2] else 0
            if first:
                steps.add(x[..., first:, :], bias[..., first:, :])
            else:
                x = steps.add(x, bias)
        return x if self.past is None else namespace(x).where(self.past, x, -math.inf)


def attend(
    q: Array,
    sets: Sequence[Keys],
    steps: Writing,
    scale: float,
    pair_weight: PairWeight | None,
    is_causal: bool,
    block: int,
) -> Average:
    """`_attend.attend`, a block of queries at a time."""
    xp, device = namespace(q), placement(q)
    lead, n = leading_axes(q, sets, None, pair_weight), q.shape[-2]
    out = xp.empty((*lead, n, sets[0].v.shape[-1]), dtype=q.dtype, device=device)
    tops, totals = (xp.empty((*lead, n), dtype=q.dtype, device=device) for _ in range(2))
    smallest = xp.asarray(xp.finfo(q.dtype).smallest_normal, dtype=q.dtype, device=device)
    plain = steps.looks
    for here in _blocks(q, sets, lead, pair_weight, is_causal, block, steps.together):
        top = total = acc = None
        target = out[here.at]
        direct = not steps.together and _product_shape(here.q, here.steps[0][0].keys) == tuple(target.shape)
        steps.hold("acc", target if direct else None)
        for pieces in here.steps:
            part = here.plain_weights(pieces, scale, steps) if plain else None
            if part is None:
                plain, part = False, here.weights(pieces, scale, steps, top)
            if top is None:
                total = part.total
            else:
                shrink = xp.exp(top - part.top)
                total, acc = total * shrink + part.total, steps.multiply(acc, shrink[..., None])
            top, weights = part.top, part.weights
            if len(here.steps) == 1:
                # Weights that add up to one: dividing what they give would take longer over its short rows.
                share = (1 / xp.maximum(total, smallest))[..., None, :]
                weights = [steps.multiply(x, share) for x in weights]
            for x, v in zip(weights, part.values, strict=True):
                acc = steps.sums(x, v, acc)
        tops[here.at], totals[here.at] = top, total
        if len(here.steps) > 1:
            acc = steps.multiply(acc, 1 / xp.maximum(total, smallest)[..., None])
        if not direct:
            target[...] = acc
    return Average(out, log_of_sum(tops, totals))


def gradients(
    q: Array,
    sets: Sequence[Keys],
    steps: Writing,
    *,
    average: Average,
    cotangent: Average,
    wanted: Iterable[bool],
    scale: float,
    pair_weight: PairWeight | None,
    pullback: Pullback,
    is_causal: bool,
    block: int,
) -> tuple[Array | None, list[Keys], list[Array]]:
    """The gradients of `attend`, from its result: the weights are made again, block by block.

    `wanted` says of `q`, and then of each array of each set, whether its gradient is.
    """
    xp = namespace(q)
    lead = tuple(average.log_norm.shape[:-1])
    wanted = iter(wanted)
    dq = _Sum(q, 2, lead) if next(wanted) else None
    # Blocks of queries that see different keys cut them differently.
    own = None if is_causal else lead
    dsets = [
        [None if x is None or not next(wanted) else _Sum(x, n, own) for x, n in _trailing(keys)]
        for keys in sets
    ]
    dpair = [] if pair_weight is None else [_Sum(x, 2, lead) for x in pair_weight.arrays]
    # What the average itself takes off the gradient of each weight.
    level = cotangent.log_norm - dot(cotangent.out, average.out)
    for here in _blocks(q, sets, lead, pair_weight, is_causal, block, steps.together):
        g, norm = cotangent.out[here.at], finite(average.log_norm[here.at])
        for piece in itertools.chain.from_iterable(here.steps):
            k, v, _, _ = piece.keys
            weights = steps.exp(steps.subtract(piece.logits(here.q, scale, steps), norm[..., None, :]))
            d = steps.add(steps.products("d", v, g), level[here.at][..., None, :])
            d = steps.multiply(d, weights)
            if here.pair_weight is not None:
                factor, drows, *darrays = pullback(here.pair_weight, here.q, d)
                everywhere = (*here.at[:-1], slice(None))
                for whole, at, part in [
                    (dq, here.at, drows),
                    *((x, everywhere, y) for x, y in zip(dpair, darrays, strict=True)),
                ]:
                    if whole is not None and part is not None:
                        whole.add(at, part)
                d, weights = steps.multiply(d, factor), steps.multiply(weights, factor)
            dk, dv, dbias = dsets[piece.number]
            if dv is not None:
                dv.add(piece.at, steps.matmul("along k", weights, g))
            if dbias is not None:
                dbias.add(piece.at, xp.sum(d, axis=-1))
            if scale != 1:
                d = steps.multiply(d, scale)
            if dq is not None:
                dq.add(here.at, steps.sums(d, k))
            if dk is not None:
                dk.add(piece.at, steps.matmul("along k", d, here.q))
    return (
        None if dq is None else dq.total,
        [Keys(*(None if x is None else x.total for x in keys)) for keys in dsets],
        [x.total for x in dpair],
    )


def sums_by_group(x: Array, index: Array, group: Array, count: int) -> Array:
    """`_tree.sums_by_group`: sums of all blocks at a time, one row more of each."""
    xp, (lanes, blocks, size) = namespace(x), index.shape
    shape, block = (size, lanes * blocks, x.shape[-1]), xp.arange(lanes * blocks)
    first = xp.arange(0, lanes * x.shape[1], x.shape[1])[:, None, None]
    index = xp.reshape(xp.moveaxis(index + first, -1, 0), (-1,))
    sums = xp.reshape(xp.take(xp.reshape(x, (-1, shape[-1])), index, axis=0), shape)
    for before, here in itertools.pairwise(sums):
        xp.add(before, here, out=here)
    group = group + xp.reshape(count * block, (lanes, blocks, 1))
    counts = xp.bincount(xp.reshape(group, (-1,)), minlength=lanes * blocks * count)
    ends = xp.cumulative_sum(xp.reshape(counts, (-1, count)), axis=-1)
    found = sums[xp.maximum(ends - 1, 0), block[:, None]]
    found[ends == 0] = 0
    found[:, 1:] -= found[:, :-1].copy()
    return xp.reshape(found, (lanes, blocks, count, shape[-1]))


class _Sum:
    """A gradient that blocks add their shares to, summed over what the array is broadcast along."""

    def __init__(self, x: Array, trailing: int, lead: tuple[int, ...] | None) -> None:
        self._trailing = trailing
        self._seen: set[tuple[int, ...]] = set()
        # What no other block adds to need not be zero first: a pass less over the memory.
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
    """The arrays of a set, with the number of their trailing axes."""
    return zip(keys[:3], (2, 2, 1), strict=True)


def _blocks(
    q: Array,
    sets: Sequence[Keys],
    lead: tuple[int, ...],
    pair_weight: PairWeight | None,
    is_causal: bool,
    block: int,
    together: bool,
) -> Iterator[_Block]:
    """Blocks of the leading axes and of the queries, with the keys that they meet."""
    n = q.shape[-2]
    m = sum(keys.k.shape[-2] for keys in sets)
    rows = block // max(1, math.prod(lead) * m)
    if together and _FEW_QUERIES <= rows < n:
        whole = tuple(slice(0, size) for size in lead)
        places = [(*whole, part) for part in slices(n, rows)]
    else:
        places = list(_cut(lead, n, m, block))
    # One for all blocks: gradients count on keys that are cut at the same places.
    width = max(_MIN_BLOCK_KEYS, block // max((rows.stop - rows.start for *_, rows in places), default=1))
    if pair_weight is not None:
        width = sets[0].k.shape[-2]
    for at in places:
        queries = at[-1]
        steps = []
        for number, keys in enumerate(sets):
            m = keys.k.shape[-2]
            is_cut = is_causal and number == 0
            for part in slices(queries.stop if is_cut else m, width if len(sets) == 1 else m):
                here = (*at[:-1], part)
                cut = Keys(_part(keys.k, here, 2), _part(keys.v, here, 2), _part(keys.bias, here, 1))
                seen = None
                if is_cut and part.stop > queries.start + 1:
                    seen = past(q[..., queries, :], part.stop - part.start, queries.start, part.start)
                steps.append([_Piece(cut, number, here, seen)])
        if len(sets) > 1:
            steps = [list(itertools.chain.from_iterable(steps))]
        weight = pair_weight
        if weight is not None:
            everywhere = (*at[:-1], slice(None))
            arrays = tuple(_part(x, everywhere, 2) for x in weight.arrays)
            weight = weight._replace(mask=_part(weight.mask, at, 1), arrays=arrays)
        yield _Block(at, _part(q, at, 2), steps, weight)


def _cut(lead: tuple[int, ...], n: int, m: int, block: int) -> Iterator[At]:
    """Slices of the leading axes and of the queries that keep a block within bounds, the first axis first."""
    if not lead:
        yield from ((rows,) for rows in slices(n, max(_MIN_BLOCK_QUERIES, block // m)))
        return
    size, *rest = lead
    inside = math.prod(rest) * n * m
    # An odd number: rows a power of two apart share their places in a cache.
    held = max(1, block // max(1, inside))
    for part in slices(size, held - 1 if held % 2 == 0 and held < size else held):
        whole = [tuple(slice(0, length) for length in (*rest, n))]
        yield from (
            (part, *others) for others in (whole if inside <= block else _cut(tuple(rest), n, m, block))
        )


def _first_other(bias: Array) -> int:
    """How many keys (axis -2) come before the first one that has a bias anywhere."""
    xp, keys = namespace(bias), bias.shape[-2]
    has = xp.any(xp.reshape(xp.moveaxis(bias, -2, 0), (keys, -1)) != 0, axis=-1)
    return int(xp.argmax(xp.astype(has, xp.int8))) if xp.any(has) else keys


def _part(x: Array | None, at: At, trailing: int) -> Array | None:
    """What of an array with so many trailing axes, of which the first is cut too, belongs to a block."""
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
    return (*leading_axes(q, [keys], None, None), q.shape[-2], keys.v.shape[-1])
