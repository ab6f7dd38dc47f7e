"""The one average and the one merge that every estimator is made of.

Pure array-API code on checked arrays in float32 or float64; the public, checking `attend` and
`merge` stand in `_primitives.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ._inputs import namespace, placement, with_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = Any
    PairBias = Callable[[slice], Array]

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


def average(logits: Array, v: Array) -> Average:
    """Average `v` (..., M, E) with weights ``exp(logits)`` (..., N, M), rows without weight included."""
    xp = namespace(logits)
    top = finite(xp.max(logits, axis=-1, keepdims=True))
    weights = xp.exp(logits - top)
    total = xp.sum(weights, axis=-1, keepdims=True)
    out = xp.matmul(weights, v) / nonzero(total)
    return Average(out, _log_norm(top, total)[..., 0])


def merge(a: Average, b: Average) -> Average:
    """The same average over the union of two disjoint key sets. Associative."""
    (out_a, log_a), (out_b, log_b) = a, b
    xp = namespace(log_a)
    top = finite(xp.maximum(log_a, log_b))
    weight_a, weight_b = xp.exp(log_a - top), xp.exp(log_b - top)
    total = weight_a + weight_b
    safe = nonzero(total)
    out = (weight_a / safe)[..., None] * out_a + (weight_b / safe)[..., None] * out_b
    return Average(out, _log_norm(top, total))


def attend(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    *,
    pair_bias: PairBias | None = None,
    is_causal: bool = False,
) -> Average:
    """Average `v` with weights ``exp(q . k + bias)``, in blocks of queries and keys.

    `bias` (..., M) belongs to a key. `pair_bias` gives, for a slice of the queries, what belongs
    to a query and a key: (..., n, M). It is a function so that it is never whole in memory.
    """
    n, m = q.shape[-2], k.shape[-2]
    lead = math.prod([max(pair) for pair in zip(q.shape[:-2], k.shape[:-2], strict=True)])
    if lead * n * m <= _BLOCK_LOGITS and not is_causal:
        # No slices: a compiler can keep the sizes symbolic.
        return _block(q, k, v, bias, None if pair_bias is None else pair_bias(slice(0, n)))
    cols = min(m, max(_MIN_BLOCK_KEYS, _BLOCK_LOGITS // max(1, lead * n)))
    done: list[Any] = []
    for queries in query_blocks(n, lead * cols):
        pairs = None if pair_bias is None else pair_bias(queries)
        last = min(queries.stop, m) if is_causal else m
        part = None
        for first in range(0, last, cols):
            keys = slice(first, min(first + cols, last))
            block = _block(
                q[..., queries, :],
                k[..., keys, :],
                v[..., keys, :],
                None if bias is None else bias[..., keys],
                None if pairs is None else pairs[..., keys],
                future_of=(queries, keys) if is_causal and keys.stop > queries.start + 1 else None,
            )
            part = block if part is None else merge(part, block)
        done.append(part)
    if len(done) == 1:
        return Average(*done[0])
    xp = namespace(q)
    outs, log_norms = zip(*done, strict=True)
    return Average(xp.concat(outs, axis=-2), xp.concat(log_norms, axis=-1))


def _block(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    pairs: Array | None,
    future_of: tuple[slice, slice] | None = None,
) -> Average:
    xp = namespace(q)
    logits = xp.matmul(q, xp.matrix_transpose(k))
    if bias is not None:
        logits = logits + bias[..., None, :]
    if pairs is not None:
        logits = logits + pairs
    if future_of is not None:
        logits = _hide_future(logits, *future_of)
    return average(logits, v)


def query_blocks(n: int, logits_per_query: int) -> list[slice]:
    """Slices of the queries that keep the logits of one block within bounds."""
    rows = max(_MIN_BLOCK_QUERIES, _BLOCK_LOGITS // max(1, logits_per_query))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def finite(top: Array) -> Array:
    """A maximum to subtract: 0 for a row of nothing but ``-inf``, which then has no weight at all."""
    return namespace(top).where(top == -math.inf, 0.0, top)


def nonzero(total: Array) -> Array:
    """A sum to divide by. `where`, not `maximum`, whose gradient is halved at the tie total = 1."""
    return namespace(total).where(total == 0, 1.0, total)


def _log_norm(top: Array, total: Array) -> Array:
    xp = namespace(total)
    return xp.where(total == 0, -math.inf, top + xp.log(nonzero(total)))


def _hide_future(logits: Array, queries: slice, keys: slice) -> Array:
    xp, device = namespace(logits), placement(logits)
    n = xp.arange(queries.start, queries.stop, device=device)
    m = xp.arange(keys.start, keys.stop, device=device)
    lag = xp.expand_dims(n, axis=-1) - xp.expand_dims(m, axis=0)
    return xp.where(with_rank(lag >= 0, logits.ndim), logits, -math.inf)
