"""The plots of the papers' experiments, with error bars over seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.plots import RC

from .figures import INPUTS, MEAN, PICTURES
from .language import KINDS
from .results import Results, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from matplotlib.axes import Axes

    from .runs import Done

# Okabe and Ito's colours, which the colour-blind can tell apart; the estimators' own in the other plots.
_COLOURS = {
    "softmax": "#000000",
    "rfa": "#E69F00",
    "ra": "#CC79A7",
    "lara": "#0072B2",
    "eva": "#009E73",
    MEAN: "#6E6E6E",
}
_ESTIMATES = ("rfa", "ra", "lara", "eva")
_BARS: dict[str, Any] = {"capsize": 3, "elinewidth": 1, "markersize": 4}


def draw(experiment: str, done: list[Done], path: Path) -> None:
    """Draw one experiment's plot."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        _PLOTS[experiment](Results(done)).savefig(path, dpi=110, metadata={"Software": None})


def _figures(results: Results) -> Figure:
    figure = Figure(figsize=(9.2, 14), layout="constrained")
    *rows, costs = figure.subplots(len(INPUTS) + 1, 2)
    errors, lengths = zip(*rows, strict=True)
    for axes, inputs in zip(errors, INPUTS, strict=True):
        for method in _ESTIMATES:
            _curve(axes, method, results.against_samples(method, inputs))
        trivial = results.trivial(inputs)
        axes.axhline(trivial.mean, color=_COLOURS[MEAN], linestyle="--", linewidth=1.2, label=MEAN)
        title = f"{inputs} inputs, {results.tokens(inputs)} tokens"
        if inputs == PICTURES:
            title += f" (accuracy {results.accuracy().mean:.2f})"
        axes.set_title(title)
        axes.set_xlabel("samples, landmarks, or groups and window")
    for axes, inputs in zip(lengths, INPUTS, strict=True):
        for method in _ESTIMATES:
            _curve(axes, method, results.against_length(method, inputs))
        _curve(axes, MEAN, results.against_length(MEAN, inputs), linestyle="--", marker="")
        axes.set_title(f"{inputs} inputs, {results.setting('samples_of_lengths')} samples (ra: 1)")
        axes.set_xlabel("tokens")
    for axes in (*errors, *lengths):
        axes.set_ylabel("relative error")
    for axes, (name, unit, by) in zip(
        costs, (("seconds", "milliseconds", 1e3), ("bytes", "MiB", 2**-20)), strict=True
    ):
        for method in ("softmax", *_ESTIMATES):
            curve = results.cost(method, name)
            scaled = {at: Value(by * one.mean, by * one.half, one.number) for at, one in curve.items()}
            _curve(axes, method, scaled)
        axes.set_title(
            f"{'time' if name == 'seconds' else 'peak memory'}, {results.setting('heads')} heads, "
            f"d = {results.setting('features')}"
        )
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
    for axes in (*errors, *lengths, *costs):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    handles = {
        label: handle
        for axes in (costs[0], errors[0])
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    return figure


def _curve(axes: Axes, method: str, curve: dict[int, Value], **style: Any) -> None:
    style = {"marker": "o", **style}
    # An interval that reaches below zero has no lower end on a logarithmic axis.
    below = [min(one.half, 0.99 * one.mean) for one in curve.values()]
    above = [one.half for one in curve.values()]
    axes.errorbar(
        list(curve),
        [one.mean for one in curve.values()],
        yerr=[below, above],
        color=_COLOURS[method],
        label=method,
        **_BARS,
        **style,
    )


def _trained(
    results: Results,
    experiment: str,
    panels: Iterable[tuple[str, str, str]],
    methods: Iterable[str],
    label: str,
) -> Figure:
    """Draw a panel for each library or number, a point for each mechanism."""
    panels, methods = list(panels), list(methods)
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    # One number of several libraries has one axis, so that the libraries can be compared.
    share = len({name for _, name, _ in panels}) == 1
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=share)[0]
    for axes, (library, name, title) in zip(all_axes, panels, strict=True):
        for at, method in enumerate(methods):
            value = results.trained(experiment, method, name, library)
            axes.errorbar(at, value.mean, yerr=value.half, color=_COLOURS[method], marker="o", **_BARS)
        axes.set_xticks(range(len(methods)), methods)
        axes.set_xlim(-0.5, len(methods) - 0.5)
        axes.set_title(title)
        axes.set_ylabel(label)
    return figure


def _digits(results: Results) -> Figure:
    panels = (("torch", "accuracy", "PyTorch"), ("jax", "accuracy", "JAX"))
    return _trained(results, "digits", panels, ("softmax", *_ESTIMATES), "accuracy, 360 digits")


def _translation(results: Results) -> Figure:
    panels = (("torch", "bleu", "English to German, the encoder's attention"),)
    return _trained(results, "translation", panels, ("softmax", *_ESTIMATES), "BLEU")


def _language(results: Results) -> Figure:
    panels = tuple(("torch", kind, f"Python's {kind}") for kind in KINDS)
    return _trained(results, "language", panels, ("softmax", "rfa", "eva"), "bits per byte")


_PLOTS: dict[str, Callable[[Results], Figure]] = {
    "figures": _figures,
    "digits": _digits,
    "translation": _translation,
    "language": _language,
}
