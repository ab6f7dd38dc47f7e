"""The one average and the one merge that every estimator is made of.

Pure array-API code on checked arrays in float32 or float64. `_fused.py` has the same function as fast
as a library can do it; the public, checking `attend` and `merge` stand in `_primitives.py`.
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from ._checks import broadcast_shapes
from ._inputs import dot, placement, with_rank
from ._tracing import bound, hint, is_known, namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Array = Any

# Logits held at a time, over all leading axes: 16 MiB in float32. No N x M array is ever whole.
_BLOCK_LOGITS = 1 << 22
# The fewest keys and queries that a block is cut to: below them the products are too thin to be fast.
_MIN_BLOCK_KEYS, _MIN_BLOCK_QUERIES = 1024, 32


class Average(NamedTuple):
    """A softmax-weighted average and the logarithm of the weights' sum.

    Attributes
    ----------
    out : array, shape (..., N, E)
        The average of the values. Zeros where no key is left.
    log_norm : array, shape (..., N)
        Log-sum-exp of the logits, in nats. ``-inf`` where no key is left.
    """

    out: Array
    log_norm: Array


class Keys(NamedTuple):
    """A set of keys.

    Attributes
    ----------
    k : array, shape (..., M, D)
    v : array, shape (..., M, E)
        Their values.
    bias : array, shape (..., M), or None
        Added to their logits.
    kappa : float or None
        ``-kappa |k|^2/2`` is added too: with the scale, a frequency w weighs a key by ``xi(k, w)``.
    """

    k: Array
    v: Array
    bias: Array | None = None
    kappa: float | None = None

    def of(self, part: slice) -> Keys:
        """Some of them."""
        bias = None if self.bias is None else self.bias[..., part]
        return Keys(self.k[..., part, :], self.v[..., part, :], bias, self.kappa)

    def scaled(self, scale: float) -> Keys:
        """The same keys in other units, in which their logits are larger by this factor."""
        kappa = None if self.kappa is None else self.kappa / scale**2
        return Keys(self.k * scale, self.v, self.bias, kappa)

    def biased(self) -> Keys:
        """The same, with all that is added in the bias."""
        if self.kappa is None:
            return self
        kappa = (-self.kappa / 2) * dot(self.k, self.k)
        return Keys(self.k, self.v, kappa if self.bias is None else self.bias + kappa)


class PairWeight(NamedTuple):
    """A factor for the weight of each query and key, made a block of queries at a time.

    ``function(steps, q, mask, *arrays)`` gives (..., M, n), keys first, for n of the queries, and takes
    its elementwise steps from `steps`, which may write over what they are given (`Steps`).

    Attributes
    ----------
    function : callable
    mask : boolean array, shape (..., N), or None
        Of the queries.
    arrays : tuple of arrays, shapes (..., C, X)
        What belongs to no single query.
    """

    function: Callable[..., Array]
    mask: Array | None
    arrays: tuple[Array, ...]

    def of(self, q: Array, steps: Any = None) -> Array:
        """The factors (..., M, n) of some queries, whose mask this is."""
        return self.function(steps or Steps(q), q, self.mask, *self.arrays)


class Steps:
    """Elementwise steps, each a new array. `_writing.Writing` has those that write over the first one."""

    def __init__(self, like: Array) -> None:
        self._xp = namespace(like)

    def matmul(self, name: str, a: Array, b: Array) -> Array:  # noqa: ARG002
        """The matrix product; the name tells the places apart where it may be held."""
        return self._xp.matmul(a, b)

    def products(self, name: str, k: Array, q: Array) -> Array:
        """``k . q``, (..., M, n)."""
        return self.matmul(name, k, self._xp.matrix_transpose(q))

    def add(self, x: Array, y: Array) -> Array:
        """``x + y``."""
        return x + y

    def subtract(self, x: Array, y: Array) -> Array:
        """``x - y``."""
        return x - y

    def multiply(self, x: Array, y: Array) -> Array:
        """``x y``."""
        return x * y

    def exp(self, x: Array) -> Array:
        """The exponential."""
        return self._xp.exp(x)

    def at_most(self, x: Array, bound: float) -> Array:
        """`x`, or the bound where that is smaller."""
        return self._xp.where(x > bound, bound, x)

    def at_least(self, x: Array, bound: float) -> Array:
        """`x`, or the bound where that is larger."""
        return self._xp.where(x < bound, bound, x)


def average(logits: Array, v: Array) -> Average:
    """Average `v` (..., M, E) with weights ``exp(logits)`` (..., N, M), rows without weight included."""
    return _average([logits], [v], None)


def average_of_all(log_weights: Array, v: Array) -> Average:
    """One average (..., E) of all of `v` (..., M, E), with weights ``exp(log_weights)`` (..., M)."""
    out, log_norm = average(log_weights[..., None, :], v)
    return Average(out[..., 0, :], log_norm[..., 0])


def _average(logits: Sequence[Array], values: Sequence[Array], weight: Array | None) -> Average:
    """The average of several sets as one; `weight` is a factor of the weights of a single one."""
    xp = namespace(logits[0])
    top = finite(reduce(xp.maximum, [xp.max(x, axis=-1, keepdims=True) for x in logits]))
    weights = [xp.exp(x - top) for x in logits]
    if weight is not None:
        weights = [x * weight for x in weights]
    total = reduce(operator.add, [xp.sum(x, axis=-1, keepdims=True) for x in weights])
    out = reduce(operator.add, [xp.matmul(x, v) for x, v in zip(weights, values, strict=True)]) / nonzero(
        total
    )
    return of_one_shape(out, log_of_sum(top, total)[..., 0])


def of_one_shape(out: Array, log_norm: Array) -> Average:
    """The two, also where values have leading axes that logits have not."""
    shape = tuple(out.shape[:-1])
    if tuple(log_norm.shape) == shape:
        return Average(out, log_norm)
    return Average(out, namespace(out).broadcast_to(log_norm, shape))


def merge(a: Average, b: Average) -> Average:
    """The same average over the union of two disjoint key sets. Associative."""
    (out_a, log_a), (out_b, log_b) = a, b
    xp = namespace(log_a)
    top = finite(xp.maximum(log_a, log_b))
    weight_a, weight_b = xp.exp(log_a - top), xp.exp(log_b - top)
    total = weight_a + weight_b
    safe = nonzero(total)
    out = (weight_a / safe)[..., None] * out_a + (weight_b / safe)[..., None] * out_b
    return Average(out, log_of_sum(top, total))


def attend(
    q: Array,
    *sets: Keys,
    scale: float = 1,
    pair_bias: Array | None = None,
    pair_weight: PairWeight | None = None,
    is_causal: bool = False,
) -> Average:
    """Average the values of all sets with weights ``exp(scale q . k + bias)``.

    `pair_bias` (..., N, M) and `pair_weight`, for one set alone, belong to a query and a key. Causal is
    the first set.
    """
    if len(sets) > 1:
        parts = [attend(q, keys, scale=scale) for keys in sets[1:]]
        return reduce(merge, parts, attend(q, sets[0], scale=scale, is_causal=is_causal))
    sets = (keys,) = (sets[0].biased(),)
    n, m = q.shape[-2], keys.k.shape[-2]
    lead = math.prod(broadcast_shapes(q.shape[:-2], keys.k.shape[:-2]))
    if not is_known(lead, n, m):
        return _in_parts(
            q, keys, scale, pair_bias, pair_weight, is_causal, parts_of(lead * n * m, _BLOCK_LOGITS)
        )
    if lead * n * m <= _BLOCK_LOGITS and not is_causal:
        return attend_whole(q, sets, scale, pair_bias, pair_weight)
    cols = m if pair_weight is not None else min(m, max(_MIN_BLOCK_KEYS, _BLOCK_LOGITS // max(1, lead * n)))
    done: list[Any] = []
    for queries in slices(n, rows_of_block(lead * cols)):
        weight = pair_weight
        if weight is not None and weight.mask is not None:
            weight = weight._replace(mask=weight.mask[..., queries])
        done.append(
            reduce(
                merge,
                (
                    attend_whole(
                        q[..., queries, :],
                        [keys.of(part)],
                        scale,
                        None if pair_bias is None else pair_bias[..., queries, part],
                        weight,
                        first=(queries.start, part.start) if is_causal else None,
                    )
                    for part in slices(min(queries.stop, m) if is_causal else m, cols)
                ),
            )
        )
    if len(done) == 1:
        return Average(*done[0])
    xp = namespace(q)
    outs, log_norms = zip(*done, strict=True)
    return Average(xp.concat(outs, axis=-2), xp.concat(log_norms, axis=-1))


def _in_parts(
    q: Array,
    keys: Keys,
    scale: float,
    pair_bias: Array | None,
    pair_weight: PairWeight | None,
    is_causal: bool,
    parts: int,
) -> Average:
    """Attend in so many blocks of queries, whose sizes a compiler keeps symbolic."""
    n = q.shape[-2]
    if parts == 1:
        return attend_whole(q, [keys], scale, pair_bias, pair_weight, (0, 0) if is_causal else None)
    mask = None if pair_weight is None else pair_weight.mask
    cuts = [cut(x, axis, parts) for x, axis in ((q, -2), (pair_bias, -2), (mask, -1))]
    if is_causal:
        # What fills the last block up comes after all queries.
        earlier = [
            cut(x, axis, parts, so_far=True) for x, axis in ((keys.k, -2), (keys.v, -2), (keys.bias, -1))
        ]
    done = []
    for number, (queries, pairs, seen) in enumerate(zip(*cuts, strict=True)):
        weight = None if pair_weight is None else pair_weight._replace(mask=seen)
        here, first = keys, None
        if is_causal:
            here, first = Keys(*(x[number] for x in earlier)), (number * queries.shape[-2], 0)
        done.append(attend_whole(queries, [here], scale, pairs, weight, first))
    outs, log_norms = zip(*done, strict=True)
    return Average(joined(outs, -2, n), joined(log_norms, -1, n))


def parts_of(size: Any, most: int) -> int:
    """Return in how many parts to cut a symbolic size: each has at most `most` in the caller's example.

    The number is a power of four, so that few programs serve all sizes (`bound`).
    """
    parts = 1
    while hint(size) > parts * most:
        parts *= 4
    bound(size, parts * most)
    return parts


def cut(x: Array | None, axis: int, parts: int, *, so_far: bool = False) -> Sequence[Array | None]:
    """Cut an axis in parts of one length, filled up by the first entry; `so_far`: each with all before it.

    An index and a reshape do it: a slice's end would be compared with the axis, which is a guard.
    """
    if x is None:
        return [None] * parts
    xp, axis, n = namespace(x), axis + x.ndim, x.shape[axis]
    # At least two: PyTorch tells sizes of one from others, which is a guard.
    size = n // parts + 2
    number = xp.arange(parts * size, device=placement(x))
    x = xp.take(x, xp.where(number < n, number, 0), axis=axis)
    lead, rest = tuple(x.shape[:axis]), tuple(x.shape[axis + 1 :])
    x = xp.reshape(x, (*lead, parts, size, *rest))
    before = (slice(None),) * axis
    if so_far:
        return [xp.reshape(x[*before, : i + 1], (*lead, (i + 1) * size, *rest)) for i in range(parts)]
    return [x[*before, i] for i in range(parts)]


def joined(parts: Sequence[Array], axis: int, n: Any) -> Array:
    """Join what `cut` has cut, without what fills it up."""
    xp = namespace(parts[0])
    x = xp.concat(parts, axis=axis)
    return xp.take(x, xp.arange(n, device=placement(x)), axis=axis)


def attend_whole(
    q: Array,
    sets: Sequence[Keys],
    scale: float,
    pair_bias: Array | None,
    pair_weight: PairWeight | None,
    first: tuple[int | Array, int | Array] | None = None,
) -> Average:
    """`attend` without blocks. `first`: causal, from this query and this key on."""
    xp = namespace(q)
    logits = []
    for number, (k, _, bias, _) in enumerate(sets):
        # The scale goes to the fewer tokens: a pass over the others would cost as much as the product.
        if scale == 1:
            x = xp.matmul(q, xp.matrix_transpose(k))
        elif hint(q.shape[-2]) < hint(k.shape[-2]):
            x = xp.matmul(q * scale, xp.matrix_transpose(k))
        else:
            x = xp.matmul(q, xp.matrix_transpose(k * scale))
        if bias is not None:
            x = x + bias[..., None, :]
        if pair_bias is not None:
            x = x + pair_bias
        if first is not None and number == 0:
            x = xp.where(xp.matrix_transpose(past(q, k.shape[-2], *first)), x, -math.inf)
        logits.append(x)
    weight = None if pair_weight is None else xp.matrix_transpose(pair_weight.of(q))
    return _average(logits, [keys.v for keys in sets], weight)


def leading_axes(
    q: Array, sets: Iterable[Keys], pair_bias: Array | None, pair_weight: PairWeight | None
) -> tuple[int, ...]:
    """Those of the result."""
    arrays = [(q, 2), (pair_bias, 2)]
    for k, v, bias, _ in sets:
        arrays += [(k, 2), (v, 2), (bias, 1)]
    if pair_weight is not None:
        arrays += [(pair_weight.mask, 1), *((x, 2) for x in pair_weight.arrays)]
    return broadcast_shapes(*(x.shape[: x.ndim - trailing] for x, trailing in arrays if x is not None))


def rows_of_block(logits_per_query: Any) -> int:
    """The queries that keep the logits of one block within bounds."""
    return max(_MIN_BLOCK_QUERIES, _BLOCK_LOGITS // max(1, hint(logits_per_query)))


def slices(n: int, size: int) -> Iterator[slice]:
    """Slices of so many, the last one shorter."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def finite(top: Array) -> Array:
    """A maximum to subtract: 0 for a row of nothing but ``-inf``, which then has no weight at all."""
    return namespace(top).where(top == -math.inf, 0.0, top)


def nonzero(total: Array) -> Array:
    """A sum to divide by. `where`, not `maximum`, whose gradient is halved at the tie total = 1."""
    return namespace(total).where(total == 0, 1.0, total)


def log_of_sum(top: Array, total: Array) -> Array:
    """The logarithm of ``exp(top) total``, where the total may be zero."""
    xp = namespace(total)
    return xp.where(total == 0, -math.inf, top + xp.log(nonzero(total)))


def past(rows: Array, keys: int, first_query: int | Array, first_key: int | Array) -> Array:
    """Whether a key is no later than a query of `rows` (..., n, D): (..., keys, n)."""
    xp, device = namespace(rows), placement(rows)
    n = xp.expand_dims(xp.arange(rows.shape[-2], device=device), axis=0) + first_query
    m = xp.expand_dims(xp.arange(keys, device=device), axis=-1) + first_key
    return with_rank(n - m >= 0, rows.ndim)
