"""Cut, join and take along an axis of tokens, by operations that every library has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .library import Array, namespace, placement


def slices(n: int, size: int) -> Iterator[slice]:
    """Return slices of `size` entries each; the last slice may be shorter."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def cut(x: Array | None, axis: int, parts: int, *, so_far: bool = False) -> Sequence[Array | None]:
    """Cut an axis in `parts` of one length; copies of the first entry pad the end.

    With `so_far` each part comes with all parts before it. An index and a reshape do the cut: the end of a
    slice would be compared with the axis, which is a guard of a traced program.
    """
    if x is None:
        return [None] * parts
    xp, axis, n = namespace(x), axis + x.ndim, x.shape[axis]
    # Never below 2: a compiler makes sizes of 0 and 1 constants, which is a guard.
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
    """Join the parts that `cut` made, without the padding."""
    xp = namespace(parts[0])
    x = xp.concat(parts, axis=axis)
    return xp.take(x, xp.arange(n, device=placement(x)), axis=axis)


def rows(x: Array, index: Array) -> Array:
    """Return the rows `index` (L or 1, ...) of `x` (L, N, X), for each entry of axis L: (L, ..., X)."""
    heads, n, features = x.shape
    found = _taken(namespace(x).reshape(x, (heads * n, features)), index, heads)
    return namespace(x).reshape(found, (heads, *index.shape[1:], features))


def entries(x: Array, index: Array) -> Array:
    """Return the entries `index` (L or 1, ...) of `x` (L, N), for each entry of axis L: (L, ...)."""
    xp, heads = namespace(x), x.shape[0]
    return xp.reshape(_taken(xp.reshape(x, (-1,)), index, heads), (heads, *index.shape[1:]))


def _taken(x: Array, index: Array, heads: int) -> Array:
    """Take from `x` (L N, ...) at an index (L or 1, ...) into the N entries of each L: (I, ...)."""
    xp, n = namespace(x), x.shape[0] // heads
    # One flat `take`, which every library has; Dask has no `take_along_axis`.
    first = xp.arange(0, heads * n, n, dtype=index.dtype, device=placement(x))
    index = index + xp.reshape(first, (heads,) + (1,) * (index.ndim - 1))
    return xp.take(x, xp.reshape(index, (-1,)), axis=0)
