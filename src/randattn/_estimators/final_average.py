"""The average that an estimator ends in, and for `diagnose` alone how the weight in it is spread."""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import attend
from randattn._core import library
from randattn._core.average import Keys, finite, leading_axes, logits_of, nonzero, rows_of_block
from randattn._core.indexing import slices
from randattn._core.library import namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    Array = Any

# Whether `diagnose` calls. Not an option of estimators: users would find one that is for `diagnose` alone.
_is_watched: ContextVar[bool] = ContextVar("is_watched", default=False)


class Spread(NamedTuple):
    """How the weight of an average is spread over its terms, for each query (..., N).

    Attributes
    ----------
    effective : array
        ``(sum_s p_s)^2 / sum_s p_s^2``, Kish's effective sample size; 0 where nothing has weight.
    largest : array
        The largest share ``p_s / sum p``.
    number : array
        Draws, keys or groups that have a finite log weight.
    """

    effective: Array
    largest: Array
    number: Array


@contextmanager
def watched() -> Iterator[None]:
    """Give results three more columns, a query's `Spread`, until `parted` takes them off.

    An estimator lays its final average out once more: windows to tokens, split heads to one axis, padding to
    zeros. Columns of the result go through all of that with it; numbers on the side would not.
    """
    token = _is_watched.set(True)
    try:
        yield
    finally:
        _is_watched.reset(token)


def parted(out: Array, values: int) -> tuple[Array, Spread | None]:
    """Part a result into its values and the spread of its weights; None where no `final_average` gave it."""
    if out.shape[-1] == values:
        return out, None
    return out[..., :values], Spread(*(out[..., values + column] for column in range(len(Spread._fields))))


def final_average(q: Array, *sets: Keys, scale: float = 1) -> Array:
    """Return ``attend(q, *sets, scale=scale).out``, the last average of an estimator: (..., N, E)."""
    out = attend(q, *sets, scale=scale).out
    if library.compiler.is_tracing() or not _is_watched.get():
        return out
    xp = namespace(q)
    logits = math.prod(leading_axes(q, sets)) * sum(keys.k.shape[-2] for keys in sets)
    parts = [
        _spread(q[..., rows, :], [keys.for_queries(rows) for keys in sets], scale, rows.start)
        for rows in slices(q.shape[-2], rows_of_block(logits))
    ]
    spread = xp.concat(parts, axis=-2)
    return xp.concat([out, xp.broadcast_to(spread, (*out.shape[:-1], spread.shape[-1]))], axis=-1)


def _spread(q: Array, sets: list[Keys], scale: float, first: int) -> Array:
    """Return the fields of `Spread` of some queries, from number `first` on: (..., n, 3)."""
    xp = namespace(q)
    logits = [logits_of(q, keys.biased(), scale, (first, 0)) for keys in sets]
    top = xp.max(logits[0], axis=-1, keepdims=True)
    for x in logits[1:]:
        top = xp.maximum(top, xp.max(x, axis=-1, keepdims=True))
    weights = [xp.exp(x - finite(top)) for x in logits]
    weights = [
        x if keys.pair_weight is None else x * xp.matrix_transpose(keys.pair_weight.of(q))
        for x, keys in zip(weights, sets, strict=True)
    ]

    def over(function: Any) -> Array:
        return sum(xp.sum(function(x), axis=-1) for x in weights)

    total = nonzero(over(lambda x: x))
    largest = xp.max(weights[0], axis=-1) / total
    for x in weights[1:]:
        largest = xp.maximum(largest, xp.max(x, axis=-1) / total)
    squares = over(lambda x: (x / total[..., None]) ** 2)
    effective = xp.where(squares == 0, 0.0, 1 / nonzero(squares))
    there = sum(xp.sum(xp.astype(x > -math.inf, q.dtype), axis=-1) for x in logits)
    return xp.stack([effective, largest, there], axis=-1)
