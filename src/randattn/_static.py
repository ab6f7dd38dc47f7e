"""Work that is done once, on the host, while a program is traced."""

from __future__ import annotations

import functools
import math
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ._tracing import dynamo_traces

if TYPE_CHECKING:
    from collections.abc import Callable

    F = TypeVar("F", bound=Callable[..., Any])

# Arrays of the trace that is under way, and of some before it.
_arrays: dict[int, Any] = {}
_MOST_ARRAYS = 1024


class Held(NamedTuple):
    """What a trace of PyTorch's Dynamo gets for a NumPy array of a constant result (`_fused.beside`).

    Of the array itself Dynamo makes an input of the program, with symbolic sizes.
    """

    number: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def held_array(number: int) -> Any:
    """The array that was held under this number."""
    return _arrays[number]


def as_constant(function: F) -> F:
    """Let Dynamo call `function` as it is, and take what it returns as a constant.

    Its arguments must be plain constants (see `plain`), its result must depend on nothing else.
    """
    # What torch.compiler.assume_constant_result sets; setting it here imports nothing.
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def static(function: F) -> F:
    """Make `as_constant` of a function that gives NumPy arrays, or tuples that have some."""

    @as_constant
    def held(*args: Any) -> Any:
        return _held(function(*args))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return held(*args) if dynamo_traces() else function(*args)

    return cast("F", call)


def _held(x: Any) -> Any:
    if isinstance(x, tuple):
        parts = map(_held, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not hasattr(x, "dtype"):
        return x
    _arrays[id(x)] = x
    if len(_arrays) > _MOST_ARRAYS:
        del _arrays[next(iter(_arrays))]
    return Held(id(x), tuple(x.shape))


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes as plain integers, also where a compiler would keep them symbolic."""
    return tuple(operator.index(size) for size in shape)
