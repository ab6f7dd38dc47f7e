"""Advise the users of `diagnose`: a call that may do better, and one sentence."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from randattn._core import block_sizes
from randattn._core.library import Array
from randattn._estimators.adaptive_eva import adaptive_eva
from randattn._estimators.registry import Estimator

if TYPE_CHECKING:
    from .diagnose import Diagnosis

# The largest relative error of a call that is advised: with a larger one a model's results are not its own.
_MOST_ERROR = 0.2
# Options that the better call takes over; all others belong to the estimator that is diagnosed.
_SHARED = ("scale", "key_mask", "query_mask", "enable_gqa")


def beside(
    row: Estimator | None, options: dict[str, Any], keys: int
) -> tuple[str, Callable[..., Array]] | None:
    """Return the name of a call that may do better than an estimator, and the call; None without one."""
    # For few keys adaptive_eva is exact attention itself.
    is_best = row is not None and (row.is_exact or row.function is adaptive_eva)
    if is_best or keys <= block_sizes.ADAPTIVE_KEYS:
        return None
    own: dict[str, Any] = {"is_causal": True} if options.get("is_causal", False) else {}
    shared = {name: options[name] for name in _SHARED if name in options}
    name = f"adaptive_eva({', '.join(f'{key}={value!r}' for key, value in own.items())})"
    return name, functools.partial(adaptive_eva, **own, **shared)


def recommendation(found: Diagnosis, keys: int, *, is_exact: bool) -> str:
    """Return one sentence of advice for calls with so many keys."""
    name, error, mean_error = found.estimator, found.relative_error, found.mean_error
    if is_exact:
        return "softmax_attention is exact."
    if not math.isfinite(error):
        return (
            f"{name} has no error relative to exact attention here: "
            "an output is not finite, or exact attention is zero in a layer."
        )
    # The other call must be good by itself, beat mean(V), and have half the error of an estimator that beats
    # mean(V) too.
    is_worse = error >= mean_error > 0
    use, other, is_better = "use softmax_attention", found.alternative_error, False
    if keys <= block_sizes.ADAPTIVE_KEYS:
        use += f"; adaptive_eva pays from {block_sizes.ADAPTIVE_KEYS:,} tokens on"
    elif other is not None and other < min(_MOST_ERROR, mean_error, error / (1 if is_worse else 2)):
        use, is_better = f"use {found.alternative}, which errs by {other:.2g}", True
    if is_worse:
        says = (
            f"{name} would be worse than mean(V) here (relative error {error:.2g} against {mean_error:.2g})"
        )
        return f"{says}: {use}."
    says = f"{name} errs by {error:.2g} here, where mean(V) errs by {mean_error:.2g}"
    if is_better:
        return f"{says}: {use}."
    if found.relative_standard_error is not None:
        # Mean square error = variance of the draws + square of the bias.
        share = min(1.0, (found.relative_standard_error / error) ** 2) if error else 0.0
        says = f"{says}; {share:.0%} of its mean square comes from the draws, the rest is bias"
    return f"{says}."
