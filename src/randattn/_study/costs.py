"""Count the multiply-adds of an estimator, by the formula in its row of the registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from randattn._core.checks import as_count
from randattn._core.describe import shown
from randattn._estimators.registry import ESTIMATORS, row_of


def multiply_adds(estimator: Callable[..., Any], n: int, m: int, d: int, e: int, /, **options: Any) -> int:
    """Count the multiply-adds of one head.

    Parameters
    ----------
    estimator : function
        `softmax_attention`, `rfa`, `ra`, `lara`, `eva` or `adaptive_eva`.
    n : int
        Number N of queries.
    m : int
        Number M of keys.
    d : int
        Number D of features of queries and keys.
    e : int
        Number E of features of values.
    **options
        Options of the estimator. Arrays may be left out.

    Returns
    -------
    int
        Multiply-adds of matrix products and weighted sums, including those that choose groups and keys.
        Exponentials, comparisons, sorts and unweighted sums are not counted.

    Raises
    ------
    TypeError
        A function that is no estimator, or an option that the estimator does not have.
    ValueError
        A count that is not positive.
    NotImplementedError
        ``is_causal=True``.

    Notes
    -----
    Exact attention takes ``N M (D + E)``. `adaptive_eva` is counted without exact heads.

    Examples
    --------
    >>> from randattn import adaptive_eva, multiply_adds, softmax_attention
    >>> whole = multiply_adds(softmax_attention, 16384, 16384, 64, 64)
    >>> whole
    34359738368
    >>> round(multiply_adds(adaptive_eva, 16384, 16384, 64, 64) / whole, 3)
    0.203
    """
    row = row_of(estimator)
    if row is None:
        raise TypeError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {shown(estimator)}")
    sizes = [as_count(name, size) for name, size in zip("nmde", (n, m, d, e), strict=True)]
    for name in options:
        if name not in row.options:
            raise TypeError(f"{row.name} has no option {shown(name)}")
    if options.get("is_causal"):
        raise NotImplementedError("is_causal: causal calls are not counted")
    return math.ceil(row.cost(*sizes, {**row.options, **options}))
