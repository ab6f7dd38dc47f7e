"""Scan causal tokens a block at a time, and carry f(W) and log Z(W) of the keys so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core.average import Average, average, merge
from randattn._core.checks import broadcast_shapes
from randattn._core.inputs import Inputs, dot
from randattn._core.library import Array


class Block(NamedTuple):
    """One block of n tokens in the scan.

    Attributes
    ----------
    before, after : Average
        The state, f(W) (..., S, E) and log Z(W), before the block's keys and after them.
    log_xi : array, shape (..., S, n)
        The log weights ``log xi(k, w)`` of the block's keys; -inf for padding.
    v : array, shape (..., n, E)
        The values of the block.
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
    """Return the state after the last token, and ``results(block, *arrays)`` of all blocks of `size` tokens.

    Each of `arrays` comes with the number of its rows in a block. `root` is the square root of the scale, a
    number or an array.
    """

    def step(before: Average, k: Array, v: Array, *others: Array) -> tuple[Average, Array]:
        # Equation: log xi(k, w) = w.k - |k|^2/2, with the root of the scale on k.
        log_xi = x.xp.matmul(root * w, x.xp.matrix_transpose(k)) - (root**2 / 2 * dot(k, k))[..., None, :]
        if x.key_mask is not None:
            log_xi, others = log_xi + x.xp.matrix_transpose(others[0]), others[1:]
        # Equation: (f, log Z) after = merge((f, log Z) before, the block's own average). No number of a later
        # block enters, not even through a maximum: a key to come would change the rounding of earlier rows.
        after = merge(before, average(log_xi, v))
        return after, results(Block(before, after, log_xi, v), *others)

    # The log mask is one more array of tokens: a compiled loop hands each block its own rows alone.
    tokens = [x.k, x.v] if x.key_bias is None else [x.k, x.v, x.key_bias[..., None]]
    return backend_of(x.k).carry(step, before, *((y, size) for y in tokens), *arrays)
