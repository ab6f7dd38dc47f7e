"""The causal pass: f(W) and log Z(W) of all keys so far, carried along the tokens a block at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core.average import Average, average, merge
from randattn._core.checks import broadcast_shapes
from randattn._core.inputs import dot

if TYPE_CHECKING:
    from collections.abc import Callable

    from randattn._core.inputs import Inputs

    Array = Any


class Block(NamedTuple):
    """A block of n tokens, as a pass meets it.

    Attributes
    ----------
    before, after : Average
        Of all keys up to it, without its own and with them: (..., S, E).
    log_xi : array, shape (..., S, n)
        The logarithms of its keys' weights ``xi(k, w)``; -inf for padding.
    v : array, shape (..., n, E)
    """

    before: Average
    after: Average
    log_xi: Array
    v: Array


def nothing(x: Inputs, w: Array) -> Average:
    """Return the averages over no key, one for each frequency of `w` (..., S, D)."""
    shape = (*broadcast_shapes(x.lead, w.shape[:-2]), w.shape[-2], x.v.shape[-1])
    out = x.xp.zeros(shape, dtype=x.q.dtype, device=x.device)
    return Average(out, x.xp.full(shape[:-1], -math.inf, dtype=x.q.dtype, device=x.device))


def scan(
    x: Inputs,
    w: Array,
    before: Average,
    results: Callable[..., Array],
    size: int,
    *arrays: tuple[Array, int],
    root: Any,
) -> tuple[Average, Array]:
    """Return the averages after the last token, and ``results(block, *arrays)`` of blocks of `size` tokens.

    A block has so many rows of each array. `root` is that of the scale, a number or an array.
    """

    def step(before: Average, k: Array, v: Array, *others: Array) -> tuple[Average, Array]:
        log_xi = x.xp.matmul(root * w, x.xp.matrix_transpose(k)) - (root**2 / 2 * dot(k, k))[..., None, :]
        if x.key_mask is not None:
            log_xi, others = log_xi + x.xp.matrix_transpose(others[0]), others[1:]
        after = merge(before, average(log_xi, v))
        return after, results(Block(before, after, log_xi, v), *others)

    tokens = [x.k, x.v] if x.key_bias is None else [x.k, x.v, x.key_bias[..., None]]
    return backend_of(x.k).carry(step, before, *((y, size) for y in tokens), *arrays)
