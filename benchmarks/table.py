"""Rows as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .rows import Row

TITLES = {
    "products": "Time over the four matrix products alone",
    "exact": "Time over the library's exact attention",
    "causal": "Time of causal attention, over the same that is not",
    "growth": "Time against tokens, over that of a quarter of them",
    "overhead": "Time on the smallest inputs, over the formulas by hand",
    "memory": "Peak memory beyond the inputs, over the output's size",
    "import": "Import, beyond NumPy's own",
    "peers": "Time over other packages'",
    "streaming": "Time of one more token after so many, over that after 100, and bytes of the state",
    "prefill": "Time of one step of many tokens",
}


class Cells(NamedTuple):
    """A table of one measure: the facts that all its rows share, and the columns that differ."""

    title: str
    shared: str
    columns: list[str]
    rows: list[list[str]]


def by_measure(rows: Iterable[Row]) -> Iterator[Cells]:
    """Yield a table for each measure."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.measure, []).append(row)
    for measure, its in found.items():
        cells = [_cells(row) for row in its]
        same = {name for name in cells[0] if len({each[name] for each in cells}) == 1} - _VALUES
        shared = ", ".join(f"{name} {cells[0][name]}" for name in cells[0] if name in same and cells[0][name])
        columns = [name for name in cells[0] if name not in same]
        yield Cells(TITLES[measure], shared, columns, [[each[name] for name in columns] for each in cells])


def tables(rows: Iterable[Row]) -> Iterator[Group]:
    """Yield the same tables for the terminal."""
    for each in by_measure(rows):
        table = Table(box=None, pad_edge=False)
        for name in each.columns:
            table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
        for cells in each.rows:
            table.add_row(*cells)
        # Not the table's own title, which is cut to the table's width.
        yield Group(Text(each.title, style="bold"), Text(each.shared, style="dim"), table)


_VALUES = {"estimator", "value", "over it", "ratio"}
_NUMBERS = {"tokens", "heads", "features", "value", "over it", "ratio", "bandwidth", "a second", "state"}


def _cells(row: Row) -> dict[str, str]:
    case = row.case
    if row.measure == "memory":
        values = [_mebibytes(row.bytes), _mebibytes(row.baseline_bytes)]
    else:
        values = [_milliseconds(row.seconds), _milliseconds(row.baseline_seconds)]
    streaming = row.measure == "streaming"
    return {
        "library": case.library,
        "device": case.device,
        "estimator": case.label,
        "tokens": str(case.tokens),
        "heads": str(case.heads),
        "features": str(case.features or ""),
        "dtype": case.dtype,
        "passes": case.passes,
        "mode": case.mode,
        "over": row.baseline or "",
        "value": values[0],
        "over it": values[1],
        "a second": _rate(row.seconds) if streaming else "",
        "state": _mebibytes(row.bytes) if streaming else "",
        "ratio": "" if row.ratio is None else f"{row.ratio:.3g}",
        "bandwidth": "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}",
        "note": row.note or "",
    }


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"


def _rate(seconds: float | None) -> str:
    return "" if not seconds else f"{float(f'{1 / seconds:.3g}'):,.6g}"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.4g} MiB"
