"""The estimators once more, from the papers' formulas, in float64, one query at a time.

Written apart from the library: sums and products of plain exponentials, no log space, no blocks, no
merge, no shared helper. Slow, and good only for inputs of moderate norm.
"""

from __future__ import annotations

import numpy as np


def scaled(q, k, scale=None):
    root = np.sqrt(q.shape[-1] ** -0.5 if scale is None else scale)
    return root * q, root * k


def per_head(function):
    """Apply a function of (N, D), (M, D), (M, E), ... to every leading axis."""

    def apply(q, k, v, *more, **options):
        lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        arrays = [np.broadcast_to(x, (*lead, *x.shape[x.ndim - 2 :])) for x in (q, k, v)]
        out = np.empty((*lead, q.shape[-2], v.shape[-1]))
        for at in np.ndindex(*lead):
            out[at] = function(*(x[at] for x in arrays), *(m[at] for m in more), **options)
        return out

    return apply


def xi(x, w):
    return np.exp(w @ x - x @ x / 2)


def f_and_z(w, k, v):
    weights = np.array([xi(key, w) for key in k])
    return weights @ v / weights.sum(), weights.sum()


@per_head
def softmax(q, k, v, scale=None, keep=None):
    q, k = scaled(q, k, scale)
    out = np.zeros((len(q), v.shape[1]))
    for n in range(len(q)):
        weights = np.exp(k @ q[n])
        if keep is not None:
            weights = weights * keep(n, np.arange(len(k)))
        out[n] = weights @ v / weights.sum()
    return out


@per_head
def rfa_positive(q, k, v, w, is_causal=False):
    q, k = scaled(q, k)
    phi_q = np.array([[xi(x, one) for one in w] for x in q])
    phi_k = np.array([[xi(x, one) for one in w] for x in k])
    weights = phi_q @ phi_k.T
    if is_causal:
        weights = np.tril(weights)
    return weights @ v / weights.sum(axis=1, keepdims=True)


@per_head
def rfa_trigonometric(q, k, v, w):
    q, k = scaled(q, k)
    out = np.empty((len(q), v.shape[1]))
    for n in range(len(q)):
        weights = np.array(
            [np.exp((q[n] @ q[n] + key @ key) / 2) * np.mean(np.cos(w @ (q[n] - key))) for key in k]
        )
        out[n] = weights @ v / weights.sum()
    return np.clip(out, v.min(axis=0), v.max(axis=0))


@per_head
def ra(q, k, v, noise, components):
    q, k = scaled(q, k)
    out = np.zeros((len(q), v.shape[1]))
    for n in range(len(q)):
        weights = np.exp(k @ q[n])
        passed = np.cumsum(weights / weights.sum())
        for s in range(len(noise)):
            chosen = k[np.searchsorted(passed, components[s, n], side="right")]
            out[n] += f_and_z(q[n] + chosen + noise[s, n], k, v)[0] / len(noise)
    return out


def segments(n, count):
    """So many segments, the longer ones last."""
    return np.split(
        np.arange(n), np.cumsum([n // count + (i >= count - n % count) for i in range(count)])[:-1]
    )


@per_head
def lara(
    q, k, v, noise, weighting="optimal", alpha=1.0, normalize="queries", noise_scale=1.0, mix_keys=False
):
    q, k = scaled(q, k)
    count = len(noise)
    qt = np.array([q[s].mean(axis=0) for s in segments(len(q), count)])
    kt = np.array([k[s].mean(axis=0) for s in segments(len(k), count)])
    if mix_keys:
        mixing = np.exp(kt @ kt.T)
        kt = mixing / mixing.sum(axis=1, keepdims=True) @ kt
    mu = qt + kt
    w = mu + noise_scale * noise
    near = np.exp(q @ qt.T)
    t = near / near.sum(axis=0 if normalize == "queries" else 1, keepdims=True)
    out = np.empty((len(q), v.shape[1]))
    for n in range(len(q)):
        total, sum_ = 0.0, np.zeros(v.shape[1])
        for c in range(count):
            # Densities over that of N(0, I), at the draw.
            densities = np.array([np.exp(w[c] @ m - m @ m / 2) for m in mu])
            heuristic = densities[c] / densities.sum()
            if weighting == "optimal":
                a = max(heuristic + alpha * (t[n, c] - t[n].mean()), 1e-8)
            elif weighting == "biased":
                a = heuristic * np.exp(q[n] @ mu[c])
            else:
                a = heuristic
            f, z = f_and_z(w[c], k, v)
            weight = a / densities[c] * xi(q[n], w[c]) * z
            total, sum_ = total + weight, sum_ + weight * f
        out[n] = sum_ / total
    return out


@per_head
def lara_causal(q, k, v, noise, window, weighting="optimal", alpha=1.0, keep=None):
    """`keep` says which keys are there; segments are those of all tokens."""
    q, k = scaled(q, k)
    keep = np.ones(len(k), dtype=bool) if keep is None else keep
    all_segments = segments(len(q), len(noise))
    kept = [s[keep[s]] for s in all_segments]
    out = np.zeros((len(q), v.shape[1]))
    for n in np.flatnonzero(keep.cumsum() > 0):
        first = n - n % window
        exact = [m for m in range(first, n + 1) if keep[m]]
        before = np.flatnonzero(keep[:first])
        weights, values = [np.exp(q[n] @ k[m]) for m in exact], [v[m] for m in exact]
        over = [c for c, s in enumerate(all_segments) if s[-1] < first and len(kept[c])]
        mu = np.array([q[kept[c]].mean(axis=0) + k[kept[c]].mean(axis=0) for c in over]).reshape(
            -1, q.shape[1]
        )
        near = np.array([np.exp(q[n] @ q[kept[c]].mean(axis=0)) for c in over])
        draws = [(c, mu[i] + noise[c]) for i, c in enumerate(over)] + [(None, -one) for one in noise]
        for c, w in draws if len(before) else []:
            densities = [np.exp(w @ m - m @ m / 2) for m in mu]
            own = 1.0 if c is None else densities[over.index(c)]
            a = own / (sum(densities) + len(noise))
            if weighting == "optimal":
                if c is not None:
                    a += alpha * (near[over.index(c)] / near.sum() - 1 / len(over))
                a = max(a, 1e-8)
            f, z = f_and_z(w, k[before], v[before])
            weights.append(a / own * xi(q[n], w) * z)
            values.append(f)
        out[n] = np.array(weights) @ np.array(values) / np.sum(weights)
    return out


@per_head
def eva(
    q,
    k,
    v,
    noise,
    groups,
    window,
    group_weight="size",
    disjoint=True,
    noise_scale=1.0,
    bias=lambda n, m: 0.0,
):
    """`groups` lists the keys of each group, `window` gives the keys of a query's window."""
    q, k = scaled(q, k)
    w = [
        (q[g].mean(axis=0) + k[g].mean(axis=0)) / 2 + noise_scale * e
        for g, e in zip(groups, noise, strict=True)
    ]
    out = np.empty((len(q), v.shape[1]))
    for n in range(len(q)):
        exact = list(window(n))
        weights = [np.exp(q[n] @ k[m] + bias(n, m)) for m in exact]
        values = [v[m] for m in exact]
        for c, group in enumerate(groups):
            left = np.array([m for m in group if not disjoint or m not in exact], dtype=int)
            if len(left):
                size = len(left) if group_weight == "size" else 1
                weights.append(size * np.exp(q[n] @ k[left].mean(axis=0)))
                values.append(f_and_z(w[c], k[left], v[left])[0])
        out[n] = np.array(weights) @ np.array(values) / np.sum(weights)
    return out
