"""The plot of `fidelity`: errors and embeddings against multiply-adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from .fidelity import MEAN, MODEL, SAMPLE, TRUE_TOP
from .plots import RC

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from .fidelity import Point

_COLOURS = {
    "rfa": "#E69F00",
    "lara": "#0072B2",
    "eva as published": "#56B4E9",
    "eva": "#009E73",
    "adaptive_eva": "#D55E00",
}
_TITLES = {SAMPLE: "The embedded sample", MODEL: "A sentence encoder, 7 texts"}


def draw_fidelity(points: list[Point], folder: Path) -> Path:
    """Draw a panel for each kind of inputs, and one of embeddings where a model was run."""
    panels: list[tuple[str, str]] = [(SAMPLE, "error")]
    if any(point.inputs == MODEL for point in points):
        panels += [(MODEL, "error"), (MODEL, "similarity")]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(4.6 * len(panels), 4.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for at, (inputs, what) in zip(axes, panels, strict=True):
            _panel(at, [point for point in points if point.inputs == inputs], what)
            at.set_title(_TITLES[inputs] if what == "error" else "Its embeddings")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "fidelity.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _panel(axes: Axes, points: list[Point], what: str) -> None:
    def height(point: Point) -> float:
        return point.error if what == "error" else 1 - (point.similarity or 0.0)

    for curve, colour in _COLOURS.items():
        own = [point for point in points if point.curve == curve and point.share is not None]
        along = [point.share or 0.0 for point in own]
        axes.plot(along, list(map(height, own)), marker="o", markersize=4, color=colour, label=curve)
    (mean,) = (point for point in points if point.curve == MEAN)
    axes.axhline(
        height(mean), color="#6E6E6E", linestyle="--", linewidth=1.2, label="mean(V), the trivial answer"
    )
    tops = [point for point in points if point.curve == TRUE_TOP]
    shares = [float(point.options.split()[0]) for point in tops]
    label = "each query's true top keys alone"
    axes.plot(shares, list(map(height, tops)), color="#000000", linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [0.0625, 0.125, 0.25, 0.5, 1]
    axes.set_xticks(ticks, ["1/16", "1/8", "1/4", "1/2", "1"])
    axes.set_xlabel("multiply-adds, of exact attention's")
    axes.set_ylabel("relative error" if what == "error" else "1 - cosine similarity")
