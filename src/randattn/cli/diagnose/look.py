"""Diagnose each estimator of the registry on the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from randattn import Diagnosis, diagnose
from randattn._estimators.registry import by_label
from randattn.cli.compare.measure import Advance, truth
from randattn.cli.compare.plan import options_of, usable
from randattn.cli.files import Arrays

# Quantiles over queries, as figures of a report.
QUANTILES = (0.05, 0.5, 0.95)
# Bins of a histogram from 0 to 1; in the terminal each is one character.
BINS = 16


def labels() -> list[str]:
    """Return the short names of all estimators but exact attention."""
    return [label for label, row in by_label().items() if not row.is_exact]


@dataclass(frozen=True)
class Look:
    """The figures of one diagnosis; None for a figure that was not computed.

    Attributes
    ----------
    estimator : str
        Short name of the estimator.
    samples : int
        Number of draws, landmarks, groups or exact keys.
    relative_error, mean_error : float
        Relative errors of the estimator and of mean(V).
    relative_standard_error : float or None
        Relative standard error of one call.
    effective_samples, largest_weight : tuple of float, or None
        Quantiles over queries at 5 %, 50 % and 95 %.
    num_weights : float or None
        Median over queries of the number of weights.
    histogram : list of int, or None
        Numbers of queries by effective samples over weights, in equal bins from 0 to 1.
    recommendation : str
        One sentence of advice.
    """

    estimator: str
    samples: int
    relative_error: float
    mean_error: float
    relative_standard_error: float | None
    effective_samples: tuple[float, ...] | None
    largest_weight: tuple[float, ...] | None
    num_weights: float | None
    histogram: list[int] | None
    recommendation: str


@dataclass(frozen=True)
class Looks:
    """The figures of all diagnoses, and of exact attention.

    Attributes
    ----------
    input : str
        Name of the input.
    shapes : dict
        Shapes of q, k and v.
    queries : int
        Number of queries of each head that are compared with exact attention.
    entropy : tuple of float
        Quantiles of the entropy of their exact rows, in nats, at 5 %, 50 % and 95 %.
    looks : list of Look
        Figures of each estimator.
    diagnoses : dict of Diagnosis
        Diagnosis of each estimator, for pictures.
    exact : array, shape (N, M), or None
        Exact attention matrix of the first head, for pictures.
    """

    input: str
    shapes: dict[str, list[int]]
    queries: int
    entropy: tuple[float, ...]
    looks: list[Look]
    diagnoses: dict[str, Diagnosis]
    exact: np.ndarray | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON, without the arrays for pictures."""
        own = {name: getattr(self, name) for name in ("input", "shapes", "queries", "entropy")}
        return {**own, "looks": [asdict(look) for look in self.looks]}


def look(
    inputs: Arrays,
    estimators: Sequence[str],
    *,
    samples: int | None,
    seed: int,
    replicates: int,
    advance: Advance,
) -> Looks:
    """Diagnose each estimator.

    Parameters
    ----------
    inputs : Arrays
        The queries, keys and values.
    estimators : sequence of str
        Short names of estimators in the registry.
    samples : int or None
        Number of draws, landmarks, groups or exact keys; None for the default of each row of the registry.
    seed, replicates : int
        Seed of the draws, and number of calls with draws of their own.
    advance : callable
        Function that is called with the number of steps done, the number of all steps, and the next step.

    Returns
    -------
    Looks
        The figures of all diagnoses.
    """
    # `truth` refuses inputs for which exact attention overflows or is zero: no error would be finite.
    truth(inputs)
    arrays, estimators = (inputs.q, inputs.k, inputs.v), usable(estimators, inputs)
    found: dict[str, Diagnosis] = {}
    looks = []
    for number, name in enumerate(estimators):
        advance(number, len(estimators), name)
        row = by_label()[name]
        count = row.default if samples is None else samples
        options = options_of(row, count, seed, inputs)
        # An estimator may overflow on such inputs: the figure says so, NumPy's warnings would only repeat it.
        with np.errstate(all="ignore"):
            found[name] = diagnose(
                row.function, *arrays, scale=inputs.scale, num_replicates=replicates, **inputs.mask, **options
            )
        looks.append(_look(name, count or 0, found[name]))
    advance(len(estimators), len(estimators), "")
    (first, *_) = found.values()
    return Looks(
        inputs.name,
        {"q": list(inputs.q.shape), "k": list(inputs.k.shape), "v": list(inputs.v.shape)},
        len(first.queries),
        _quantiles(first.entropy),
        looks,
        found,
        None if first.rows is None else _exact(inputs),
    )


def _look(name: str, samples: int, found: Diagnosis) -> Look:
    effective, number = found.effective_samples, found.num_weights
    return Look(
        name,
        samples,
        found.relative_error,
        found.mean_error,
        found.relative_standard_error,
        None if effective is None else _quantiles(effective),
        None if found.largest_weight is None else _quantiles(found.largest_weight),
        None if number is None else float(np.median(number)),
        None
        if effective is None or number is None
        else np.histogram(np.clip(effective / number, 0, 1), bins=BINS, range=(0, 1))[0].tolist(),
        found.recommendation,
    )


def _quantiles(x: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(x, QUANTILES))


def _exact(inputs: Arrays) -> np.ndarray:
    """Return the exact attention matrix of the first head."""
    q, k = (x.reshape(-1, *x.shape[-2:])[0].astype(np.float64) for x in (inputs.q, inputs.k))
    logits = inputs.scale * q @ k.T
    if inputs.is_causal:
        logits = np.where(np.tri(*logits.shape, dtype=np.bool_), logits, -np.inf)
    if inputs.key_mask is not None:
        logits = np.where(inputs.key_mask.reshape(-1, logits.shape[-1])[0], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    rows: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return rows
