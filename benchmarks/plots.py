"""The documentation's plots of the measured rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from . import sharding
from .baselines import NAMES
from .rows import PRODUCTS, slug

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from matplotlib.axes import Axes

    from .rows import Row

    Group = tuple[str, str]

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = {
    "rfa": "#E69F00",
    "lara weighting=balance": "#56B4E9",
    "lara weighting=optimal": "#0072B2",
    "eva window=64": "#009E73",
    "adaptive_eva": "#D55E00",
    "ra": "#CC79A7",
    "softmax_attention": "#000000",
}
_LABELS = {
    "lara weighting=balance": "lara, balance",
    "lara weighting=optimal": "lara, optimal",
    "eva window=64": "eva, window 64",
}
_LINES = {"numpy": "-", "torch": "--", "jax": "-.", "jax, scan": ":", "cupy": (0, (1, 3))}
_EXACT, _REFERENCE = "#000000", "#6E6E6E"
RC: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(rows: list[Row], folder: Path) -> Iterator[Path]:
    """Draw each plot that has rows, for each device; yield the files."""
    devices: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: NAMES.index(row.case.library)):
        devices.setdefault(row.case.device, []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    # The user's own settings do not count.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        for device, found in devices.items():
            for name, (measure, plot) in _PLOTS.items():
                its = [row for row in found if row.measure == measure]
                if its:
                    path = folder / f"{name}-{slug(device)}.png"
                    plot(its).savefig(path, dpi=130)
                    yield path


def draw_sharding(folder: Path) -> Path:
    """Draw the cost model of a sequence on 1 to 10,000 devices."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sharding.png"
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        _sharding().savefig(path, dpi=130)
    return path


def _sharding() -> Figure:
    """Draw the bytes that a device sends, and its multiply-adds, against devices."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    sends, computes = figure.subplots(1, 2)
    at = sharding.Layout()
    devices = sorted({round(10 ** (exponent / 20)) for exponent in range(81)})
    for label in sharding.LABELS:
        here = [dataclasses.replace(at, devices=number) for number in devices]
        style: dict[str, Any] = {"color": _COLOURS.get(label, _EXACT), "linewidth": 1.8}
        name = _LABELS.get(label, label)
        sent = [sharding.traffic(label, one).sent(one.devices) for one in here]
        # One device sends nothing, and a logarithmic axis has no zero.
        sends.plot(devices[1:], sent[1:], label=name, **style)
        computes.plot(devices, [sharding.operations(label, one) for one in here], **style)
    sends.set_ylabel("bytes that one device sends")
    computes.set_ylabel("multiply-adds of one device")
    sends.set_ylim(bottom=1e4)
    for axes in (sends, computes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("devices")
    figure.suptitle(
        f"A forward pass over {at.tokens:,} tokens, {at.heads} heads of {at.features}, C = {at.groups}, "
        f"float32: a model",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.legend(loc="outside lower center", ncols=len(sharding.LABELS))
    return figure


def _time(rows: list[Row]) -> Figure:
    """Draw time against tokens, a panel for each library and device."""
    groups = _groups(rows)
    figure = Figure(figsize=(max(6.5, 4.2 * len(groups)), 4.8), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    seen: dict[str, Line2D] = {}
    for axes, (group, its) in zip(panels, groups.items(), strict=True):
        _time_panel(axes, its, seen)
        axes.set_title(_name(group))
    panels[0].set_ylabel("time of one call (ms)")
    columns = min(len(seen), 2 * len(groups))
    figure.legend(handles=list(seen.values()), loc="outside lower center", ncols=columns)
    return figure


def _time_panel(axes: Axes, rows: list[Row], seen: dict[str, Line2D]) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.seconds is not None:
            lines.setdefault((row.case.label, row.case.mode), []).append((row.case.tokens, 1e3 * row.seconds))
    for (label, mode), points in lines.items():
        style = _style(label, compiled=mode == "compile")
        axes.plot(*zip(*sorted(points), strict=True), **style)
        # The libraries' exact attentions share one entry: the panel names the library.
        name = _LABELS.get(label, label) if label in _COLOURS or label == PRODUCTS else "exact attention"
        name += ", compiled" if mode == "compile" else ""
        seen.setdefault(name, Line2D([], [], label=name, **style))
    tokens = sorted({row.case.tokens for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / 1024:.0f}k" if n >= 1024 else f"{n:.0f}")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    case = rows[0].case
    axes.set_xlabel(f"tokens; {case.heads} heads of {case.head_dim}, {case.dtype}")


def _style(label: str, *, compiled: bool) -> dict[str, Any]:
    if label in _COLOURS and label != "softmax_attention":
        line = ":" if compiled else "-"
        return {
            "color": _COLOURS[label],
            "linestyle": line,
            "marker": "o",
            "markersize": 4.5,
            "linewidth": 1.6,
        }
    if label == PRODUCTS:
        return {"color": _REFERENCE, "linestyle": (0, (5, 3)), "linewidth": 1.4}
    return {"color": _EXACT, "linestyle": "-", "linewidth": 1.4, "marker": "s", "markersize": 4}


def _products(rows: list[Row]) -> Figure:
    """Draw time over the matrix products alone."""
    return _bars(rows, "time over that of the four matrix products alone", reference=1.0)


def _memory(rows: list[Row]) -> Figure:
    """Draw peak memory of the forward pass over the output's size."""
    linear = [row for row in rows if row.case.features is not None and row.case.passes == "forward"]
    return _bars(linear or rows, "peak memory beyond the inputs, over the output's size", reference=1.0)


