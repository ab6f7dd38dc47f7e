"""Check the state that a caller passes back to a step function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from randattn._core.checks import check_like
from randattn._core.inputs import Inputs

State = TypeVar("State", bound=tuple[Any, ...])


def match_state(
    estimator: str,
    kind: type[State],
    state: Any,
    x: Inputs,
    sizes: Mapping[str, tuple[int | None, ...]],
    *,
    shared: Sequence[str] = (),
    whole: Sequence[str] = (),
    lead: tuple[int, ...] | None = None,
) -> State:
    """Return the state with its heads split as those of the inputs.

    `sizes` gives the trailing axes of each field, None for any length. `shared` names the fields that all
    heads and sequences may share. `whole` names the fields of whole numbers, whose dtype is free. The state
    must hold the leading axes `lead`, by default those of the inputs.
    """
    if not isinstance(state, kind):
        raise TypeError(f"state: expected one of {estimator}, {kind.__name__}, got {type(state).__name__}")
    lead, fields = x.lead if lead is None else lead, []
    for name, trailing in sizes.items():
        field = getattr(state, name)
        check_like(f"state.{name}", field, x.q)
        # A state in another dtype would promote every later result.
        if name not in whole and field.dtype != x.q.dtype:
            raise TypeError(f"state.{name}: expected dtype {x.q.dtype}, got {field.dtype}")
        got = tuple(field.shape)
        # Not got[-len(trailing):], which is the whole shape of a field without trailing axes.
        own = got[len(got) - len(trailing) :]
        if len(own) != len(trailing) or any(
            a is not None and a != b for a, b in zip(trailing, own, strict=True)
        ):
            raise ValueError(f"state.{name}: expected trailing axes {trailing}, got shape {got}")
        fields.append(x.with_heads(f"state.{name}", field, len(trailing)) if trailing else field)
    # A state with fewer heads or sequences would broadcast: several sequences would then share one past.
    for name, field, trailing in zip(sizes, fields, sizes.values(), strict=True):
        theirs = tuple(field.shape[: field.ndim - len(trailing)])
        if trailing and not _holds(theirs, lead, shared=name in shared):
            raise ValueError(f"state.{name}: expected leading axes that hold {lead}, got {theirs}")
    return kind(*fields)


def _holds(whole: tuple[int, ...], part: tuple[int, ...], *, shared: bool) -> bool:
    """Tell whether the axes of a state hold those of the inputs; an axis of a `shared` field may be one."""
    fits = (b in (1, a) or (shared and a == 1) for a, b in zip(whole, part, strict=True))
    return len(whole) == len(part) and all(fits)
