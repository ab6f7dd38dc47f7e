"""The registry of estimators: one row for each, with the facts that its readers need.

The command, `diagnose`, `multiply_adds`, the layers, benchmarks, tests and docs read it. A new estimator is
one file and one row. A module looks a row up when its function is called, not at import; only the command,
whose options list the rows, reads them at import.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from . import costs
from .adaptive_eva import adaptive_eva
from .adaptive_eva_step import adaptive_eva_step
from .eva import eva, eva_landmarks
from .eva_step import eva_step
from .lara import lara, lara_landmarks
from .ra import ra
from .rfa import rfa, rfa_step
from .softmax import softmax_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from randattn._core.inputs import Inputs

    Array = Any


@dataclass(frozen=True)
class Estimator:
    """One estimator, with the facts that readers of the registry need.

    Attributes
    ----------
    function : callable
        The public function. Its name is the name of the estimator.
    cost : callable
        Function of N, M, D, E and a dict of all options; it returns the multiply-adds of one head.
    colour : str
        Colour in plots, from the palette of Okabe and Ito, which colour-blind readers can tell apart.
    count : str or None
        Keyword for the number of draws, landmarks, groups or exact keys; None for an estimator without one.
    default : int or None
        The count that the command uses where it measures a single one.
    draws : {"never", "optional", "always"}
        "never": the function takes no `rng`. "optional": without `rng` it is deterministic. "always": it
        needs `rng`.
    counts_tokens : bool
        True if the count is a number of tokens, and so at most the number of keys.
    is_linear : bool
        True if time grows in proportion to the number of tokens.
    is_causal : bool
        True if the function takes ``is_causal=True``.
    step : callable or None
        The function for the tokens that follow a causal call; None for an estimator without one.
    causal : callable or None
        Function of the count and the number of tokens; it returns the options of a causal call that stand for
        the count. None where the count has its keyword there too.
    across : mapping
        Options that the function needs where N is not M.
    landmarks : callable or None
        Function of `Inputs`, a dict of options and `is_causal`; it returns the pooled queries and keys that
        stand for the option `landmarks` by default.
    """

    function: Callable[..., Any]
    cost: Callable[..., float]
    colour: str
    count: str | None = None
    default: int | None = None
    draws: Literal["never", "optional", "always"] = "never"
    counts_tokens: bool = False
    is_linear: bool = True
    is_causal: bool = False
    step: Callable[..., Any] | None = None
    causal: Callable[[int, int], Mapping[str, Any]] | None = None
    across: Mapping[str, Any] = field(default_factory=dict)
    landmarks: Callable[[Inputs, Mapping[str, Any], bool], tuple[Array, Array]] | None = None

    @property
    def name(self) -> str:
        """Return the name of the function."""
        return self.function.__name__

    @property
    def label(self) -> str:
        """Return the short name, for tables and options of the command."""
        return self.name.removesuffix("_attention")

    @property
    def is_exact(self) -> bool:
        """Tell whether the function is softmax attention itself."""
        return self.function is softmax_attention

    @property
    def options(self) -> dict[str, Any]:
        """Return the keywords of the function, with their defaults."""
        found = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in found if one.kind is inspect.Parameter.KEYWORD_ONLY}


def _groups_of_windows(count: int, tokens: int) -> dict[str, int]:
    """Return causal EVA's options for about so many groups: a power of two, which divides the window."""
    size = 1 << (max(1, tokens // count).bit_length() - 1)
    return {"group_size": size, "window": max(64, size)}


_ROWS = (
    Estimator(softmax_attention, costs.softmax, "#000000", is_linear=False, is_causal=True),
    Estimator(
        rfa,
        costs.rfa,
        "#E69F00",
        count="num_samples",
        default=64,
        draws="always",
        is_causal=True,
        step=rfa_step,
    ),
    # One sample of RA takes twice the multiply-adds of exact attention where D = E: its default is one.
    Estimator(ra, costs.ra, "#CC79A7", count="num_samples", default=1, draws="always", is_linear=False),
    Estimator(
        lara,
        costs.lara,
        "#0072B2",
        count="num_landmarks",
        default=64,
        draws="optional",
        counts_tokens=True,
        is_causal=True,
        landmarks=lara_landmarks,
    ),
    Estimator(
        eva,
        costs.eva,
        "#009E73",
        count="num_groups",
        default=64,
        draws="optional",
        counts_tokens=True,
        is_causal=True,
        step=eva_step,
        causal=_groups_of_windows,
        # A query of another sequence has no window among the keys.
        across={"window": 0},
        landmarks=eva_landmarks,
    ),
    Estimator(
        adaptive_eva,
        costs.adaptive_eva,
        "#D55E00",
        count="num_exact",
        default=64,
        counts_tokens=True,
        is_linear=False,
        is_causal=True,
        step=adaptive_eva_step,
    ),
)
ESTIMATORS: dict[str, Estimator] = {row.name: row for row in _ROWS}


def row_of(function: Callable[..., Any]) -> Estimator | None:
    """Return the row of a public function; None for any other function."""
    return next((row for row in ESTIMATORS.values() if row.function is function), None)


def by_label() -> dict[str, Estimator]:
    """Return the rows by their short names, in the order in which tables list them."""
    return {row.label: row for row in ESTIMATORS.values()}
