"""Diagnose an estimator by its weights, by replicates, and by comparison with exact attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from randattn._backends.dispatch import attend, backend_of
from randattn._core.average import Keys, nonzero
from randattn._core.checks import as_count, broadcast_shapes, check_arrays
from randattn._core.describe import shown
from randattn._core.draws import spawned
from randattn._core.indexing import slices
from randattn._core.inputs import (
    Inputs,
    check_causal,
    dot,
    heads_first,
    hide,
    is_tokens_first,
    prepare,
    with_rank,
    working_precision,
)
from randattn._core.library import Array, is_array
from randattn._estimators.final_average import parted, watched
from randattn._estimators.registry import row_of

from .advice import beside, recommendation

# Pairs of queries and keys over all heads: the most for which all queries are compared, the most for which
# another call is measured beside (both bound time), and those whose rows are computed at a time (memory).
_MOST_PAIRS, _MOST_PAIRS_BESIDE, _AT_HAND = 1 << 24, 1 << 28, 1 << 22
# Queries that are compared beyond `_MOST_PAIRS`: the comparison is then linear in the number of tokens.
_FEW_QUERIES = 64


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The result of `diagnose`. Arrays are of the inputs' library; a figure that was not computed is None.

    Attributes
    ----------
    estimator : str
        Name of the estimator.
    effective_samples : array, shape (..., N), or None
        Kish's effective sample size ``(sum p)^2 / sum p^2`` of each query's self-normalized weights ``p``:
        weights of draws (rfa, lara), of keys and groups (eva, adaptive_eva) or of keys (softmax). None where
        the result is no such average: `ra`, trigonometric features, causal rfa and lara, other functions.
    largest_weight : array, shape (..., N), or None
        The largest of these weights, which add up to one.
    num_weights : array, shape (..., N), or None
        The number of these weights.
    standard_error : array, shape (..., N), or None
        Standard deviation of the output of one call over replicates with draws of their own: the root of the
        summed variances of the features. None for an estimator that draws nothing.
    queries : tuple of int
        Numbers of the Q queries that are compared with exact attention.
    error : array, shape (..., Q)
        ``|out - exact|``, the root mean square over replicates.
    entropy : array, shape (..., Q)
        Entropy of the exact attention weights, in nats; NaN for padding and for a query without keys.
    rows : array, shape (..., Q, M), or None
        The attention matrix of the first replicate: the weights of the values in its output. None for too
        many pairs, and where the output is no weighting of the values.
    relative_error : float
        ``|out - exact| / |exact|`` of a layer (the last three axes), averaged over layers and replicates;
        padded queries are left out.
    relative_standard_error : float or None
        Standard error of a layer over ``|exact|``, averaged over layers.
    mean_error : float
        Relative error of the trivial answer, the same mean(V) for every query.
    alternative : str or None
        Another call that was measured beside.
    alternative_error : float or None
        Relative error of this other call.
    recommendation : str
        One sentence of advice.
    """

    estimator: str
    effective_samples: Array | None
    largest_weight: Array | None
    num_weights: Array | None
    standard_error: Array | None
    queries: tuple[int, ...]
    error: Array
    entropy: Array
    rows: Array | None
    relative_error: float
    relative_standard_error: float | None
    mean_error: float
    alternative: str | None
    alternative_error: float | None
    recommendation: str

    def __repr__(self) -> str:
        return f"Diagnosis({self.recommendation!r})"


