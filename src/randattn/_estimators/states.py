"""Check the state that a caller passes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from randattn._core.checks import check_like

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from randattn._core.inputs import Inputs

    Array = Any
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
) -> State:
    """Return the state, its heads split as those of the inputs.

    `sizes` are the trailing axes of its fields, `shared` the fields that heads and sequences may share, `whole`
    the fields of whole numbers.
    """
    if not isinstance(state, kind):
        raise TypeError(f"state: expected one of {estimator}, {kind.__name__}, got {type(state).__name__}")
    lead, fields = x.lead, []
    for name, trailing in sizes.items():
        field = getattr(state, name)
        check_like(f"state.{name}", field, x.q)
        if name not in whole and field.dtype != x.q.dtype:
            raise TypeError(f"state.{name}: expected dtype {x.q.dtype}, got {field.dtype}")
        got = tuple(field.shape)
        own = got[len(got) - len(trailing) :]
        if len(own) != len(trailing) or any(
            a is not None and a != b for a, b in zip(trailing, own, strict=True)
        ):
            raise ValueError(f"state.{name}: expected trailing axes {trailing}, got shape {got}")
        fields.append(x.match(f"state.{name}", field, len(trailing)) if trailing else field)
    for name, field, trailing in zip(sizes, fields, sizes.values(), strict=True):
        theirs = tuple(field.shape[: field.ndim - len(trailing)])
        if trailing and not _holds(theirs, lead, shared=name in shared):
            raise ValueError(f"state.{name}: expected leading axes that hold {lead}, got {theirs}")
    return kind(*fields)


def _holds(whole: tuple[int, ...], part: tuple[int, ...], *, shared: bool) -> bool:
    """Tell whether every axis of the part is one of the whole, or of length one; of a `shared` whole, too."""
    fits = (b in (1, a) or (shared and a == 1) for a, b in zip(whole, part, strict=True))
    return len(whole) == len(part) and all(fits)
