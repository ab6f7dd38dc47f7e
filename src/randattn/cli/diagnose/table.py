"""Print the diagnoses as a table, with advice."""

from __future__ import annotations

import math

from rich.text import Text

from randattn.cli.terminal import console, table

from .look import Looks

# One character for each eighth of the height of a bar, and those of a terminal without block elements.
_BARS, _PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


def print_looks(found: Looks) -> None:
    """Print errors and weights, notes on the columns, and one sentence of advice for each estimator."""
    out = console()
    q, keys = found.shapes["q"], found.shapes["k"][-2]
    numbers = ("samples", "error", "standard error", "effective", "largest weight")
    rows = table(f"{found.input}, {' x '.join(map(str, q))}", "estimator", numbers=numbers)
    rows.add_column("share, 0 to 1", no_wrap=True)
    bars = _BARS if _is_shown(_BARS, out.encoding) else _PLAIN_BARS
    for each in found.looks:
        rows.add_row(
            each.estimator,
            str(each.samples),
            Text(f"{each.relative_error:.3f}", style="bold red" * (each.relative_error >= each.mean_error)),
            _number(each.relative_standard_error),
            "-"
            if each.effective_samples is None or each.num_weights is None
            else f"{each.effective_samples[1]:.1f}/{each.num_weights:.0f}",
            "-" if each.largest_weight is None else f"{each.largest_weight[1]:.2f}",
            "-" if each.histogram is None else _bars(each.histogram, bars),
        )
    out.print(rows)
    low, half, high = (math.exp(value) for value in found.entropy)
    notes = (
        "",
        "error: of a layer, relative to exact attention. mean(V), the same for all",
        f"queries, errs by {found.looks[0].mean_error:.3f}: larger errors are worse, and red.",
        "standard error: deviation of one call over replicates with draws of their own,",
        "without the bias.",
        "effective: Kish's effective sample size of a query's self-normalized weights, of",
        "the number of weights: those of draws, in eva and adaptive_eva those of keys and",
        "groups. effective and largest weight are medians over queries.",
        "share: the bars count queries by effective over the number of weights.",
        "-: the estimator has no self-normalized weights, or draws nothing.",
        f"Rows of exact attention have the entropy of {half:.3g} equal keys of {keys} (median;",
        f"5 %: {low:.3g}, 95 %: {high:.3g}).",
        "",
    )
    out.print("\n".join(notes), markup=False, soft_wrap=True)
    for each in found.looks:
        says = each.recommendation
        named = says if says.startswith(f"{each.estimator} ") else f"{each.estimator}: {says}"
        out.print(named, markup=False, soft_wrap=True)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"


def _bars(histogram: list[int], bars: str) -> str:
    """Return a bar for each bin, of these characters, the lowest first."""
    # Rounded up: a bin with a single query has a bar too.
    top = max(histogram)
    return "".join(bars[math.ceil(count / top * (len(bars) - 1))] for count in histogram)


def _is_shown(text: str, encoding: str) -> bool:
    """Tell whether an encoding has all characters of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