def diagnose(
    estimator: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_replicates: int = 8,
    queries: Sequence[int] | None = None,
    **options: Any,
) -> Diagnosis:
    r"""Diagnose an estimator on the caller's own inputs: its error, and when to trust it.

    Parameters
    ----------
    estimator : callable
        An estimator of this library, a `functools.partial` of one, or any function
        ``estimator(q, k, v, **options)`` that returns (..., N, E).
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. Half precision is raised to float32.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_replicates : int, default 8
        Number of calls with draws of their own, at least two. Without `rng` there is one call.
    queries : sequence of int, optional
        Numbers of the queries that are compared with exact attention and whose rows are computed, in O(N M)
        time. The default is all queries, up to 2**24 pairs of a query and a key over all heads, or else 64
        queries without rows.
    **options
        Options of the estimator. Replicates draw from seeds or keys that are made of `rng`. With
        ``layout="tokens_first"`` the arrays of the result are heads first all the same.

    Returns
    -------
    Diagnosis
        Errors, weights and one sentence of advice.

    Raises
    ------
    TypeError
        An `estimator` that is not callable or returns no array; arrays of Dask; errors of the estimator.
    ValueError
        Numbers of queries out of range; fewer than two replicates; errors of the estimator.

    Notes
    -----
    The standard error is that of the draws alone. An estimator that draws nothing, or whose result hangs on a
    few draws, can have a small standard error and be far from exact attention.

    `diagnose` is for use by hand, not within a program: it calls the estimator many times, cannot be traced
    by ``jit`` and has no gradients. The entropy of a row of exact attention is
    :math:`\log Z(q) - \sum_m p_m\, q \cdot k_m`. The rows are the estimator's results for further features of
    the values, each one at a single key and zero at the others, scaled so small that no choice of keys sees
    them.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import diagnose, rfa
    >>> q, k, v = 3 * np.random.default_rng(0).standard_normal((3, 2, 128, 16))
    >>> found = diagnose(rfa, q, k, v, num_samples=64, rng=0)
    >>> found.relative_error > found.mean_error
    True
    >>> found.recommendation[:43]
    'rfa would be worse than mean(V) here (relat'
    """
    while isinstance(estimator, functools.partial) and not estimator.args:
        options = {**estimator.keywords, **options}
        estimator = estimator.func
    if is_tokens_first(options.pop("layout", "heads_first")):
        masks = {name: options.get(name) for name in ("key_mask", "query_mask")}
        q, k, v, *turned = heads_first(q, k, v, **masks)
        options |= zip(masks, turned, strict=True)
    if not callable(estimator):
        raise TypeError(f"estimator: expected a function of q, k and v, got {shown(estimator)}")
    check_arrays(q=q, k=k, v=v)
    if backend_of(q).is_lazy:
        raise TypeError(f"q: expected arrays in memory, got {shown(q)}: compute() a part of them first")
    as_count("num_replicates", num_replicates, minimum=2)
    with backend_of(q).full_precision(q):
        return _diagnosed(estimator, (q, k, v), num_replicates, queries, options)


