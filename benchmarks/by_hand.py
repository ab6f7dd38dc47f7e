"""The estimators' formulas as one would write them down for one library: no checks, no options.

The difference between these and randattn, on the smallest inputs, is the cost of its checks. One head
size, no masks, tokens that divide evenly into segments, groups and windows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from .baselines import Library

    Array = Any


class Operations(NamedTuple):
    """Operations with another name in each library, or that NumPy lacks."""

    xp: Any
    average: Callable[[Array, Array], tuple[Array, Array]]
    softmax: Callable[[Array], Array]
    log_sum_exp: Callable[[Array], Array]
    transpose: Callable[[Array], Array]
    arange: Callable[[int], Array]


def operations(library: Library) -> Operations:
    """Return the shortest form of each operation in a library."""
    xp = library.xp
    if library.name == "torch":
        device = "cuda" if library.on_gpu else "cpu"
        return Operations(
            xp,
            lambda logits, v: (xp.softmax(logits, -1) @ v, xp.logsumexp(logits, -1)),
            lambda logits: xp.softmax(logits, -1),
            lambda logits: xp.logsumexp(logits, -1),
            lambda x: x.transpose(-1, -2),
            lambda n: xp.arange(n, device=device),
        )

    def average(logits: Array, v: Array) -> tuple[Array, Array]:
        top = logits.max(-1, keepdims=True)
        weights = xp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        return weights @ v / total, (top + xp.log(total))[..., 0]

    def softmax(logits: Array) -> Array:
        weights = xp.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def log_sum_exp(logits: Array) -> Array:
        top = logits.max(-1, keepdims=True)
        return (top + xp.log(xp.exp(logits - top).sum(-1, keepdims=True)))[..., 0]

    return Operations(xp, average, softmax, log_sum_exp, lambda x: x.swapaxes(-1, -2), xp.arange)


def rfa(ops: Operations, q: Array, k: Array, v: Array, noise: Array) -> Array:
    """Compute RFA with positive features, in log space."""
    q, k = _scaled(q, k)
    f, log_z = ops.average(noise @ ops.transpose(k) - _half_norms(k)[..., None, :], v)
    return ops.softmax(q @ ops.transpose(noise) + log_z[..., None, :]) @ f


def lara_balance(ops: Operations, q: Array, k: Array, v: Array, noise: Array) -> Array:
    """Compute LARA with the balance heuristic, in which a proposal's own density cancels."""
    q, k = _scaled(q, k)
    w, _, _, log_mixture, f, log_z = _proposals(ops, q, k, v, noise)
    return ops.softmax(q @ ops.transpose(w) + (log_z - log_mixture)[..., None, :]) @ f


def lara_optimal(ops: Operations, q: Array, k: Array, v: Array, noise: Array) -> Array:
    """Compute LARA with the weights moved towards the landmarks near the query."""
    xp = ops.xp
    q, k = _scaled(q, k)
    w, qt, log_r, log_mixture, f, log_z = _proposals(ops, q, k, v, noise)
    log_t = q @ ops.transpose(qt)
    t = xp.exp(log_t - ops.log_sum_exp(ops.transpose(log_t))[..., None, :])
    alpha = xp.exp(log_r - log_mixture)[..., None, :] + t - t.mean(-1)[..., None]
    logits = q @ ops.transpose(w) + (log_z - log_r)[..., None, :] + xp.log(alpha.clip(1e-8))
    return ops.softmax(logits) @ f


def eva(ops: Operations, q: Array, k: Array, v: Array, noise: Array) -> Array:
    """Compute EVA with a window as long as the number of groups; no window cuts a group."""
    xp = ops.xp
    q, k = _scaled(q, k)
    (*lead, n, _), count = q.shape, noise.shape[-2]
    windows, window = n // count, count
    qt, kt = _means(q, count), _means(k, count)
    w = (qt + kt) / 2 + noise

    def parts(x: Array, number: int) -> Array:
        return x.reshape(*lead, number, -1, x.shape[-1])

    keys = parts(k, count)
    logits = w[..., None, :] @ ops.transpose(keys) - _half_norms(keys)[..., None, :]
    beta = (ops.softmax(logits) @ parts(v, count))[..., 0, :]

    own = parts(q, windows)
    near = own @ ops.transpose(parts(k, windows))
    far = parts(q @ ops.transpose(kt), windows) + math.log(n // count)
    # A query's window has these groups exactly.
    mine = ops.arange(count) // (count * window // n) == ops.arange(windows)[:, None]
    far = xp.where(mine[:, None, :], -math.inf, far)
    weights = ops.softmax(xp.concatenate([near, far], -1))
    out = weights[..., :window] @ parts(v, windows) + weights[..., window:] @ beta[..., None, :, :]
    return out.reshape(v.shape)


def _scaled(q: Array, k: Array) -> tuple[Array, Array]:
    root = q.shape[-1] ** -0.25
    return root * q, root * k


def _half_norms(x: Array) -> Array:
    return (x * x).sum(-1) / 2


def _means(x: Array, count: int) -> Array:
    *lead, n, d = x.shape
    return x.reshape(*lead, count, n // count, d).mean(-2)


def _proposals(ops: Operations, q: Array, k: Array, v: Array, noise: Array) -> tuple[Array, ...]:
    """Return frequencies, query landmarks, their log densities, and the average of the values for each."""
    qt, count = _means(q, noise.shape[-2]), noise.shape[-2]
    mu = qt + _means(k, count)
    w = mu + noise
    half = _half_norms(mu)
    log_r = (w * mu).sum(-1) - half
    log_mixture = ops.log_sum_exp(w @ ops.transpose(mu) - half[..., None, :])
    f, log_z = ops.average(w @ ops.transpose(k) - _half_norms(k)[..., None, :], v)
    return w, qt, log_r, log_mixture, f, log_z


FORMULAS: dict[str, Callable[..., Array]] = {
    "rfa": rfa,
    "lara weighting=balance": lara_balance,
    "lara weighting=optimal": lara_optimal,
    "eva window=16": eva,
}
