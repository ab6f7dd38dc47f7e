"""The library of an array, and the compiler that may be tracing this code.

No library is named here: `randattn._backends` has a subclass of `Library` for each, and gives this module the
function that finds it and the compiler to ask. A traced size is an expression, for programs that serve many
sizes. To compare it is a guard for one compiler and an error for another: a choice of speed or memory asks
`hint`, a layout that cannot do without the size asks `check_known`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import array_api_compat as compat

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = Any
    Namespace = Any


class Library:
    """An array library, as the core sees it: by the array API standard alone.

    Attributes
    ----------
    name : str
        "other" for a library of which nothing but the standard is known.
    """

    name = "other"

    def __init__(self) -> None:
        self._namespaces: dict[type, Namespace] = {}

    def namespace(self, x: Array) -> Namespace:
        """Return the array-API namespace of an array."""
        kind = type(x)
        # array-api-compat asks every library in turn, on every call.
        if kind not in self._namespaces:
            self._namespaces[kind] = compat.array_namespace(x)
        return self._namespaces[kind]

    def placement(self, x: Array) -> Any:
        """Return the device to create arrays on beside `x`; None where a new array follows those that it meets."""
        return getattr(x, "device", None)

    def beside(self, rows: Any, like: Array) -> Array:
        """Bring a NumPy array to this library and the device of `like`."""
        return self.namespace(like).asarray(rows, device=self.placement(like))

    def cut_as(self, x: Array, like: Array) -> Array:  # noqa: ARG002
        """Cut the last axis of a mask as the tokens of `like` are cut; arrays in one piece stay as they are."""
        return x


class Compiler:
    """A compiler that runs or reads this code while it makes a program. This one never does."""

    def is_tracing(self) -> bool:
        """Tell whether a program is being made."""
        return False

    def reads_code(self) -> bool:
        """Tell whether it is made by reading this code, where only constants and arrays can be held."""
        return False

    def library(self, x: Any) -> Library | None:  # noqa: ARG002
        """Return the library of an array that is traced; None for every other object."""
        return None

    def constant(self, x: Any, device: Any) -> Array:
        """Make a constant of the program of a NumPy array."""
        raise NotImplementedError

    def is_known(self, *sizes: Any) -> bool:
        """Tell whether all sizes are numbers."""
        return all(isinstance(size, int) for size in sizes)

    def hint(self, size: Any) -> int:
        """Return a number to choose by: the size, that of the caller's example, or the largest int."""
        return size if isinstance(size, int) else sys.maxsize

    def bound(self, size: Any, most: int) -> None:
        """Let the program serve no larger size."""

    def specialize(self, *sizes: Any) -> None:
        """Let the program have these sizes as constants."""

    def stays(self, size: Any) -> bool:  # noqa: ARG002
        """Tell whether the caller has asked for a program of all sizes like this expression."""
        return True


def _find_none(x: Any) -> Library | None:  # noqa: ARG001
    """Find no library: `randattn._backends.dispatch` puts its own function here, and its own compiler."""
    return None


compiler = Compiler()
find: Callable[[Any], Library | None] = _find_none
_libraries: dict[type, Library | None] = {}


def library_of(x: Any) -> Library | None:
    """Return the library of an array; None where `x` is no array."""
    traced = compiler.library(x)
    if traced is not None:
        # Not from the table: an entry that a trace finds or writes becomes a guard of its program.
        return traced
    kind = type(x)
    if kind not in _libraries:
        _libraries[kind] = find(x)
    return _libraries[kind]


def is_array(x: Any) -> bool:
    """Tell whether `x` is an array of any library that array-api-compat knows."""
    return library_of(x) is not None


def known_library(x: Array) -> Library:
    """Return the library of an object that is known to be an array."""
    library = library_of(x)
    if library is None:
        raise TypeError(f"expected an array, got {type(x).__name__}")
    return library


def namespace(x: Array) -> Namespace:
    """Return the array-API namespace of one array."""
    return known_library(x).namespace(x)


def placement(x: Array) -> Any:
    """Return the device to create arrays on beside `x`; None where a new array follows those that it meets."""
    return known_library(x).placement(x)


def is_known(*sizes: Any) -> bool:
    """Tell whether all sizes are numbers, not expressions that a compiler keeps."""
    return compiler.is_known(*sizes)


def hint(size: Any) -> int:
    """Return a number to choose by, after which the program is right for every size."""
    return compiler.hint(size)


def check_known(name: str, why: str, *sizes: Any) -> None:
    """Raise where a size has to stay symbolic that must be a number."""
    for size in sizes:
        if not is_known(size) and compiler.stays(size):
            raise ValueError(
                f"{name}: expected sizes that are known when the program is made, for {why}, got the "
                f"symbolic {size}: leave it static (no Dim in PyTorch's export, no symbol in JAX's)"
            )