def _diagnosed(
    estimator: Callable[..., Array],
    given: tuple[Array, ...],
    num_replicates: int,
    queries: Sequence[int] | None,
    options: dict[str, Any],
) -> Diagnosis:
    constant = backend_of(given[0]).constant
    q, k, v = (constant(working_precision(x)) for x in given)
    options = {name: constant(value) if is_array(value) else value for name, value in options.items()}
    shared: dict[str, Any] = {name: options.get(name) for name in ("scale", "key_mask", "query_mask")}
    x = prepare(q, k, v, enable_gqa=options.get("enable_gqa", False), **shared)
    is_causal = options.get("is_causal", False)
    check_causal(x, is_causal)
    pairs = math.prod(x.lead) * q.shape[-2] * k.shape[-2]
    if not pairs:
        raise ValueError(f"q: expected at least one head, got leading axes {x.lead}")
    index = _index(queries, q.shape[-2], pairs)

    own: list[dict[str, Any]] = [{}]
    if options.get("rng") is not None:
        own = [{"rng": source} for source in spawned(options["rng"], num_replicates, x)]
    row = row_of(estimator)
    # A caller's own function may keep the program that it makes here.
    with watched() if row is not None else nullcontext():
        whole = estimator(q, k, v, **{**options, **own[0]})
    if not is_array(whole):
        raise TypeError(f"estimator: expected one array of results, got {type(whole).__name__}")
    first, spread = parted(whole, v.shape[-1])
    outs = [first, *(estimator(q, k, v, **{**options, **draws}) for draws in own[1:])]
    variance = _variance(outs) if len(outs) > 1 else None
    rows = None
    if queries is not None or pairs <= _MOST_PAIRS:
        rows = _rows(functools.partial(estimator, **{**options, **own[0]}), x, (q, k, v), first, index)

    exact = _Exact(x, index, is_causal=is_causal)
    squares = [exact.square(out) for out in outs]
    better = beside(row, options, x.k.shape[-2]) if pairs <= _MOST_PAIRS_BESIDE else None
    found = Diagnosis(
        estimator=getattr(estimator, "__name__", type(estimator).__name__),
        effective_samples=None if spread is None else spread.effective,
        largest_weight=None if spread is None else spread.largest,
        num_weights=None if spread is None else spread.number,
        standard_error=None if variance is None else x.xp.sqrt(variance),
        queries=index,
        error=x.xp.sqrt(sum(squares) / len(squares)),
        entropy=exact.entropy,
        rows=rows,
        relative_error=sum(map(exact.relative, squares)) / len(squares),
        relative_standard_error=None if variance is None else exact.relative(exact.at(variance, -1)),
        mean_error=exact.relative(exact.square_of_mean),
        alternative=None if better is None else better[0],
        alternative_error=None if better is None else exact.relative(exact.square(better[1](q, k, v))),
        recommendation="",
    )
    return replace(
        found, recommendation=recommendation(found, k.shape[-2], is_exact=row is not None and row.is_exact)
    )


