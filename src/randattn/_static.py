"""Work that is done once, on the host, while a program is traced."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ._tracing import constant_tensor, dynamo_traces

if TYPE_CHECKING:
    from collections.abc import Callable

    F = TypeVar("F", bound=Callable[..., Any])

# Arrays of the trace that is under way, and of some before it. One program has at most as many: 20 a length.
_MOST_ARRAYS = 1024
_arrays: dict[int, Any] = {}
_place_of: dict[int, int] = {}
_places = itertools.count()


class Held(NamedTuple):
    """Stand for a NumPy array of a constant result where PyTorch's Dynamo traces (`_fused.beside`).

    The array itself would be an input of the program, with symbolic sizes.
    """

    shape: tuple[int, ...]
    size: int
    place: int  # of what gives it as a tensor on a device, among `TENSORS`


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
    # Layers of one length have their plans from one cache: the same arrays, and so the same places.
    place = _place_of.get(id(x))
    if place is None:
        place = next(_places) % _MOST_ARRAYS
        if place in _arrays:
            del _place_of[id(_arrays[place][0])]
        _arrays[place], _place_of[id(x)] = (x, {}), place
    return Held(tuple(x.shape), x.size, place)


def _tensor(place: int) -> Callable[[Any], Any]:
    @as_constant
    def tensor(device: Any) -> Any:
        x, made = _arrays[place]
        if device not in made:
            made[device] = constant_tensor(x, device)
        return made[device]

    # Dynamo tells the constants of a program apart by the names of their functions.
    tensor.__code__ = tensor.__code__.replace(co_name=f"held_{place}")
    return tensor


TENSORS = tuple(map(_tensor, range(_MOST_ARRAYS)))


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes as plain integers, also where a compiler would keep them symbolic."""
    return tuple(operator.index(size) for size in shape)
