"""Cut, join and take along an axis of tokens, by operations that every library has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .library import namespace, placement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Array = Any


def slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of so many entries, the last one shorter."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def cut(x: Array | None, axis: int, parts: int, *, so_far: bool = False) -> Sequence[Array | None]:
    """Cut an axis in parts of one length, filled up by the first entry; `so_far`: each with all before it.

    By an index and a reshape: a slice's end would be compared with the axis, which is a guard of a traced
    program.
    """
    if x is None:
        return [None] * parts
    xp, axis, n = namespace(x), axis + x.ndim, x.shape[axis]
    # At least two: a compiler tells sizes of one from others, which is a guard.
    size = n // parts + 2
    number = xp.arange(parts * size, device=placement(x))
    x = xp.take(x, xp.where(number < n, number, 0), axis=axis)
    lead, rest = tuple(x.shape[:axis]), tuple(x.shape[axis + 1 :])
    x = xp.reshape(x, (*lead, parts, size, *rest))
    before = (slice(None),) * axis
    if so_far:
        return [xp.reshape(x[*before, : i + 1], (*lead, (i + 1) * size, *rest)) for i in range(parts)]
    return [x[*before, i] for i in range(parts)]


def joined(parts: Sequence[Array], axis: int, n: Any) -> Array:
    """Join the parts that `cut` made, without the entries that fill them up."""
    xp = namespace(parts[0])
    x = xp.concat(parts, axis=axis)
    return xp.take(x, xp.arange(n, device=placement(x)), axis=axis)


def rows(x: Array, index: Array) -> Array:
    """Return row `index` (L or 1, ...) of each `x` (L, N, X): (L, ..., X)."""
    lanes, n, features = x.shape
    found = _taken(namespace(x).reshape(x, (lanes * n, features)), index, lanes)
    return namespace(x).reshape(found, (lanes, *index.shape[1:], features))


def entries(x: Array, index: Array) -> Array:
    """Return entry `index` (L or 1, ...) of each `x` (L, N): (L, ...)."""
    xp, lanes = namespace(x), x.shape[0]
    return xp.reshape(_taken(xp.reshape(x, (-1,)), index, lanes), (lanes, *index.shape[1:]))


def _taken(x: Array, index: Array, lanes: int) -> Array:
    """Take from `x` (L N, ...) at an index (L or 1, ...) into each of L: (I, ...)."""
    xp, n = namespace(x), x.shape[0] // lanes
    first = xp.arange(0, lanes * n, n, dtype=index.dtype, device=placement(x))
    index = index + xp.reshape(first, (lanes,) + (1,) * (index.ndim - 1))
    return xp.take(x, xp.reshape(index, (-1,)), axis=0)
