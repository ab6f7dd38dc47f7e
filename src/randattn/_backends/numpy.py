"""NumPy: in blocks that stay in the cache, written over in place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from randattn._core import average as plain
from randattn._core import block_sizes
from randattn._core.checks import out_of_range
from randattn._core.library import namespace

from . import inplace, inplace_ops
from .generic import Backend, mean_by_product

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from randattn._core.average import Average, Keys

    Array = Any


class InPlace(Backend):
    """A library of arrays that can be written to, and that computes at once."""

    writing = inplace_ops.Writing

    def block_logits(self) -> int:
        """Return the logits of a block."""
        return block_sizes.GPU_LOGITS

    def attend_together(self, q: Array, sets: tuple[Keys, ...], scale: float) -> Average:
        """Compute the average in place; with a bias of pairs, or of few logits, plainly."""
        if sets[0].pair_bias is not None:
            return plain.attend(q, *sets, scale=scale)
        sets = tuple(keys.biased() for keys in sets)
        lead = math.prod(plain.leading_axes(q, sets))
        if lead * q.shape[-2] * sum(keys.k.shape[-2] for keys in sets) <= block_sizes.SMALL_LOGITS:
            return plain.attend_whole(q, sets, scale)
        return inplace.attend(q, sets, self.writing(q), scale, self.block_logits())

    def mean_of_rows(self, x: Array) -> Array:
        """Return the means (..., D) of rows (..., L, D)."""
        return mean_by_product(x)

    def largest(self, x: Array, count: int) -> Array:
        """Return the places of the largest entries of the last axis, in any order."""
        rest = x.shape[-1] - count
        return namespace(x).argpartition(x, rest, axis=-1)[..., rest:] if rest else super().largest(x, count)

    def with_last(self, x: Array, part: Array) -> Array:
        """Write `part` over the last rows' last entries of `x`."""
        x[..., -part.shape[-2] :, -part.shape[-1] :] = part
        return x


class _Writing(inplace_ops.Writing):
    strided = looks = True

    def quietly(self) -> AbstractContextManager[object]:
        return np.errstate(over="ignore", invalid="ignore")


class Numpy(InPlace):
    """NumPy's arrays, whose values are at hand."""

    name = "numpy"
    writing = _Writing

    def block_logits(self) -> int:
        """Return the logits of a block."""
        return block_sizes.INPLACE_LOGITS

    def call(self, function: Callable[..., Any], q: Array, *args: Any, **options: Any) -> Any:
        """Raise one error where NumPy would warn of each operation that overflows, and results would be NaN."""
        if np.geterr()["over"] == "ignore":
            return function(q, *args, **options)
        try:
            with np.errstate(over="raise"):
                return function(q, *args, **options)
        except FloatingPointError:
            error = out_of_range(dict(zip("qkv", (q, *args), strict=False)))
        raise error

    def is_at_hand(self, x: Array) -> bool:  # noqa: ARG002
        """Tell that the values are known."""
        return True

    def sums_by_group(self, x: Array, index: Array, group: Array, count: int) -> Array:
        """Sum rows by their groups, all blocks at a time."""
        return inplace.sums_by_group(x, index, group, count)

    def when(self, condition: Array, function: Callable[[Any], Any], state: Any) -> Any:
        """Return ``function(state)`` where the condition is true; else the state, in the same arrays."""
        return function(state) if condition else state


BACKEND = Numpy()
