"""The average that an estimator ends in, and for `diagnose` how the weight in it is spread."""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from ._attend import Keys, finite, leading_axes, merge, nonzero, past, rows_of_block, slices
from ._fused import attend, compiling
from ._tracing import namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._attend import PairWeight

    Array = Any

_is_watched: ContextVar[bool] = ContextVar("is_watched", default=False)


class Spread(NamedTuple):
    """How the weight of an average is spread over what it averages, for each query (..., N).

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
    """Results have more columns, which `parted` parts from them."""
    token = _is_watched.set(True)
    try:
        yield
    finally:
        _is_watched.reset(token)


def parted(out: Array, values: int) -> tuple[Array, Spread | None]:
    """The result with so many values, and the spread of its weights; None where no `conclude` gave it."""
    if out.shape[-1] == values:
        return out, None
    return out[..., :values], Spread(*(out[..., values + column] for column in range(len(Spread._fields))))


def conclude(
    q: Array,
    *sets: Keys,
    scale: float = 1,
    pair_bias: Array | None = None,
    pair_weight: PairWeight | None = None,
    is_causal: bool = False,
) -> Array:
    """``attend(...).out``, the last one of an estimator; `pair_bias` belongs to the last set."""
    if pair_bias is None or len(sets) == 1:
        out = attend(
            q, *sets, scale=scale, pair_bias=pair_bias, pair_weight=pair_weight, is_causal=is_causal
        ).out
    else:
        *others, last = sets
        far = attend(q, last, scale=scale, pair_bias=pair_bias)
        out = merge(attend(q, *others, scale=scale, is_causal=is_causal), far).out
    if compiling(q) or not _is_watched.get():
        return out
    xp = namespace(q)
    lead = math.prod(leading_axes(q, sets, pair_bias, pair_weight))
    done = []
    for rows in slices(q.shape[-2], rows_of_block(lead * sum(keys.k.shape[-2] for keys in sets))):
        weight, bias = pair_weight, None if pair_bias is None else pair_bias[..., rows, :]
        if weight is not None and weight.mask is not None:
            weight = weight._replace(mask=weight.mask[..., rows])
        first = rows.start if is_causal else None
        done.append(_spread(q[..., rows, :], sets, scale, bias, weight, first))
    spread = xp.concat(done, axis=-2)
    return xp.concat([out, xp.broadcast_to(spread, (*out.shape[:-1], spread.shape[-1]))], axis=-1)


def _spread(
    q: Array,
    sets: tuple[Keys, ...],
    scale: float,
    pair_bias: Array | None,
    weight: PairWeight | None,
    first: int | None,
) -> Array:
    """Of some queries, from number `first` on where the first set is causal: (..., n, 3)."""
    xp, logits = namespace(q), []
    for number, keys in enumerate(sets):
        k, _, bias, _ = keys.biased()
        x = xp.matmul(q, xp.matrix_transpose(k * scale))
        if bias is not None:
            x = x + bias[..., None, :]
        if pair_bias is not None and number == len(sets) - 1:
            x = x + pair_bias
        if first is not None and number == 0:
            x = xp.where(xp.matrix_transpose(past(q, k.shape[-2], first, 0)), x, -math.inf)
        logits.append(x)
    top = None
    for x in logits:
        highest = xp.max(x, axis=-1, keepdims=True)
        top = highest if top is None else xp.maximum(top, highest)
    weights = [xp.exp(x - finite(top)) for x in logits]
    if weight is not None:
        weights = [x * xp.matrix_transpose(weight.of(q)) for x in weights]

    def over(function: Any) -> Array:
        return sum(xp.sum(function(x), axis=-1) for x in weights)

    total = nonzero(over(lambda x: x))
    shares = [xp.max(x, axis=-1) / total for x in weights]
    largest = shares[0]
    for share in shares[1:]:
        largest = xp.maximum(largest, share)
    squares = over(lambda x: (x / total[..., None]) ** 2)
    effective = xp.where(squares == 0, 0.0, 1 / nonzero(squares))
    there = sum(xp.sum(xp.astype(x > -math.inf, q.dtype), axis=-1) for x in logits)
    return xp.stack([effective, largest, there], axis=-1)
