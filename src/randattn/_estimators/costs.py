"""Count the multiply-adds of one head of each estimator: matrix products and weighted sums.

Each formula takes N, M, D, E and a dict of all options of the estimator.
"""

from __future__ import annotations

import math
from typing import Any

from .adaptive_eva_options import number_of_choosers, resolved


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
    """Count the multiply-adds of adaptive EVA without exact heads, including those that choose keys."""
    names = ("num_exact", "group_size", "block_size")
    found = resolved(n, m, 1, exact_heads=None, is_causal=False, **{name: options[name] for name in names})
    if found is None:
        return softmax(n, m, d, e, options)
    # The distances of the values from their mean.
    count, terms = float(m * e), found.exact_of(m) + -(-m // found.group_size)
    whole, rest = divmod(n, found.block_size)
    for blocks, queries in ((whole, found.block_size), (1, rest)):
        if queries:
            # The logits of the choosers, then the average over exact keys and groups.
            count += blocks * (number_of_choosers(queries) * m * d + queries * terms * (d + e))
    return count


def _number(count: Any) -> int:
    if count is None:
        return 64
    return math.prod(count) if isinstance(count, tuple | list) else int(count)
