"""Compute the last average of an estimator and, for `diagnose` alone, the spread of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Any, NamedTuple

from randattn._backends.dispatch import attend
from randattn._core import library
from randattn._core.average import Average, Keys, finite, leading_axes, logits_of, nonzero, rows_of_block
from randattn._core.indexing import slices
from randattn._core.library import Array, namespace

# True while `diagnose` calls an estimator. An option of the estimators would be public, for `diagnose` alone.
_is_watched: ContextVar[bool] = ContextVar("is_watched", default=False)


class Spread(NamedTuple):
    """The spread of an average's weight over its terms, for each query (..., N).

    Attributes
    ----------
    effective : array
        Kish's effective sample size ``(sum_s p_s)^2 / sum_s p_s^2``; 0 where no term has weight.
    largest : array
        The largest share ``p_s / sum p``.
    number : array
        The number of terms (draws, keys or groups) with a finite log weight.
    """

    effective: Array
    largest: Array
    number: Array


@contextmanager
def watched() -> Iterator[None]:
    """Append the `Spread` of each query to results, as three columns that `parted` removes.

    An estimator rearranges its last average: windows to tokens, split heads to one axis, padding to zeros.
    Columns of the result go through these steps with it; separate arrays would not.
    """
    token = _is_watched.set(True)
    try:
        yield
    finally:
        _is_watched.reset(token)


def is_watched() -> bool:
    """Tell whether results get the columns of `Spread`; never in a traced program, which lives on."""
    return not library.compiler.is_tracing() and _is_watched.get()


def parted(out: Array, values: int) -> tuple[Array, Spread | None]:
    """Split a result into its values and their `Spread`; None where `final_average` did not make it."""
    if out.shape[-1] == values:
        return out, None
    return out[..., :values], Spread(*(out[..., values + column] for column in range(len(Spread._fields))))


def final_average(q: Array, *sets: Keys, scale: float = 1) -> Array:
    """Return ``attend(q, *sets, scale=scale).out``, the last average of an estimator: (..., N, E)."""
    return watched_average(q, *sets, scale=scale).out


def watched_average(q: Array, *sets: Keys, scale: float = 1) -> Average:
    """Return ``attend(q, *sets, scale=scale)``, with the columns of `Spread` where `diagnose` calls."""
    average = attend(q, *sets, scale=scale)
    if not is_watched():
        return average
    xp, out = namespace(q), average.out
    # The logits are computed again, a block of queries at a time: fused kernels do not return them.
    logits = math.prod(leading_axes(q, sets)) * sum(keys.k.shape[-2] for keys in sets)
    parts = [
        _spread(q[..., rows, :], [keys.for_queries(rows) for keys in sets], scale, rows.start)
        for rows in slices(q.shape[-2], rows_of_block(logits))
    ]
    spread = xp.concat(parts, axis=-2)
    spread = xp.broadcast_to(spread, (*out.shape[:-1], spread.shape[-1]))
    return average._replace(out=xp.concat([out, spread], axis=-1))


def _spread(q: Array, sets: list[Keys], scale: float, first: int) -> Array:
    """Return the fields of `Spread` (..., n, 3) of n queries; `first` is the number of the first query."""
    xp = namespace(q)
    logits = [logits_of(q, keys.biased(), scale, (first, 0)) for keys in sets]
    # One maximum for all sets, or their weights would have different units; `finite` guards rows of -inf.
    top = finite(reduce(xp.maximum, [xp.max(x, axis=-1, keepdims=True) for x in logits]))
    weights = [xp.exp(x - top) for x in logits]
    # A factor of pairs (LARA's alpha) multiplies the weight, as in `_core.average`.
    weights = [
        x if keys.pair_weight is None else x * xp.matrix_transpose(keys.pair_weight.of(q))
        for x, keys in zip(weights, sets, strict=True)
    ]

    def over(function: Any) -> Array:
        return sum(xp.sum(function(x), axis=-1) for x in weights)

    total = nonzero(over(lambda x: x))
    largest = reduce(xp.maximum, [xp.max(x, axis=-1) / total for x in weights])
    squares = over(lambda x: (x / total[..., None]) ** 2)
    effective = xp.where(squares == 0, 0.0, 1 / nonzero(squares))
    there = sum(xp.sum(xp.astype(x > -math.inf, q.dtype), axis=-1) for x in logits)
    return xp.stack([effective, largest, there], axis=-1)
