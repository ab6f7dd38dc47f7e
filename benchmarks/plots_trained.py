"""The plot of `perplexity`: what each attention costs a language model, and the errors of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from .layers import AFTER, BEFORE
from .plots import RC

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from .layers import LayerError
    from .trained import Perplexity

_COLOURS = {
    AFTER: "#D55E00",
    BEFORE: "#E69F00",
    "eva": "#009E73",
    "lara": "#0072B2",
    "rfa": "#CC79A7",
    "first 4 and last 128 keys": "#56B4E9",
    "true top 64 keys": "#000000",
}
_MARKERS = {2048: "o", 8192: "s"}


def draw_perplexity(rows: list[Perplexity], layers: list[LayerError], folder: Path) -> Path:
    """Draw perplexity against time, and the errors of each layer of the first text."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _against_time(left, [row for row in rows if row.attention in _COLOURS])
        _of_layers(right, [row for row in layers if row.text == layers[0].text])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "perplexity.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def log_scales(axes: Axes, times: Sequence[float]) -> None:
    """Scale both axes by logarithms, with these ticks of time over exact attention and a line at one."""
    axes.axvline(1, color="#6E6E6E", linewidth=1.2, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(times, list(map(str, times)))
    axes.set_xticks([], minor=True)


def _against_time(axes: Axes, rows: list[Perplexity]) -> None:
    for row in rows:
        percent, colour = 100 * row.over_exact, _COLOURS[row.attention]
        axes.plot(
            row.time, percent, _MARKERS[row.tokens], color=colour, markersize=7, markeredgecolor="white"
        )
    for name, colour in _COLOURS.items():
        axes.plot([], [], "o", color=colour, label=name)
    for tokens, marker in _MARKERS.items():
        axes.plot([], [], marker, color="#6E6E6E", label=f"{tokens:,} tokens")
    log_scales(axes, (0.3, 0.5, 1, 2, 5, 10))
    axes.set_xlabel("time of all attention, over PyTorch's exact kernel")
    axes.set_ylabel("perplexity above exact attention's (%)")
    axes.set_title("All 30 layers replaced, two texts")
    axes.legend(loc="upper left", fontsize=9)


def _of_layers(axes: Axes, layers: list[LayerError]) -> None:
    for attention, label in ((BEFORE, "without exact heads"), (AFTER, "a quarter of the heads exact")):
        own = [row for row in layers if row.attention == attention]
        numbers, colour = [row.layer for row in own], _COLOURS[attention]
        axes.plot(numbers, [row.worst for row in own], "--", color=colour, label=f"worst head, {label}")
        axes.plot(
            numbers, [row.mean for row in own], color=colour, linewidth=2.2, label=f"mean head, {label}"
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Errors of each layer: {layers[0].tokens:,} tokens, {layers[0].text}")
    axes.legend(loc="upper left", fontsize=9)
