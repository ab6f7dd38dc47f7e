"""Work that is done once, on the host, while a program is traced: its results are constants of the program."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from randattn._core import library

if TYPE_CHECKING:
    from collections.abc import Callable

    F = TypeVar("F", bound=Callable[..., Any])

# Arrays of the trace that is under way, and of some before it; when all places are taken, the oldest is taken
# again. One program of one length has about 20, so that 1,024 is room for the lengths of one model.
MOST_ARRAYS = 1024
_arrays: dict[int, Any] = {}
_place_of: dict[int, int] = {}
_places = itertools.count()


class Held(NamedTuple):
    """A NumPy array of a constant result, where a compiler reads this code.

    The array itself would be an input of the program, with symbolic sizes.
    """

    shape: tuple[int, ...]
    size: int
    place: int  # among `TENSORS`, of the function that gives the array as a tensor


def as_constant(function: F) -> F:
    """Let Dynamo call `function` as it is, and take its result as a constant.

    Arguments must be plain constants (see `plain`), and the result must depend on them alone.
    """
    # The mark that PyTorch's assume_constant_result sets; to set it here imports nothing.
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def static(function: F) -> F:
    """Make `as_constant` of a function that returns NumPy arrays, or tuples that have some."""

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
    # Layers of one length have their grids from one cache: the same arrays, and so the same places.
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

    # Dynamo tells the constants of a program apart by the names of their functions.
    tensor.__code__ = tensor.__code__.replace(co_name=f"held_{place}")
    return tensor


TENSORS = tuple(map(_tensor, range(MOST_ARRAYS)))


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return sizes as plain integers, also where a compiler would keep them symbolic."""
    return tuple(operator.index(size) for size in shape)
