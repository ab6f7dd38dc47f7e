"""Work that is done once, on the host, while a program is traced."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    F = TypeVar("F", bound=Callable[..., object])


def static(function: F) -> F:
    """Let a tracing compiler call `function` as it is, and take what it returns as a constant.

    Its arguments must be plain constants (see `plain`), its result must depend on nothing else.
    """
    # What torch.compiler.assume_constant_result sets; setting it here imports nothing.
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes as plain integers, also where a compiler would keep them symbolic."""
    return tuple(operator.index(size) for size in shape)
