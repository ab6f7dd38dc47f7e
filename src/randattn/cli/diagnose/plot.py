"""Draw the diagnoses as a picture: attention matrices, effective samples, errors by entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from randattn.cli.style import LONGEST_NAME, as_png, settings

from .look import BINS, Looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EXACT, _BAD, _GOOD = "#6E6E6E", "#D55E00", "#009E73"
# Points of a scatter plot, about; more of them would cover each other.
_POINTS = 4000


def plot_looks(found: Looks) -> bytes:
    """Draw a column for each estimator.

    Parameters
    ----------
    found : Looks
        The figures of all diagnoses.

    Returns
    -------
    bytes
        A PNG file.
    """
    with settings():
        figure = Figure(figsize=(3.1 * (len(found.looks) + 1), 9.2), layout="constrained")
        grid = figure.subplots(3, len(found.looks) + 1, squeeze=False)
        # One scale of errors for all columns; the largest 0.5 % of an estimator's errors may lie outside.
        highest = max(float(np.quantile(one.error, 0.995)) for one in found.diagnoses.values())
        # Roots of weights, or small ones would be white beside large ones. Black is the 90 % quantile of the
        # largest roots of the exact rows.
        black = None if found.exact is None else float(np.quantile(np.sqrt(found.exact.max(axis=-1)), 0.9))
        _of_exact(found, grid[:, 0], black)
        for axes, look in zip(grid.T[1:], found.looks, strict=True):
            diagnosis = found.diagnoses[look.estimator]
            colour = _BAD if look.relative_error >= look.mean_error else _GOOD
            title = f"{look.estimator} {look.samples}\nerror {look.relative_error:.2g}"
            axes[0].set_title(title, color=colour)
            _matrix(axes[0], None if diagnosis.rows is None else _first_head(diagnosis.rows), black)
            _histogram(axes[1], look.histogram, colour)
            _scatter(axes[2], diagnosis.entropy, diagnosis.error, colour, highest)
        figure.suptitle(
            f"{found.input[-LONGEST_NAME:]}: mean(V) errs by {found.looks[0].mean_error:.2g}; "
            "estimators with larger errors are red",
            x=0.01,
            ha="left",
        )
        return as_png(figure, dpi=100)


def _of_exact(found: Looks, axes: Any, black: float | None) -> None:
    axes[0].set_title("exact\nattention matrix, first head")
    _matrix(axes[0], found.exact, black)
    axes[0].set_ylabel("query")
    (first, *_) = found.diagnoses.values()
    axes[1].hist(np.ravel(first.entropy), bins=BINS, color=_EXACT)
    axes[1].set(title="entropy of rows (nats)", ylabel="queries")
    axes[2].axis("off")
    axes[2].text(
        0,
        0.5,
        "Top: the weights of the values\nin the output.\n\nMiddle: number of queries by\n"
        "effective samples over weights.\n\nBottom: error of each query by\n"
        "the entropy of its exact row.",
        va="center",
        color=_EXACT,
        transform=axes[2].transAxes,
    )


def _matrix(axes: Axes, rows: np.ndarray | None, black: float | None) -> None:
    axes.set_xlabel("key")
    axes.grid(visible=False)
    if rows is None:
        _nothing(axes, "no weighting of values,\nor too many pairs")
        return
    axes.imshow(np.sqrt(np.clip(rows, 0, None)), cmap="Greys", vmin=0, vmax=black, aspect="auto")


def _histogram(axes: Axes, histogram: list[int] | None, colour: str) -> None:
    if histogram is None:
        axes.axis("off")
        _nothing(axes, "no self-normalized\nweights")
        return
    axes.set(xlabel="effective samples / weights", xlim=(0, 1))
    axes.bar((np.arange(BINS) + 0.5) / BINS, histogram, width=0.9 / BINS, color=colour)


def _scatter(axes: Axes, entropy: Any, error: Any, colour: str, highest: float) -> None:
    entropy, error = np.ravel(np.broadcast_to(entropy, np.shape(error))), np.ravel(error)
    every = max(1, len(error) // _POINTS)
    axes.scatter(entropy[::every], error[::every], s=4, color=colour, alpha=0.25, linewidths=0)
    axes.set(xlabel="entropy of the exact row (nats)", ylabel="|out - exact|", ylim=(0, 1.05 * highest or 1))


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=_EXACT)


def _first_head(rows: np.ndarray) -> np.ndarray:
    first: np.ndarray = rows.reshape(-1, *rows.shape[-2:])[0]
    return first
