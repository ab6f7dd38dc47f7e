"""The average and the merge that every estimator is built from.

The code is plain array API on checked arrays in float32 or float64. `randattn._backends` computes the same
average as fast as a library can. The public `attend` and `merge`, which check their arguments, are in
`randattn._estimators.primitives`.
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._core import block_sizes, library

from .checks import broadcast_shapes
from .indexing import cut, joined, slices
from .inputs import dot, with_rank
from .library import hint, is_known, namespace, placement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Array = Any


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
    """A set of keys with its values, biases and factors; queries may attend to several sets.

    Attributes
    ----------
    k : array, shape (..., M, D)
    v : array, shape (..., M, E)
        The values.
    bias : array, shape (..., M), or None
        Added to the logits of a key, in nats.
    kappa : float or None
        ``-kappa |k|^2/2`` is added to the logits of a key too, in nats. If kappa is the square of the scale
        s of `attend`, a frequency w weighs a key by ``xi(s k, w)``.
    pair_bias : array, shape (..., N, M), or None
        Added to the logit of a query and a key, in nats.
    pair_weight : PairWeight or None
        Multiplies the weight of a query and a key.
    is_causal : bool
        Query n sees the keys 0 to n alone.
    """

    k: Array
    v: Array
    bias: Array | None = None
    kappa: float | None = None
    pair_bias: Array | None = None
    pair_weight: PairWeight | None = None
    is_causal: bool = False

    def of(self, part: slice) -> Keys:
        """Return a part of the keys, without `pair_bias`, `pair_weight` and `is_causal`."""
        bias = None if self.bias is None else self.bias[..., part]
        return Keys(self.k[..., part, :], self.v[..., part, :], bias, self.kappa)

    def for_last(self, queries: int) -> tuple[Keys, ...]:
        """Return the keys before the queries and the queries' own, where these are the last tokens.

        The sets have no `pair_bias` and no `pair_weight`.
        """
        # A symbolic number of keys can be compared with no number: it is that of the queries.
        if not is_known(self.k.shape[-2], queries) or self.k.shape[-2] == queries:
            return (self._replace(is_causal=True),)
        before = self.k.shape[-2] - queries
        return self.of(slice(before)), self.of(slice(before, None))._replace(is_causal=True)

    def for_queries(self, part: slice) -> Keys:
        """Return the keys with `pair_bias` and the mask of `pair_weight` cut to a part of the queries."""
        pair_bias = None if self.pair_bias is None else self.pair_bias[..., part, :]
        weight = self.pair_weight
        if weight is not None and weight.mask is not None:
            weight = weight._replace(mask=weight.mask[..., part])
        return self._replace(pair_bias=pair_bias, pair_weight=weight)

    def scaled(self, scale: float) -> Keys:
        """Return the keys multiplied by `scale`; the term of `kappa` stays as it is."""
        return self._replace(k=self.k * scale, kappa=None if self.kappa is None else self.kappa / scale**2)

    def biased(self) -> Keys:
        """Return the set with the term of `kappa` added to the bias."""
        if self.kappa is None:
            return self
        kappa = (-self.kappa / 2) * dot(self.k, self.k)
        return self._replace(bias=kappa if self.bias is None else self.bias + kappa, kappa=None)

    def leading_axes(self) -> list[tuple[int, ...]]:
        """Return the leading axes of each array of the set."""
        arrays = [(self.k, 2), (self.v, 2), (self.bias, 1), (self.pair_bias, 2)]
        if self.pair_weight is not None:
            arrays += [(self.pair_weight.mask, 1), *((x, 2) for x in self.pair_weight.arrays)]
        return [x.shape[: x.ndim - trailing] for x, trailing in arrays if x is not None]


class PairWeight(NamedTuple):
    """A factor for the weight of each pair of a query and a key, computed for a block of queries at a time.

    ``function(ops, q, mask, *arrays)`` returns the factors (..., M, n), keys first, of n queries. It takes
    its elementwise operations from `ops`, which may write over their first argument (`Operations`).

    Attributes
    ----------
    function : callable
    mask : boolean array, shape (..., N), or None
        The mask of the queries.
    arrays : tuple of arrays, shapes (..., C, X)
        Further arguments, without an axis of queries.
    """

    function: Callable[..., Array]
    mask: Array | None
    arrays: tuple[Array, ...]

    def of(self, q: Array, ops: Any = None) -> Array:
        """Return the factors (..., M, n) of queries; `mask` is the mask of the same queries."""
        return self.function(ops or Operations(q), q, self.mask, *self.arrays)


class Operations:
    """Elementwise operations that return new arrays.

    `randattn._backends.inplace_ops` has operations that write over their first argument. Code for both uses
    the returned array and never reads the argument again.
    """

    def __init__(self, like: Array) -> None:
        self._xp = namespace(like)

    def matmul(self, name: str, a: Array, b: Array) -> Array:  # noqa: ARG002
        """Return the matrix product; `name` is the buffer that a subclass writes it to."""
        return self._xp.matmul(a, b)

    def products(self, name: str, k: Array, q: Array) -> Array:
        """Return ``k . q``, (..., M, n)."""
        return self.matmul(name, k, self._xp.matrix_transpose(q))

    def add(self, x: Array, y: Array) -> Array:
        """Return ``x + y``."""
        return x + y

    def subtract(self, x: Array, y: Array) -> Array:
        """Return ``x - y``."""
        return x - y

    def multiply(self, x: Array, y: Array) -> Array:
        """Return ``x y``."""
        return x * y

    def exp(self, x: Array) -> Array:
        """Return the exponential."""
        return self._xp.exp(x)

    def at_most(self, x: Array, bound: float) -> Array:
        """Return `x`, or the bound where the bound is smaller."""
        return self._xp.where(x > bound, bound, x)

    def at_least(self, x: Array, bound: float) -> Array:
        """Return `x`, or the bound where the bound is larger."""
        return self._xp.where(x < bound, bound, x)


def average(logits: Array, v: Array) -> Average:
    """Average `v` (..., M, E) with weights ``exp(logits)`` (..., N, M); a row without a key gives zeros."""
    return _average([logits], [v], [None])


def average_of_all(log_weights: Array, v: Array) -> Average:
    """Average all of `v` (..., M, E) to a single (..., E), with weights ``exp(log_weights)`` (..., M)."""
    out, log_norm = average(log_weights[..., None, :], v)
    return Average(out[..., 0, :], log_norm[..., 0])


def _average(logits: Sequence[Array], values: Sequence[Array], factors: Sequence[Array | None]) -> Average:
    """Average over the union of several sets; a factor (..., N, M) multiplies the weights of its set."""
    xp = namespace(logits[0])
    # The maximum over all sets is subtracted: exp overflows float32 above 88 nats.
    top = finite(reduce(xp.maximum, [xp.max(x, axis=-1, keepdims=True) for x in logits]))
    weights = [xp.exp(x - top) for x in logits]
    weights = [x if factor is None else x * factor for x, factor in zip(weights, factors, strict=True)]
    total = reduce(operator.add, [xp.sum(x, axis=-1, keepdims=True) for x in weights])
    sums = reduce(operator.add, [xp.matmul(x, v) for x, v in zip(weights, values, strict=True)])
    return of_one_shape(sums / nonzero(total), log_of_sum(top, total)[..., 0])


def of_one_shape(out: Array, log_norm: Array) -> Average:
    """Return an average of both arrays, also where values have leading axes that logits have not."""
    shape = tuple(out.shape[:-1])
    if tuple(log_norm.shape) == shape:
        return Average(out, log_norm)
    return Average(out, namespace(out).broadcast_to(log_norm, shape))


def merge(a: Average, b: Average) -> Average:
    """Merge averages over two disjoint key sets to the average over their union; the merge is associative."""
    (out_a, log_a), (out_b, log_b) = a, b
    xp = namespace(log_a)
    # With l the logaddexp of both log_norm, each `out` has the share exp(log_norm - l) of the result.
    # Two averages without a key have -inf twice, and -inf - -inf is NaN: `finite` makes the maximum 0.
    top = finite(xp.maximum(log_a, log_b))
    weight_a, weight_b = xp.exp(log_a - top), xp.exp(log_b - top)
    total = weight_a + weight_b
    safe = nonzero(total)
    out = (weight_a / safe)[..., None] * out_a + (weight_b / safe)[..., None] * out_b
    return Average(out, log_of_sum(top, total))


def attend(q: Array, *sets: Keys, scale: float = 1) -> Average:
    """Average the values of all sets with weights ``exp(scale q . k + bias)``, in blocks of logits."""
    if len(sets) > 1:
        return reduce(merge, (attend(q, keys, scale=scale) for keys in sets))
    keys = sets[0].biased()
    n, m = q.shape[-2], keys.k.shape[-2]
    lead = math.prod(leading_axes(q, [keys]))
    if not is_known(lead, n, m):
        # The loop below compares sizes; a comparison with a symbolic size is a guard of the traced program.
        return _in_parts(q, keys, scale, parts_of(lead * n * m, block_sizes.PLAIN_LOGITS))
    if lead * n * m <= block_sizes.PLAIN_LOGITS and not keys.is_causal:
        return attend_whole(q, [keys], scale)
    cols = min(m, max(block_sizes.PLAIN_MIN_KEYS, block_sizes.PLAIN_LOGITS // max(1, lead * n)))
    if keys.pair_weight is not None:
        # The factors of a query may depend on each other (LARA subtracts their mean): its keys are not cut.
        cols = m
    done: list[Average] = []
    for rows in slices(n, rows_of_block(lead * cols)):
        here = keys.for_queries(rows)
        # Keys after the last query of a causal block are left out, not masked: their logits are not computed.
        seen = slices(min(rows.stop, m) if keys.is_causal else m, cols)
        done.append(
            reduce(merge, (_of_block(q[..., rows, :], here, part, scale, rows.start) for part in seen))
        )
    if len(done) == 1:
        return done[0]
    xp = namespace(q)
    outs, log_norms = zip(*done, strict=True)
    return Average(xp.concat(outs, axis=-2), xp.concat(log_norms, axis=-1))


def _of_block(q: Array, keys: Keys, part: slice, scale: float, first: int) -> Average:
    """Attend from a block of queries to a part of the keys; `first` is the number of the first query."""
    pair_bias = None if keys.pair_bias is None else keys.pair_bias[..., part]
    own = keys.of(part)._replace(pair_bias=pair_bias, pair_weight=keys.pair_weight, is_causal=keys.is_causal)
    return attend_whole(q, [own], scale, first=(first, part.start))


def _in_parts(q: Array, keys: Keys, scale: float, parts: int) -> Average:
    """Attend in `parts` blocks of queries, whose sizes a compiler keeps symbolic."""
    n = q.shape[-2]
    if parts == 1:
        return attend_whole(q, [keys], scale)
    mask = None if keys.pair_weight is None else keys.pair_weight.mask
    cuts = [cut(x, axis, parts) for x, axis in ((q, -2), (keys.pair_bias, -2), (mask, -1))]
    if keys.is_causal:
        # `cut` pads with keys whose numbers are above those of all queries: the causal mask hides them.
        earlier = [
            cut(x, axis, parts, so_far=True) for x, axis in ((keys.k, -2), (keys.v, -2), (keys.bias, -1))
        ]
    done = []
    for number, (queries, pair_bias, seen) in enumerate(zip(*cuts, strict=True)):
        weight = None if keys.pair_weight is None else keys.pair_weight._replace(mask=seen)
        here = keys._replace(pair_bias=pair_bias, pair_weight=weight)
        if keys.is_causal:
            k, v, bias = (x[number] for x in earlier)
            here = here._replace(k=k, v=v, bias=bias)
        done.append(attend_whole(queries, [here], scale, first=(number * queries.shape[-2], 0)))
    outs, log_norms = zip(*done, strict=True)
    return Average(joined(outs, -2, n), joined(log_norms, -1, n))


def parts_of(size: Any, most: int) -> int:
    """Return the number of parts of a symbolic size; a part of the caller's example has at most `most`.

    The number is a power of four, so that few programs serve all sizes. The compiler guards that a program
    serves no size above its bound.
    """
    parts = 1
    while hint(size) > parts * most:
        parts *= 4
    library.compiler.bound(size, parts * most)
    return parts


def attend_whole(
    q: Array, sets: Sequence[Keys], scale: float, first: tuple[int | Array, int | Array] = (0, 0)
) -> Average:
    """Attend without blocks.

    `first` has the numbers of the first query and of the first key, for causal sets.
    """
    xp = namespace(q)
    logits = [logits_of(q, keys, scale, first) for keys in sets]
    factors = [
        None if keys.pair_weight is None else xp.matrix_transpose(keys.pair_weight.of(q)) for keys in sets
    ]
    return _average(logits, [keys.v for keys in sets], factors)


def logits_of(q: Array, keys: Keys, scale: float, first: tuple[int | Array, int | Array] = (0, 0)) -> Array:
    """Return the logits (..., N, M) of queries and the keys of one set.

    The logit of a key that a query does not see is ``-inf``.
    """
    xp, k = namespace(q), keys.k
    # The scale multiplies the shorter side: a scaled copy of the longer side costs as much as the product.
    if scale == 1:
        x = xp.matmul(q, xp.matrix_transpose(k))
    elif hint(q.shape[-2]) < hint(k.shape[-2]):
        x = xp.matmul(q * scale, xp.matrix_transpose(k))
    else:
        x = xp.matmul(q, xp.matrix_transpose(k * scale))
    if keys.bias is not None:
        x = x + keys.bias[..., None, :]
    if keys.pair_bias is not None:
        x = x + keys.pair_bias
    if keys.is_causal:
        x = xp.where(xp.matrix_transpose(past(q, k.shape[-2], *first)), x, -math.inf)
    return x


def leading_axes(q: Array, sets: Iterable[Keys]) -> tuple[int, ...]:
    """Return the leading axes of the result."""
    return broadcast_shapes(q.shape[:-2], *(axes for keys in sets for axes in keys.leading_axes()))


def rows_of_block(logits_per_query: Any) -> int:
    """Return the number of queries that keeps the logits of one block within bounds."""
    return max(block_sizes.PLAIN_MIN_QUERIES, block_sizes.PLAIN_LOGITS // max(1, hint(logits_per_query)))


def finite(top: Array) -> Array:
    """Return a maximum that can be subtracted: 0 in place of ``-inf``, the maximum of a row without a key."""
    return namespace(top).where(top == -math.inf, 0.0, top)


def nonzero(total: Array) -> Array:
    """Return a sum that can be divided by: 1 in place of 0."""
    # Not `maximum`: a row with one key has the total 1, a tie, at which the gradient of `maximum` is halved.
    return namespace(total).where(total == 0, 1.0, total)


def log_of_sum(top: Array, total: Array) -> Array:
    """Return the logarithm of ``exp(top) total``, where the total may be zero."""
    xp = namespace(total)
    # `nonzero` inside too: the gradient of log(0), though `where` hides it, is 0 * inf = NaN.
    return xp.where(total == 0, -math.inf, top + xp.log(nonzero(total)))


def past(rows: Array, keys: int, first_query: int | Array, first_key: int | Array) -> Array:
    """Tell for each key and each query of `rows` (..., n, D) whether the key is no later: (..., keys, n)."""
    xp, device = namespace(rows), placement(rows)
    n = xp.expand_dims(xp.arange(rows.shape[-2], device=device), axis=0) + first_query
    m = xp.expand_dims(xp.arange(keys, device=device), axis=-1) + first_key
    # JAX may be set to raise where an operation promotes a rank.
    return with_rank(n - m >= 0, rows.ndim)
