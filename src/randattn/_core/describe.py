"""Short descriptions of values for errors; an array is never shown by its numbers."""

from __future__ import annotations

import numbers
import reprlib
from typing import Any

# Parts of a tuple or list that an error shows. It bounds the message; three parts show the sizes of any grid.
_MOST_PARTS = 3


def shown(value: Any) -> str:
    """Describe a value: an array by its type and shape, a tuple or list by its first parts."""
    if value is None or isinstance(value, (str, bytes, int)):
        return reprlib.repr(value)
    if isinstance(value, numbers.Number):
        return str(value)
    if isinstance(value, (tuple, list)):
        # Nested sequences may be deep: the number of parts stands for them.
        if any(isinstance(part, (tuple, list)) for part in value):
            return f"a {type(value).__name__} of {len(value)}"
        parts = ", ".join(map(shown, value[:_MOST_PARTS])) + ", ..." * (len(value) > _MOST_PARTS)
        return f"({parts}{',' * (len(value) == 1)})" if isinstance(value, tuple) else f"[{parts}]"
    name, shape = getattr(value, "__qualname__", None), getattr(value, "shape", None)
    if isinstance(name, str):
        return name
    return type_name(value) + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")


def type_name(value: Any) -> str:
    """Return the name of the type of a value, with its library."""
    kind = type(value)
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
