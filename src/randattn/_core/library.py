"""The library of an array, and the compiler that may be tracing this code.

No library is imported here: `randattn._backends` has a subclass of `Library` for each library, and gives this
module the function that finds it and the compiler. In a program that serves many sizes a traced size is an
expression. Comparing it adds a guard in one compiler and raises in another. So code that chooses by speed or
memory calls `hint`, and code that lays out tokens by their number calls `check_known`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import array_api_compat as compat

# An array of any library, and the module of its functions.
Array = Any
Namespace = Any


class Library:
    """An array library as the core uses it, by the array API standard alone.

    Attributes
    ----------
    name : str
        The name of the library; "other" for a library without a backend of its own.
    """

    name = "other"

    def namespace(self, x: Array) -> Namespace:
        """Return the array-API namespace of an array."""
        return compat.array_namespace(x)

    def placement(self, x: Array) -> Any:
        """Return the device for new arrays beside `x`; None where they take the device of other operands."""
        return getattr(x, "device", None)

    def beside(self, rows: Any, like: Array) -> Array:
        """Bring a NumPy array to this library and to the device of `like`."""
        return self.namespace(like).asarray(rows, device=self.placement(like))

    def cut_as(self, x: Array, like: Array) -> Array:  # noqa: ARG002
        """Cut the last axis of a mask in the chunks of the tokens of `like`; a mask without chunks stays."""
        return x


class Compiler:
    """A compiler that traces this code to make a program; this base class never traces."""

    def is_tracing(self) -> bool:
        """Tell whether a program is being traced."""
        return False

    def reads_code(self) -> bool:
        """Tell whether the compiler reads this code itself, and so can hold constants and arrays alone."""
        return False

    def library(self, x: Any) -> Library | None:  # noqa: ARG002
        """Return the library of a traced array; None for every other object."""
        return None

    def constant(self, x: Any, device: Any) -> Array:
        """Return a constant of the program with the values of a NumPy array."""
        raise NotImplementedError

    def is_known(self, *sizes: Any) -> bool:
        """Tell whether all sizes are numbers, not expressions."""
        return all(isinstance(size, int) for size in sizes)

    def hint(self, size: Any) -> int:
        """Return a number to choose by: the size, its value in the caller's example, or the largest int."""
        return size if isinstance(size, int) else sys.maxsize

    def bound(self, size: Any, most: int) -> None:
        """Guard that the program serves no size above `most`."""

    def specialize(self, *sizes: Any) -> None:
        """Make these sizes constants of the program."""

    def stays(self, size: Any) -> bool:  # noqa: ARG002
        """Tell whether the caller asked for a program that serves all values of this size."""
        return True


def _find_none(x: Any) -> Library | None:  # noqa: ARG001
    """Return None until `randattn._backends.dispatch` replaces this function."""
    return None


# `randattn._backends.dispatch` replaces both. Other modules must read them as `library.compiler` and
# `library.find`: an imported name would keep the first object.
compiler = Compiler()
find: Callable[[Any], Library | None] = _find_none
# A small call looks an array up dozens of times; array-api-compat would try every library in turn each time.
_libraries: dict[type, Library | None] = {}
_namespaces: dict[type, Namespace] = {}


def library_of(x: Any) -> Library | None:
    """Return the library of `x`; None where `x` is no array."""
    if compiler.is_tracing():
        # Not from the cache: an entry that a trace reads or writes becomes a guard of its program.
        traced = compiler.library(x)
        if traced is not None:
            return traced
    kind = type(x)
    if kind not in _libraries:
        _libraries[kind] = find(x)
    return _libraries[kind]


def is_array(x: Any) -> bool:
    """Tell whether `x` is an array of any library that array-api-compat knows."""
    return library_of(x) is not None


def known_library(x: Array) -> Library:
    """Return the library of `x`; raise where `x` is no array."""
    library = library_of(x)
    if library is None:
        raise TypeError(f"expected an array, got {type(x).__name__}")
    return library


def namespace(x: Array) -> Namespace:
    """Return the array-API namespace of `x`."""
    if compiler.is_tracing():
        return known_library(x).namespace(x)
    kind = type(x)
    if kind not in _namespaces:
        _namespaces[kind] = known_library(x).namespace(x)
    return _namespaces[kind]


def placement(x: Array) -> Any:
    """Return the device for new arrays beside `x`; None where they take the device of other operands."""
    return known_library(x).placement(x)


def is_known(*sizes: Any) -> bool:
    """Tell whether all sizes are numbers, not expressions of a compiler."""
    return compiler.is_known(*sizes)


def hint(size: Any) -> int:
    """Return a number to choose by; the choice must leave the program right for every size."""
    return compiler.hint(size)


def check_known(name: str, why: str, *sizes: Any) -> None:
    """Raise where a size must stay symbolic though the code needs a number."""
    for size in sizes:
        if not is_known(size) and compiler.stays(size):
            raise ValueError(
                f"{name}: expected sizes that are known when the program is made, for {why}, got the "
                f"symbolic {size}: leave it static (no Dim in PyTorch's export, no symbol in JAX's)"
            )
