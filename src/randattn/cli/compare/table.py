"""Print the report as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from randattn.cli.terminal import console, table

from .measure import Report, Row
from .plan import EXACT

if TYPE_CHECKING:
    from rich.table import Table

# Number of lengths in the table of times: the longest one, and shorter ones in even steps.
_LENGTHS_SHOWN = 3
# Load per core, the average of a minute, above which a warning is printed. An installation of the library
# just before the command stays below it.
_BUSY = 0.75


def print_tables(report: Report) -> None:
    """Print errors, times and agreement, then time against length, with notes on the columns."""
    out = console()
    out.print(_rows(report))
    estimators = {row.estimator for row in report.rows}
    notes = [
        f"mean(V), the same for all queries, errs by {_error(report.mean_v_error)}: larger errors are worse.",
        "speedup: over softmax of the same library. vs numpy: largest difference with the same seed.",
    ]
    if "eva" in estimators and report.shapes["q"][-2] == report.shapes["k"][-2]:
        notes.append("eva: beside its groups it attends to a window of 64 tokens exactly.")
    if "adaptive_eva" in estimators:
        notes.append("adaptive_eva: samples are the keys that a block of queries computes exactly.")
    if "ra" in estimators:
        notes.append("ra: rounding can draw another key than on NumPy, which changes one output.")
    if (report.load_per_core or 0) > _BUSY:
        notes.append(
            f"The machine was busy before (load {report.load_per_core:.1f} per core): times may mislead."
        )
    if report.disturbed:
        notes.append("Times vary widely from round to round, also when repeated, of")
        notes.append(f"{', '.join(report.disturbed)}: measure again on an idle machine.")
    out.print("\n" + "\n".join(notes), markup=False)
    if report.lengths:
        out.print()
        out.print(_lengths(report))
        out.print("\nIn brackets: speedup over softmax. -: not measured, too slow or no time left.")


def _rows(report: Report) -> Table:
    q, k = report.shapes["q"], report.shapes["k"]
    size = " x ".join(map(str, q)) + ("" if q[-2] == k[-2] else f", {k[-2]} keys")
    seeds = "1 seed" if report.seeds == 1 else f"mean of {report.seeds} seeds"
    errors = ("samples", "error", "mean(V)")
    rows = table(f"{report.input}, {size}, {seeds}", "library", "estimator", numbers=errors)
    rows.add_column("")
    for header in ("time", "speedup", "vs numpy"):
        rows.add_column(header, justify="right")
    for row in report.rows:
        rows.add_row(
            row.backend,
            row.estimator,
            "-" if row.samples is None else str(row.samples),
            _error(row.relative_error),
            _error(report.mean_v_error),
            _verdict(row, report.mean_v_error),
            _time(row.seconds),
            f"{row.speedup:.2f}x",
            _error(row.max_abs_diff),
        )
        rows.rows[-1].end_section = _is_last(row, report.rows)
    return rows


def _lengths(report: Report) -> Table:
    measured = sorted({each.length for each in report.lengths})
    shown = measured[:: -max(1, len(measured) // _LENGTHS_SHOWN)][:_LENGTHS_SHOWN][::-1]
    times = {
        (each.backend, each.estimator, each.samples, each.length): each.seconds for each in report.lengths
    }
    rows = table("Time for one head, by tokens", "library", "estimator", numbers=map(str, shown))
    lines = list(dict.fromkeys((each.backend, each.estimator, each.samples) for each in report.lengths))
    for line in sorted(lines, key=lambda line: list(report.libraries).index(line[0])):
        cells = []
        for length in shown:
            seconds, exact = times.get((*line, length)), times.get((line[0], *EXACT, length))
            speedup = "" if seconds is None or exact is None else f" ({exact / seconds:.1f}x)"
            cells.append("-" if seconds is None else _time(seconds) + speedup)
        backend, estimator, samples = line
        rows.add_row(backend, f"{estimator} {samples or ''}", *cells)
    return rows


def _is_last(row: Row, rows: Iterable[Row]) -> bool:
    return row is [each for each in rows if each.backend == row.backend][-1]


def _error(error: float | None) -> str:
    if error is None:
        return "not finite"
    return f"{error:.3f}" if error >= 0.001 else f"{error:.0e}" if error else "0"


def _verdict(row: Row, mean_v_error: float) -> Text:
    if row.relative_error is None or row.relative_error > mean_v_error:
        return Text("worse", style="bold red")
    return Text("exact" if row.estimator == EXACT.estimator else "")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
