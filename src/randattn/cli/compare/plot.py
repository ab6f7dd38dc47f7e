"""Draw the report as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

from randattn._estimators.registry import by_label
from randattn.cli.style import LONGEST_NAME, as_png, settings

from .measure import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"softmax": "softmax (exact)"}
_REFERENCE = "#6E6E6E"


class _Style(NamedTuple):
    line: Any
    marker: str


_STYLES = {
    "numpy": _Style("-", "o"),
    "torch": _Style("--", "s"),
    "jax": _Style(":", "^"),
    "cupy": _Style("-.", "D"),
    "array-api-strict": _Style((0, (6, 1, 1, 1, 1, 1)), "v"),
    "dask": _Style((0, (1, 3)), "P"),
}


def plot(report: Report) -> bytes:
    """Draw error against samples, and time against length, side by side.

    Parameters
    ----------
    report : Report
        The measurements.

    Returns
    -------
    bytes
        A PNG file.
    """
    with settings():
        figure = Figure(figsize=(12, 5.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        _errors(left, report)
        _times(right, report)
        _legends(figure, report)
        return as_png(figure)


def _errors(axes: Axes, report: Report) -> None:
    # The errors of libraries agree, and their points would hide each other: they are shifted by 11 % each.
    libraries = list(report.libraries)
    aside = {name: 1.11 ** (i - (len(libraries) - 1) / 2) for i, name in enumerate(libraries)}
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    errors, counts = [report.mean_v_error], set()
    for row in report.rows:
        if row.samples is not None and row.relative_error is not None:
            point = (row.samples * aside[row.backend], row.relative_error)
            lines.setdefault((row.backend, row.estimator), []).append(point)
            errors.append(row.relative_error)
            counts.add(row.samples)
    samples = sorted(counts)

    seeds = "1 seed" if report.seeds == 1 else f"mean of {report.seeds} seeds"
    axes.set_title(f"Error: {report.input[-LONGEST_NAME:]}, {seeds}")
    axes.set(xlabel="samples, landmarks or groups", ylabel="relative error")
    axes.set_xscale("log", base=2)
    if samples:
        axes.set_xlim(samples[0] / 1.5, samples[-1] * 1.5)
    _whole_numbers(axes, samples)
    # A linear axis from zero, unless the smallest error would vanish in it; a logarithmic axis has no zero.
    if 0 < min(errors) < max(errors) / 30:
        _logarithmic(axes)
    else:
        axes.set_ylim(0, 1.12 * max(errors) or 1)
    _lines(axes, lines)
    axes.axhline(report.mean_v_error, color=_REFERENCE, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    axes.annotate(
        f"mean(V)\n{report.mean_v_error:.3g}",
        (1.01, report.mean_v_error),
        xycoords=("axes fraction", "data"),
        va="center",
        color=_REFERENCE,
    )


def _times(axes: Axes, report: Report) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in report.lengths:
        point = (each.length, 1e3 * each.seconds)
        lines.setdefault((each.backend, each.estimator), []).append(point)
    counts = {each.estimator: each.samples for each in report.lengths if each.samples is not None}
    samples = ", ".join(f"{name} {count}" for name, count in counts.items())
    axes.set_title("Time of one call on one head")
    axes.set_xlabel("length (tokens)" + (f"\nsamples: {samples}" if samples else ""))
    axes.set_ylabel("time (ms)")
    axes.set_xscale("log", base=2)
    _logarithmic(axes)
    _whole_numbers(axes, sorted({each.length for each in report.lengths}))
    _lines(axes, lines)
    if not lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _lines(axes: Axes, lines: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    for (backend, estimator), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), color=by_label()[estimator].colour, **_look(backend))


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain())


class _Plain(LogFormatter):
    """The labels of Matplotlib's logarithmic axis in plain form: 20 for 2 x 10^1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _whole_numbers(axes: Axes, values: Iterable[int]) -> None:
    """Put a tick at each of the values."""
    axes.set_xticks(list(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _legends(figure: Figure, report: Report) -> None:
    """Add the legends: colours for estimators, lines and markers for libraries."""
    estimators = [
        Line2D([], [], color=by_label()[name].colour, linewidth=3, label=_LABELS.get(name, name))
        for name in dict.fromkeys(row.estimator for row in report.rows)
    ]
    libraries = [
        Line2D([], [], color=_REFERENCE, **_look(name), label=f"{name} {about['version']}, {about['device']}")
        for name, about in report.libraries.items()
    ]
    figure.legend(handles=libraries, loc="outside upper center", ncols=3)
    figure.legend(handles=estimators, loc="outside lower center", ncols=len(estimators))


def _look(backend: str) -> dict[str, Any]:
    line, marker = _STYLES[backend]
    return {
        "linestyle": line,
        "linewidth": 1.6,
        "marker": marker,
        "markersize": 6.5,
        "markerfacecolor": "white",
        "markeredgewidth": 1.4,
    }
