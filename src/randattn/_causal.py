"""Averages over all keys so far, carried along a sequence a block of tokens at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import Average
from ._fused import carry
from ._inputs import broadcast_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._inputs import Inputs

    Array = Any
    # (state before, w, arrays of the block) -> (state after, results of the block)
    Block = Callable[..., tuple[Average, Array]]


def nothing(x: Inputs, w: Array) -> Average:
    """The averages over no key, one for each frequency of `w` (..., S, D)."""
    shape = (*broadcast_shapes(x.lead, w.shape[:-2]), w.shape[-2], x.v.shape[-1])
    out = x.xp.zeros(shape, dtype=x.q.dtype, device=x.device)
    return Average(out, x.xp.full(shape[:-1], -math.inf, dtype=x.q.dtype, device=x.device))


def scan(block: Block, before: Average, *arrays: tuple[Array, int]) -> tuple[Average, Array]:
    """The state after the last token, and the results."""
    return carry(block, before, *arrays)