def _bars(rows: list[Row], what: str, reference: float) -> Figure:
    """Draw a group of bars for each library, device and mode, a bar for each estimator."""
    groups = _groups(rows, tokens=True)
    height = 1.2 + 0.26 * sum(map(len, groups.values())) + 0.2 * len(groups)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.subplots()
    at, ticks = 0.0, []
    for group, its in groups.items():
        for row in its:
            value = row.ratio or 0.0
            axes.barh(at, value, height=0.85, color=_COLOURS.get(row.case.label, _REFERENCE))
            axes.annotate(
                f"{value:.2f}",
                (value, at),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
            mode = "" if row.case.mode == "eager" else f" ({row.case.mode})"
            ticks.append((at, f"{_name(group)}: {_LABELS.get(row.case.label, row.case.label)}{mode}"))
            at -= 1
        at -= 0.7
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.axvline(reference, color=_REFERENCE, linestyle=(0, (5, 3)), linewidth=1.2, zorder=0.9)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(what)
    return figure


def _peers(rows: list[Row]) -> Figure:
    """Draw the speed over a peer's: right of the line randattn is faster."""
    figure = Figure(figsize=(9.5, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for at, row in enumerate(rows):
        case, speedup = row.case, 1 / (row.ratio or 1.0)
        colour = _COLOURS.get(case.label, _REFERENCE)
        axes.plot([1, speedup], [-at, -at], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot([speedup], [-at], color=colour, marker="o", markersize=7)
        faster = speedup >= 1
        axes.annotate(
            f"{speedup:.3g}",
            (speedup, -at),
            xytext=(8 if faster else -8, 0),
            textcoords="offset points",
            ha="left" if faster else "right",
            va="center",
            fontsize=9,
        )
        name = _LABELS.get(case.label, case.label)
        labels.append(f"{name} ({case.features}) over {row.baseline}: {case.passes}, {case.tokens} tokens")
    axes.set_yticks([-at for at in range(len(rows))], labels, fontsize=9)
    axes.set_ylim(0.3 - len(rows), 0.7)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.axvline(1.0, color=_REFERENCE, linestyle=(0, (5, 3)), linewidth=1.2)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("times as fast")
    return figure


def _streaming(rows: list[Row]) -> Figure:
    """Draw tokens a second and bytes of the state, against the tokens before."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    rate, size = figure.subplots(1, 2)
    seen: dict[str, Line2D] = {}
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.case.label, row.case.library, row.case.mode), []).append(row)
    for (label, library, mode), its in lines.items():
        style = {"color": _COLOURS.get(label, _EXACT), "marker": "o", "markersize": 4.5, "linewidth": 1.6}
        where = f"{library}, scan" if mode == "scan" else library
        pattern = {"linestyle": _LINES[where]}
        tokens = [row.case.tokens for row in its]
        rate.plot(tokens, [1 / (row.seconds or 1.0) for row in its], **style, **pattern)
        name = _LABELS.get(label, label)
        if name not in seen:
            # The state has the same size in every library.
            size.plot(tokens, [row.bytes or 0 for row in its], **style)
            seen[name] = Line2D([], [], label=name, **style)
        seen.setdefault(where, Line2D([], [], label=where, color=_REFERENCE, linewidth=1.6, **pattern))
    case = rows[0].case
    for axes, what in ((rate, "tokens a second"), (size, "bytes of the state")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"tokens before; {case.heads} heads of {case.head_dim}, {case.dtype}")
        axes.set_title(what)
    kinds = sorted(seen, key=lambda name: name in _LINES)
    figure.legend(
        handles=[seen[name] for name in kinds], loc="outside lower center", ncols=len(seen), fontsize=10
    )
    return figure


def _groups(rows: list[Row], *, tokens: bool = False) -> dict[Group, list[Row]]:
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        case = row.case
        where = f"{case.tokens} tokens" if tokens else case.device
        groups.setdefault((case.library, where), []).append(row)
    return groups


def _name(group: Group) -> str:
    return ", ".join(group)


# For each file the measure of its rows, and the function that draws them.
_PLOTS: dict[str, tuple[str, Callable[[list[Row]], Figure]]] = {
    "time": ("growth", _time),
    "products": ("products", _products),
    "memory": ("memory", _memory),
    "peers": ("peers", _peers),
    "streaming": ("streaming", _streaming),
}
