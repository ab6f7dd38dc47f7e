"""Host work that is done once, while a program is traced: its results are constants of the program."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from randattn._core import library

F = TypeVar("F", bound=Callable[..., Any])

# The number of arrays that are held for traces, which bounds memory. When all places are taken, a new array
# takes the place of the oldest array, whose `Held` is then wrong. A program of one length has about 20
# arrays, so that 1,024 places serve the lengths of one model.
MOST_ARRAYS = 1024
# For each place the array, and its tensor on each device. While the array is held no other object has its
# `id`, the key of `_place_of`.
_arrays: dict[int, Any] = {}
_place_of: dict[int, int] = {}
_places = itertools.count()


class Held(NamedTuple):
    """A NumPy array of a constant result, where a compiler reads this code.

    The array itself would be an input of the program, with symbolic sizes.
    """

    shape: tuple[int, ...]
    size: int
    place: int  # the index in `TENSORS` of the function that returns the array as a tensor


def as_constant(function: F) -> F:
    """Let Dynamo call `function` without tracing it, and take its result as a constant.

    Arguments must be plain constants (see `plain`), and the result must depend on them alone.
    """
    # PyTorch's `assume_constant_result` sets this mark; setting it here imports nothing.
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def static(function: F) -> F:
    """Let Dynamo take the NumPy arrays that `function` returns, alone or in tuples, as constants."""

    @as_constant
    def held(*args: Any) -> Any:
        return _held(function(*args))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return held(*args) if library.compiler.reads_code() else function(*args)

    return cast("F", call)


def _held(x: Any) -> Any:
    if isinstance(x, tuple):
        parts = map(_held, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not hasattr(x, "dtype"):
        return x
    # Layers of one length get their grids from one cache: the same arrays, and so the same places.
    place = _place_of.get(id(x))
    if place is None:
        place = next(_places) % MOST_ARRAYS
        if place in _arrays:
            del _place_of[id(_arrays[place][0])]
        _arrays[place], _place_of[id(x)] = (x, {}), place
    return Held(tuple(x.shape), x.size, place)


def _tensor(place: int) -> Callable[[Any], Any]:
    @as_constant
    def tensor(device: Any) -> Any:
        x, made = _arrays[place]
        if device not in made:
            made[device] = library.compiler.constant(x, device)
        return made[device]

    # Dynamo tells the constants of a program apart by the names of their functions: each place has its own.
    tensor.__code__ = tensor.__code__.replace(co_name=f"held_{place}")
    return tensor


# One function for each place, made at import: a trace calls the function and keeps its tensor as a constant.
TENSORS = tuple(map(_tensor, range(MOST_ARRAYS)))


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return sizes as plain integers; a symbolic size becomes a constant of the program."""
    return tuple(operator.index(size) for size in shape)
