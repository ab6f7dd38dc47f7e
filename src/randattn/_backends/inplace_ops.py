"""Operations that write over their first argument, and products in held buffers: for NumPy, CuPy and PyTorch.

Logits have the keys first, (..., M, n): sums and maxima over the keys then run along whole rows.
"""

from __future__ import annotations

import contextlib
import math

from randattn._core.average import Operations
from randattn._core.checks import broadcast_shapes
from randattn._core.library import Array, placement


class BufferedOperations(Operations):
    """Operations that write over their first argument, if the result fits it, and products in held buffers.

    To allocate a new array for each block would cost as much as its product.
    """

    # True: the longer axis of the logits is the last in memory, so that sums run along long rows (NumPy).
    # False: the shorter axis is, for a library whose product is faster that way (PyTorch).
    long_rows = True
    # True where one product for all heads is faster than a product for each head.
    together = False
    # True where a product can be written to an array that is not contiguous.
    strided = False
    # True where the host can read values without waiting for a device.
    looks = False

    def __init__(self, like: Array) -> None:
        super().__init__(like)
        self._like = like
        self._held: dict[str, Array] = {}

    def empty(self, name: str, *shape: int) -> Array:
        """Return an array of a shape; it is valid until an array of the same name is asked for."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].shape[0] < size:
            self._held[name] = self._xp.empty(size, dtype=self._like.dtype, device=placement(self._like))
        return self._xp.reshape(self._held[name][:size], shape)

    def hold(self, name: str, x: Array | None) -> None:
        """Make `x` the buffer of a name; None drops the buffer."""
        self._held.pop(name, None)
        if x is not None:
            # `x` must be contiguous, or this is a copy and the result never reaches `x`.
            self._held[name] = self._xp.reshape(x, (-1,))

    def quietly(self) -> contextlib.AbstractContextManager[object]:
        """Return a context without warnings of overflow."""
        return contextlib.nullcontext()

    def matmul(self, name: str, a: Array, b: Array, factor: float = 1.0) -> Array:
        lead = broadcast_shapes(a.shape[:-2], b.shape[:-2])
        # A column times a row: `matmul` would take longer than the elementwise product.
        product = self._xp.multiply if a.shape[-1] == 1 else self._xp.matmul
        out = product(a, b, out=self.empty(name, *lead, a.shape[-2], b.shape[-1]))
        return out if factor == 1 else self.multiply(out, factor)

    def products(self, name: str, k: Array, q: Array, scale: float = 1.0) -> Array:
        """Return ``scale k . q``, (..., M, n), in the memory layout with which the library is fastest.

        Tiles (axis -3) of queries that share their keys have one product.
        """
        xp = self._xp
        tiles = _shared(k, q.shape)
        if tiles:
            *lead, tiles, n, d = q.shape
            k, q = k[..., 0, :, :], xp.reshape(q, (*lead, tiles * n, d))
        elif self.strided and k.ndim > 2 and k.shape[-3] == q.shape[-3] > 1:
            # Tiles lie beside each other in memory, so that rows are as long as all tiles together.
            *lead, count, m, _ = (*broadcast_shapes(k.shape[:-2], q.shape[:-2]), k.shape[-2], 0)
            out = xp.moveaxis(self.empty(name, *lead, m, count, q.shape[-2]), -2, -3)
            out = xp.matmul(k, xp.matrix_transpose(q), out=out)
            return out if scale == 1 else self.multiply(out, scale)
        if (k.shape[-2] > q.shape[-2]) is self.long_rows:
            x = xp.matrix_transpose(self.matmul(name, q, xp.matrix_transpose(k), scale))
        else:
            x = self.matmul(name, k, xp.matrix_transpose(q), scale)
        return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], tiles, n)), -2, -3) if tiles else x

    def sums(self, weights: Array, v: Array, acc: Array | None = None) -> Array:
        """Return `acc` plus the weighted sums of the values, (..., n, E).

        The weights (..., M, n) have the layout of `products`.
        """
        xp = self._xp
        a, tiles = xp.matrix_transpose(weights), _shared(v, weights.shape)
        if tiles:
            *lead, tiles, n, m = a.shape
            a, v = xp.reshape(a, (*lead, tiles * n, m)), v[..., 0, :, :]
            acc = None if acc is None else xp.reshape(acc, (*acc.shape[:-3], tiles * n, acc.shape[-1]))
        # Two buffers: "acc" keeps the running sums while "more" gets the next product.
        x = self.matmul("acc", a, v) if acc is None else self.add_matmul("more", acc, a, v)
        return xp.reshape(x, (*x.shape[:-2], tiles, n, x.shape[-1])) if tiles else x

    def add_matmul(self, name: str, x: Array, a: Array, b: Array) -> Array:
        """Return ``x + a b``."""
        return self.add(x, self.matmul(name, a, b))

    def add(self, x: Array, y: Array) -> Array:
        if not _holds(x, y):
            return x + y
        x += y
        return x

    def subtract(self, x: Array, y: Array) -> Array:
        if not _holds(x, y):
            return x - y
        x -= y
        return x

    def multiply(self, x: Array, y: Array) -> Array:
        if not _holds(x, y):
            return x * y
        x *= y
        return x

    def exp(self, x: Array) -> Array:
        return self._xp.exp(x, out=x)

    def at_most(self, x: Array, bound: float) -> Array:
        return self._xp.minimum(x, self._constant(bound), out=x)

    def at_least(self, x: Array, bound: float) -> Array:
        return self._xp.maximum(x, self._constant(bound), out=x)

    def _constant(self, value: float) -> Array:
        return self._xp.asarray(value, dtype=self._like.dtype, device=placement(self._like))


def _shared(keys: Array, shape: tuple[int, ...]) -> bool:
    """Tell whether tiles (axis -3) of queries share their keys."""
    return bool(keys.ndim > 2 and len(shape) == keys.ndim and keys.shape[-3] == 1 < shape[-3])


def _holds(x: Array, y: Array) -> bool:
    """Tell whether a result of `x` and `y` has the shape of `x`, and so can be written to it."""
    theirs = getattr(y, "shape", ())
    return len(theirs) <= x.ndim and all(
        b in (1, a) for a, b in zip(reversed(x.shape), reversed(theirs), strict=False)
    )
