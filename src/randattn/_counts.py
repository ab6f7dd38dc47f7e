"""What an estimator costs: the multiply-adds of its matrix products and weighted sums."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from ._checks import check_count
from ._eva import eva
from ._eva_choice import FAMILY, default_blocks, depth_of, keys_of, list_of, rank_of
from ._lara import lara
from ._ra import ra
from ._rfa import rfa
from ._shown import shown
from ._softmax import softmax_attention
from ._tree import ROUNDS, STRIDE, stride_of

if TYPE_CHECKING:
    from collections.abc import Callable


def multiply_adds(
    estimator: Callable[..., Any],
    n: int,
    m: int,
    d: int,
    e: int,
    /,
    **options: Any,
) -> int:
    """Count the multiply-adds of one head.

    Parameters
    ----------
    estimator : function
        `softmax_attention`, `rfa`, `ra`, `lara` or `eva`.
    n : int
        Queries N.
    m : int
        Keys M.
    d : int
        Features D of queries and keys.
    e : int
        Features E of values.
    **options
        As for the estimator. Arrays may be left out.

    Returns
    -------
    int
        Multiply-adds of products of matrices and of weighted sums, those that choose groups and keys
        included. Exponentials, comparisons, sorts and sums without weights are not.

    Raises
    ------
    TypeError
        Another function, or an option that it does not have.
    ValueError
        A count that is not positive.
    NotImplementedError
        ``is_causal=True``.

    Notes
    -----
    Exact attention takes ``N M (D + E)``. Blocks count as large as they are when filled up.

    Examples
    --------
    >>> from randattn import eva, multiply_adds, softmax_attention
    >>> whole = multiply_adds(softmax_attention, 4096, 4096, 64, 64)
    >>> whole
    2147483648
    >>> round(multiply_adds(eva, 4096, 4096, 64, 64, groups="tree", exact="top") / whole, 3)
    0.151
    """
    counts: dict[Any, Callable[..., float]] = {
        softmax_attention: _softmax,
        rfa: _rfa,
        ra: _ra,
        lara: _lara,
        eva: _eva,
    }
    if estimator not in counts:
        raise TypeError(
            f"estimator: expected one of {', '.join(f.__name__ for f in counts)}, got {shown(estimator)}"
        )
    sizes = [check_count(name, size) for name, size in zip("nmde", (n, m, d, e), strict=True)]
    known = inspect.signature(estimator).parameters
    for name in options:
        if name not in known or known[name].kind is not inspect.Parameter.KEYWORD_ONLY:
            raise TypeError(f"{estimator.__name__} has no option {shown(name)}")
    if options.get("is_causal"):
        raise NotImplementedError("is_causal: causal calls are not counted")
    filled = {
        name: known[name].default for name in known if known[name].kind is inspect.Parameter.KEYWORD_ONLY
    }
    return math.ceil(counts[estimator](*sizes, {**filled, **options}))


def _softmax(n: int, m: int, d: int, e: int, _: Any) -> float:
    return n * m * (d + e)


def _rfa(n: int, m: int, d: int, e: int, options: Any) -> float:
    s = options["num_samples"] or 64
    if options["features"] == "trigonometric":
        return s * (n + m) * (d + 2 * e) + 2 * s * n + m * d
    # The optimal features' mean |q + k|^2, and their weights.
    more = (n + m + s + 1) * d if options["features"] == "optimal" else 0
    return s * (n + m) * (d + e) + m * d + more


def _ra(n: int, m: int, d: int, e: int, options: Any) -> float:
    samples = options["num_samples"] or 1
    # Logits to draw by, the keys drawn by a product, and exact attention at each draw.
    return n * m * d + samples * n * m * (2 * d + e) + m * d


def _lara(n: int, m: int, d: int, e: int, options: Any) -> float:
    c = min(_number(options["num_landmarks"]), m)
    copies = 2 if options["antithetic"] else 1
    count = copies * c * (n + m) * (d + e) + m * d + 2 * copies**2 * c * c * d
    if options["weighting"] == "optimal":
        # Towards the landmarks, for the weights and for what makes them add up to one.
        count += (1 + (options["normalize"] != "landmarks")) * n * c * d
    return count + 2 * c * c * d * bool(options["mix_keys"])


def _eva(n: int, m: int, d: int, e: int, options: Any) -> float:
    groups, exact = options["groups"], options["exact"]
    exact = (exact,) if isinstance(exact, str) else exact
    size = options["group_size"]
    c = min(_number(options["num_groups"]), m) if size is None else -(-m // _number(size))
    w = _number(options["window"]) if "window" in exact else 0
    if (
        isinstance(groups, str)
        and groups == "segments"
        and "top" not in exact
        and not options["second_order"]
    ):
        near = n * min(w, m) * (d + e)
        return near + n * c * (d + e) + m * (2 * d + e)
    by_tree = isinstance(groups, str) and groups == "tree"
    labels = not isinstance(groups, str)
    if by_tree:
        c = 2 ** depth_of(c, m)
    places = -(-m // c) * c if by_tree else m
    r = rank_of(d)
    blocks = options["num_blocks"] or default_blocks(n)
    t = keys_of(options["num_exact"], m, c) if "top" in exact else 0
    count = float(places * d + (places * c if labels else places) * (d + e + 1 + r))
    if options["second_order"]:
        count += places * d * (c if labels else 1) + n * c * d
    if d > r:
        sampled = sum(-(-x // stride_of(x)) for x in (n, m))
        orthonormal = 2 * d * d * r + d * r * r
        count += sampled * d * d + (1 + ROUNDS) * orthonormal + (2 * ROUNDS + 1) * d * d * r + (n + m) * d * r
    if by_tree:
        count += _halves(m, depth_of(c, m), r) + -(-n // stride_of(n)) * r * r
    if w:
        of_blocks = -(-n // w)
        filled = of_blocks * w
        choosing = -(-of_blocks // -(-of_blocks // blocks))
    else:
        of_blocks = choosing = 2 ** depth_of(blocks, n)
        filled = -(-n // of_blocks) * of_blocks
        count += _halves(n, depth_of(blocks, n), r) + -(-m // stride_of(m)) * r * r
    if t:
        count += places * (e + r)
        count += 2 * filled * (r + 1)
        listed = list_of(t, places, choosing)
        if listed < places:
            families = -(-choosing // FAMILY)
            count += families * FAMILY * ((listed + c) * r + 2 * (r + 1))
            choosing = families
        count += choosing * (places + c) * r
    return count + filled * (t + w + c) * (d + e) + places * (e + 1) + c * d


def _halves(n: int, depth: int, r: int) -> float:
    """Of the directions, one coordinate of all, and the coordinates along them."""
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
