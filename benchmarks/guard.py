"""Check that the estimators have not become slower than the committed results.

Ratios over the matrix products alone are compared, not seconds: among machines of one kind they change
least.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from .rows import Case, Row

    Measure = Callable[[Collection[Case] | None], Iterable[Row]]

LIMIT = 1.25


@dataclass(frozen=True)
class Loss:
    """A row that is slower than the committed one by more than the limit, twice."""

    row: Row
    committed: float

    def __str__(self) -> str:
        case = self.row.case
        return (
            f"{case.library} on {case.device}: {case.label}, {case.tokens} tokens, {case.mode}: "
            f"{self.row.ratio:.3g} times the {self.row.baseline}, committed {self.committed:.3g}"
        )


@dataclass
class Verdict:
    """The result of the comparison; each list is of rows.

    Attributes
    ----------
    losses : list of Loss
    kept : list of Row
        Measured, committed, and not slower.
    new : list of Row
        Measured, without a committed row to compare with.
    gone : list of Row
        Committed, and no longer measured.
    """

    losses: list[Loss] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)
    new: list[Row] = field(default_factory=list)
    gone: list[Row] = field(default_factory=list)


def compare(committed: Iterable[Row], measured: Iterable[Row], limit: float = LIMIT) -> Verdict:
    """Match rows by identity and compare their ratios."""
    before = {row.identity: row for row in committed if row.measure == "products"}
    verdict = Verdict()
    for row in measured:
        known = before.pop(row.identity, None)
        if known is None or known.ratio is None or row.ratio is None:
            verdict.new.append(row)
        elif row.ratio > limit * known.ratio:
            verdict.losses.append(Loss(row, known.ratio))
        else:
            verdict.kept.append(row)
    verdict.gone.extend(before.values())
    return verdict


def judge(committed: Iterable[Row], measure: Measure, limit: float = LIMIT) -> Verdict:
    """Compare, and measure failed rows once more before they count: machines are noisy.

    Parameters
    ----------
    committed : rows
    measure : callable
        Takes the cases to measure, or None for all; gives rows.
    limit : float
        The ratio of ratios above which a row fails.

    Returns
    -------
    Verdict
    """
    committed = list(committed)
    verdict = compare(committed, measure(None), limit)
    if not verdict.losses:
        return verdict
    first = {loss.row.identity: loss for loss in verdict.losses}
    again = compare(committed, measure({loss.row.case for loss in verdict.losses}), limit)
    losses = []
    for loss in again.losses:
        better = min(loss.row, first[loss.row.identity].row, key=lambda row: row.ratio or 0.0)
        losses.append(replace(loss, row=better))
    return Verdict(losses, verdict.kept + again.kept, verdict.new, verdict.gone)
