"""Count the multiply-adds of one head of each estimator: matrix products and weighted sums.

Each formula takes N, M, D, E and a dict of all options of the estimator.
"""

from __future__ import annotations

import math
from typing import Any

from randattn._tokens.tree import ROUNDS, STRIDE, stride_of

from .options import FAMILY, NUM_GROUPS, depth_of, rank_of, resolved, shortlist_of


def softmax(n: int, m: int, d: int, e: int, _: Any) -> float:
    """Count the multiply-adds of exact attention."""
    return n * m * (d + e)


def rfa(n: int, m: int, d: int, e: int, options: Any) -> float:
    """Count the multiply-adds of random-feature attention."""
    s = options["num_samples"] or 64
    if options["features"] == "trigonometric":
        # A cosine and a sine of each angle: 2 S features on both sides.
        return s * (n + m) * (d + 2 * e) + 2 * s * n + m * d
    # Optimal features: the mean of |q + k|^2, and |w|^2 of each frequency.
    more = (n + m + s + 1) * d if options["features"] == "optimal" else 0
    # The average f(W) over the keys, the average over the frequencies, and |k|^2 in kappa.
    return s * (n + m) * (d + e) + m * d + more


def ra(n: int, m: int, d: int, e: int, options: Any) -> float:
    """Count the multiply-adds of randomized attention."""
    samples = options["num_samples"] or 1
    # The logits that draws come from, the product that takes the drawn keys, and f at each draw.
    return n * m * d + samples * n * m * (2 * d + e) + m * d


def lara(n: int, m: int, d: int, e: int, options: Any) -> float:
    """Count the multiply-adds of LARA."""
    c = min(_number(options["num_landmarks"]), m)
    copies = 2 if options["antithetic"] else 1
    # Two averages as in `rfa`, and the mixture density of all proposals at each draw.
    count = copies * c * (n + m) * (d + e) + m * d + 2 * copies**2 * c * c * d
    if options["weighting"] == "optimal":
        # The nearness t of queries to landmarks, and the sum over the queries where that normalizes it.
        count += (1 + (options["normalize"] != "landmarks")) * n * c * d
    return count + 2 * c * c * d * bool(options["mix_keys"])


def eva(n: int, m: int, d: int, e: int, options: Any) -> float:
    """Count the multiply-adds of EVA."""
    size = options["group_size"]
    c = min(_number(options["num_groups"]), m) if size is None else -(-m // _number(size))
    near = n * min(_number(options["window"]), m) * (d + e)
    # The window, the groups, and the control variates with kappa: each key is in one group.
    return near + n * c * (d + e) + m * (2 * d + e)


def adaptive_eva(n: int, m: int, d: int, e: int, options: Any) -> float:
    """Count the multiply-adds of adaptive EVA, including those that choose groups and keys."""
    size, groups = options["group_size"], options["groups"]
    c = -(-m // (-(-m // NUM_GROUPS) if size is None else min(m, size)))
    by_tree, labels = isinstance(groups, str) and groups == "tree", not isinstance(groups, str)
    if by_tree:
        c = 2 ** depth_of(c, m)
    places = m if labels else -(-m // c) * c
    r, t, num_blocks = rank_of(d), *resolved(n, m, options["num_exact"], options["block_size"])
    # The logits mu.k, and the groups' averages of keys, values, ones and coordinates.
    count = float(places * d + (places * c if labels else places) * (d + e + 1 + r))
    if d > r:
        # The sketch: two covariances, rounds of subspace iteration, and the coordinates of all tokens.
        sampled = sum(-(-x // stride_of(x)) for x in (n, m))
        orthonormal = 2 * d * d * r + d * r * r
        count += sampled * d * d + (1 + ROUNDS) * orthonormal + (2 * ROUNDS + 1) * d * d * r + (n + m) * d * r
    if by_tree:
        count += _halves(m, depth_of(c, m), r) + -(-n // stride_of(n)) * r * r
    # The tree of the queries, then the lengths of coordinates and values, and the moments of the blocks.
    blocks = choosing = 2 ** depth_of(num_blocks, n)
    filled = -(-n // blocks) * blocks
    count += _halves(n, depth_of(num_blocks, n), r) + -(-m // stride_of(m)) * r * r
    count += places * (e + r) + 2 * filled * (r + 1)
    listed = shortlist_of(t, places, choosing)
    if listed < places:
        # A family of blocks scores all keys once; each of its blocks scores the shortlist.
        families = -(-choosing // FAMILY)
        count += families * FAMILY * ((listed + c) * r + 2 * (r + 1))
        choosing = families
    count += choosing * (places + c) * r
    # The final average over exact keys and groups, and the shares that exact keys take from their groups.
    count += filled * (t + c) * (d + e) + places * (e + 1) + c * d
    return float(count)


def _halves(n: int, depth: int, r: int) -> float:
    """Count the multiply-adds of repeated halving: the directions, and the coordinates along them."""
    count, places = 0.0, -(-n // 2**depth) * 2**depth
    for level in range(depth):
        length = places // 2**level
        sampled = 2**level * -(-length // max(1, min(STRIDE, length // 8)))
        count += places * r + sampled * 2 * r + ROUNDS * (2 * sampled * r + 2**level * r * r)
    return count


def _number(count: Any) -> int:
    if count is None:
        return 64
    return math.prod(count) if isinstance(count, tuple | list) else int(count)
