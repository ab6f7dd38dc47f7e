"""The estimators, a row for each: the command, `diagnose`, `multiply_adds`, layers, benchmarks, tests and docs read it.

A new estimator is one file and one row. Readers look rows up when they are called, never when they are imported.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from . import costs
from .adaptive_eva import adaptive_eva
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
    """An estimator and the facts of it that its readers need.

    Attributes
    ----------
    function : callable
        The public function; its name is the estimator's.
    cost : callable
        Of N, M, D, E and a dict of all its options, the multiply-adds of one head.
    colour : str
        In plots; of Okabe and Ito's, which the colour-blind can tell apart.
    count : str or None
        The keyword that its draws, landmarks, groups or exact keys are counted by; None where it has none.
    default : int or None
        The count that the command measures where only one is.
    draws : {"never", "optional", "always"}
        Whether it takes an `rng`: not at all; or is deterministic without one; or needs one.
    counts_tokens : bool
        Whether the count is one of tokens, and so at most the number of keys.
    is_linear : bool
        Whether its time grows in proportion to the number of tokens.
    is_causal : bool
        Whether it takes ``is_causal=True``.
    step : callable or None
        The function of the next tokens after a causal call.
    across : mapping
        Options that it needs where the queries are not as many as the keys.
    landmarks : callable or None
        Of `Inputs`, a dict of options and `is_causal`, the pooled queries and keys that its `landmarks` would be.
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
    across: Mapping[str, Any] = field(default_factory=dict)
    landmarks: Callable[[Inputs, Mapping[str, Any], bool], tuple[Array, Array]] | None = None

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.__name__

    @property
    def label(self) -> str:
        """The short name, for tables and options of the command."""
        return self.name.removesuffix("_attention")

    @property
    def is_exact(self) -> bool:
        """Whether it is softmax attention itself."""
        return self.function is softmax_attention

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of the function, with their defaults."""
        found = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in found if one.kind is inspect.Parameter.KEYWORD_ONLY}


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
    ),
)
ESTIMATORS: dict[str, Estimator] = {row.name: row for row in _ROWS}


def row_of(function: Callable[..., Any]) -> Estimator | None:
    """Return the row of a public function; None for every other one."""
    return next((row for row in ESTIMATORS.values() if row.function is function), None)


def by_label() -> dict[str, Estimator]:
    """Return the rows by their short names, in the order of tables."""
    return {row.label: row for row in ESTIMATORS.values()}