def _index(queries: Sequence[int] | None, n: int, pairs: int) -> tuple[int, ...]:
    """Return the numbers of the queries to compare."""
    if queries is None:
        if pairs <= _MOST_PAIRS:
            return tuple(range(n))
        return tuple(sorted({number * n // _FEW_QUERIES for number in range(_FEW_QUERIES)}))
    index = tuple(as_count("queries", number, minimum=0) for number in queries)
    if not index or max(index) >= n:
        raise ValueError(f"queries: expected some in range({n}), got {shown(index)}")
    return index


class _Exact:
    """Exact attention at the compared queries, and distances from it, in the caller's heads (..., Q)."""

    def __init__(self, x: Inputs, index: tuple[int, ...], *, is_causal: bool) -> None:
        xp, (n, m) = x.xp, (x.q.shape[-2], x.k.shape[-2])
        self._x, self._index = x, index
        q, past = self.at(x.q, -2), None
        if is_causal:
            number = xp.asarray(index, device=x.device)[:, None]
            seen = number >= xp.arange(m, device=x.device)[None, :]
            past = with_rank(xp.where(seen, xp.zeros_like(seen, dtype=q.dtype), -math.inf), q.ndim)
        # Equation: entropy = log Z(q) - sum_m p_m q.k_m. One average has both the output and the mean key.
        lead = broadcast_shapes(x.k.shape[:-2], x.v.shape[:-2])
        values = xp.concat([xp.broadcast_to(y, (*lead, *y.shape[-2:])) for y in (x.v, x.k)], axis=-1)
        both, log_norm = attend(q, Keys(x.k, values, x.key_bias, pair_bias=past), scale=x.scale)
        is_empty, mean_key = log_norm == -math.inf, both[..., x.v.shape[-1] :]
        self._mask, self._out = None, both[..., : x.v.shape[-1]]
        if x.query_mask is not None:
            # Estimators give zeros for padding: exact attention must too, or padding would have an error.
            is_query = self.at(xp.broadcast_to(x.query_mask, (*x.lead, n)), -1)
            self._mask, self._out = x.merge_heads(is_query, 1), hide(self._out, is_query)
            is_empty = is_empty | ~is_query
        entropy = log_norm - x.scale * dot(q, mean_key)
        # Rounding can take the entropy of a row with one key below zero.
        entropy = xp.where(is_empty, math.nan, xp.where(entropy < 0, 0.0, entropy))
        self.entropy = x.merge_heads(entropy, 1)
        self._total = self._of_layers(x.merge_heads(dot(self._out, self._out), 1))
        # Queries of zero give every key the same weight: mean(V), of the past in a causal call.
        mean, _ = attend(xp.zeros_like(q), Keys(x.k, x.v, x.key_bias, pair_bias=past))
        self.square_of_mean = self._square(mean)

    def at(self, x: Array, axis: int) -> Array:
        """Take the compared queries from an axis of all queries."""
        if self._index == tuple(range(x.shape[axis])):
            return x
        return self._x.xp.take(x, self._x.xp.asarray(self._index, device=self._x.device), axis=axis)

    def square(self, out: Array) -> Array:
        """Return ``|out - exact|^2`` of a result of the estimator."""
        return self._square(self.at(self._x.with_heads("out", out, 2), -2))

    def relative(self, squares: Array) -> float:
        """Return the root of squares of a layer over the norm of exact attention, averaged over layers."""
        xp, total = self._x.xp, self._total
        root = xp.sqrt(self._of_layers(squares) / nonzero(total))
        return float(xp.mean(xp.where(total == 0, math.nan, root)))

    def _square(self, out: Array) -> Array:
        lost = out - with_rank(self._out, out.ndim)
        return self._x.merge_heads(dot(lost, lost), 1)

    def _of_layers(self, squares: Array) -> Array:
        xp = self._x.xp
        if self._mask is not None:
            squares = xp.where(with_rank(self._mask, squares.ndim), squares, 0.0)
        return xp.sum(squares, axis=tuple(range(-min(2, squares.ndim), 0)))


def _variance(outs: Sequence[Array]) -> Array:
    """Return the variance (..., N) of one call from independent calls, summed over features."""
    mean = sum(outs[1:], outs[0]) / len(outs)
    return sum(dot(out - mean, out - mean) for out in outs) / (len(outs) - 1)


def _rows(
    estimate: Callable[..., Array], x: Inputs, given: tuple[Array, ...], out: Array, index: tuple[int, ...]
) -> Array | None:
    """Return the attention matrix (..., Q, M); None where the result is no weighting of the values."""
    xp, (q, k, v), m = x.xp, given, x.k.shape[-2]
    # One-hot values stand beside V, so that the estimator chooses by V. A power of two scales them without
    # rounding, so far down that their squares are lost in the rounding of |v|^2.
    largest = float(xp.max(xp.abs(x.v)))
    unit = 2.0 ** (math.frexp(largest)[1] - math.ceil(-0.75 * math.log2(xp.finfo(v.dtype).eps)))
    number, done = xp.arange(m, device=x.device), []
    taken = xp.asarray(index, device=x.device)
    for columns in slices(m, max(1, _AT_HAND // (math.prod(x.lead) * max(q.shape[-2], m)))):
        one_hot = unit * xp.astype(number[:, None] == number[None, columns], v.dtype)
        beside = xp.broadcast_to(with_rank(one_hot, v.ndim), (*v.shape[:-1], one_hot.shape[-1]))
        found = estimate(q, k, xp.concat([v, beside], axis=-1))[..., v.shape[-1] :]
        done.append(xp.take(found, taken, axis=-2) / unit)
    # A result that is clipped to the range of the values is no product of rows and values.
    rows = xp.concat(done, axis=-1)
    expected = x.with_heads("out", xp.take(out, taken, axis=-2), 2)
    lost = xp.matmul(x.with_heads("rows", rows, 2), x.v) - expected
    return rows if float(xp.max(xp.abs(lost))) <= 1e-3 * largest else None
