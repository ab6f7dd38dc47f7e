"""Group tokens with similar logits, in groups of one size.

Arrays here are (L, N, .), with all leading axes in one axis L. The choice of groups passes no gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from randattn._backends.dispatch import backend_of
from randattn._core.indexing import entries, rows
from randattn._core.library import namespace, placement

if TYPE_CHECKING:
    Array = Any

# The stride, in tokens, of the sample for a covariance, where there are enough tokens. It bounds time: with
# every fourth token the errors were as with all tokens, for a quarter of the multiply-adds.
STRIDE = 4
# The number of steps of a power iteration, which costs time in proportion. Directions need not be exact
# eigenvectors, only near the leading eigenvectors.
ROUNDS = 2


def sketch(q: Array, k: Array, rank: int) -> tuple[Array, Array]:
    """Return coordinates (L, N, r), (L, M, r) whose products approximate ``q . k`` of tokens with zero mean.

    The coordinates are ``X'q`` and ``(cov(q) X)'k`` with the leading eigenvectors X of cov(k) cov(q), which
    are orthonormal by cov(q): the best approximation of this rank. Subspace iteration finds X.
    """
    if q.shape[-1] <= rank:
        return q, k
    matmul = namespace(q).matmul
    of_q, of_k = (covariance(x[:, :: stride_of(x.shape[1]), :]) for x in (q, k))
    basis = _orthonormal(of_k[..., :rank], of_q)
    for _ in range(ROUNDS):
        basis = _orthonormal(matmul(of_k, matmul(of_q, basis)), of_q)
    return matmul(q, basis), matmul(k, matmul(of_q, basis))


def stride_of(tokens: int) -> int:
    """Return the stride of the sample of tokens for a covariance."""
    # The sample has at least 128 tokens, or all tokens.
    return max(1, min(2 * STRIDE, tokens // 128))


def _orthonormal(x: Array, metric: Array) -> Array:
    """Make the columns of `x` (L, D, r) orthonormal by the metric; a column without length becomes zero."""
    xp, done = namespace(x), []
    transpose = xp.matrix_transpose
    # Squares of lengths: rounding alone can make one negative.
    squares = xp.abs(xp.sum(x * xp.matmul(metric, x), axis=-2))
    largest = xp.sqrt(xp.max(squares, axis=-1))[:, None, None]
    for _ in range(x.shape[-1]):
        one, x = x[..., :1], x[..., 1:]
        along = xp.matmul(metric, one)
        # `abs`, since rounding may make a tiny square negative. A column below sqrt(eps) of the largest
        # length is rounding alone: to divide it by its length would make noise a direction.
        length = xp.sqrt(xp.abs(xp.sum(one * along, axis=-2, keepdims=True)))
        is_more = length > largest * xp.finfo(x.dtype).eps ** 0.5
        length = xp.where(is_more, length, 1.0)
        one, along = xp.where(is_more, one / length, 0.0), along / length
        done.append(one)
        x = x - xp.matmul(one, xp.matmul(transpose(along), x))
    return xp.concat(done, axis=-1)


def covariance(x: Array) -> Array:
    """Return ``x'x / n`` of tokens (L, n, r) with zero mean."""
    xp = namespace(x)
    return xp.matmul(xp.matrix_transpose(x), x) / x.shape[-2]


def halves(x: Array, metric: Array, keep: Array | None, depth: int) -> Array:
    """Return groups (L, 2**depth, s) of tokens `x` (L, N, r), from repeated halving along a main direction.

    Lengths are measured by `metric` (L, r, r), the covariance of the other factor of the products: tokens
    with similar logits are near each other. Numbers from N on are padding; tokens that are False in `keep`
    (L, N) are in the last groups.
    """
    xp, (heads, n, features) = namespace(x), x.shape
    size = -(-n // 2**depth)
    fill = size * 2**depth - n
    device = placement(x)
    index = xp.broadcast_to(xp.arange(n + fill, device=device)[None, :], (heads, n + fill))
    is_token = xp.ones((heads, n), dtype=xp.bool, device=device) if keep is None else keep
    if fill:
        x = xp.concat([x, xp.zeros((heads, fill, features), dtype=x.dtype, device=device)], axis=1)
        none = xp.zeros((heads, fill), dtype=xp.bool, device=device)
        is_token = xp.concat([is_token, none], axis=1)
    for level in range(depth):
        nodes, length = heads * 2**level, size * 2 ** (depth - level)
        x, is_token, index = (xp.reshape(y, (nodes, length, *y.shape[2:])) for y in (x, is_token, index))
        weight = xp.astype(is_token, x.dtype)[..., None]
        every = max(1, min(STRIDE, length // 8))
        steps = xp.reshape(
            xp.broadcast_to(metric[:, None, ...], (heads, 2**level, features, features)),
            (nodes, features, features),
        )
        direction = _direction(x[:, ::every, :], weight[:, ::every, :], steps)
        # Padding sorts last at every level, and so ends in the last groups.
        along = xp.where(is_token, xp.matmul(x, direction)[..., 0], math.inf)
        # Masked tokens compare equal: a stable sort gives them the same places on every library.
        order = backend_of(x).order_of(along, stable=keep is not None)
        x, is_token, index = rows(x, order), entries(is_token, order), entries(index, order)
    return xp.reshape(index, (heads, 2**depth, size))


def _direction(x: Array, weight: Array, metric: Array) -> Array:
    """Return the leading eigenvector (nodes, r, 1) of metric times covariance, by power iteration."""
    xp = namespace(x)
    tiny = xp.finfo(x.dtype).smallest_normal
    count = xp.sum(weight, axis=-2, keepdims=True)
    x = (x - xp.sum(x * weight, axis=-2, keepdims=True) / xp.where(count == 0, 1.0, count)) * weight
    number = xp.arange(x.shape[-1], device=placement(x))[None, :]
    of_metric = xp.sum(xp.where((number == xp.matrix_transpose(number))[None, ...], metric, 0.0), axis=-1)
    start = number == xp.argmax(xp.sum(x * x, axis=-2) * of_metric, axis=-1)[:, None]
    direction = xp.astype(start, x.dtype)[..., None]
    for _ in range(ROUNDS):
        along = xp.matmul(xp.matrix_transpose(x), xp.matmul(x, direction))
        direction = xp.matmul(metric, along)
        # Divided by the largest entry, or repeated products would overflow. For equal tokens it stays 0.
        longest = xp.max(xp.abs(direction), axis=-2, keepdims=True)
        direction = direction / xp.where(longest < tiny, 1.0, longest)
    return direction
