"""The rows of a report, their identity, and the files that they stand in."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .harness import best, best_ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .harness import Medians

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PLOTS = ROOT / "docs" / "benchmarks"

PRODUCTS = "matrix products"
OUTPUT = "the output's size"
BY_HAND = "by hand"
QUARTER = "a quarter of the tokens"


@dataclass(frozen=True, order=True)
class Case:
    """A call and its inputs: two rows are the same measurement where these are equal."""

    library: str
    device: str
    estimator: str
    tokens: int
    options: str = ""
    heads: int = 8
    features: int | None = 64
    head_dim: int = 64
    dtype: str = "float32"
    passes: str = "forward"
    mode: str = "eager"

    @property
    def label(self) -> str:
        """The estimator with its options, as tables and plots name it."""
        return " ".join(filter(None, (self.estimator, self.options)))


@dataclass(frozen=True)
class Row:
    """One measurement of a case, of time or memory, and its baseline.

    Attributes
    ----------
    measure : str
        The table in the README that it belongs to.
    case : Case
    baseline : str or None
        The baseline of the ratio.
    seconds, baseline_seconds : float or None
        The better of two medians of five.
    bytes, baseline_bytes : int or None
        Peak memory beyond the inputs, and the baseline's.
    ratio : float or None
        The better of two ratios of medians, which need not be the ratio of the better medians.
    bandwidth_share : float or None
        Of a device's memory bandwidth, as measured by a copy: the bytes of inputs and output over the time.
    note : str or None
        A remark that a reader needs to compare the two.
    """

    measure: str
    case: Case
    baseline: str | None = None
    seconds: float | None = None
    baseline_seconds: float | None = None
    bytes: int | None = None
    baseline_bytes: int | None = None
    ratio: float | None = None
    bandwidth_share: float | None = None
    note: str | None = None

    @property
    def identity(self) -> tuple[str, Case, str | None]:
        """The key by which rows of two reports are matched."""
        return self.measure, self.case, self.baseline

    def to_json(self) -> dict[str, Any]:
        """Return one level of plain values, without those that were not measured."""
        plain = {"measure": self.measure, **asdict(self.case)}
        plain |= {name: getattr(self, name) for name in _VALUES}
        return {name: _rounded(value) for name, value in plain.items() if value is not None}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Row:
        """Make a row of the values that `to_json` gave."""
        case = {field.name: plain.get(field.name) for field in fields(Case)}
        return cls(plain["measure"], Case(**case), **{name: plain.get(name) for name in _VALUES})


_VALUES = [field.name for field in fields(Row) if field.name not in {"measure", "case"}]


def _rounded(value: Any) -> Any:
    """Round to four digits: more are noise, and would make every line of a diff new."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def time_row(
    measure: str,
    case: Case,
    medians: Medians,
    baseline: str | None = None,
    baseline_medians: Medians | None = None,
    **more: Any,
) -> Row:
    """Make a row of a time, and of its ratio to another time that was taken in turn with it."""
    if baseline_medians is None:
        return Row(measure, case, seconds=best(medians), **more)
    return Row(
        measure,
        case,
        baseline,
        seconds=best(medians),
        baseline_seconds=best(baseline_medians),
        ratio=best_ratio(medians, baseline_medians),
        **more,
    )


def slug(device: str) -> str:
    """Return a device's name in the form that a file's name allows."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def result_path(folder: Path, name: str, device: str) -> Path:
    """Return the path of the results of a session on a device."""
    return folder / f"{name}-{slug(device)}.json"


def write(path: Path, machine: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write a report, a row a line, so that a diff shows which rows moved."""
    lines = ",\n    ".join(json.dumps(row.to_json(), allow_nan=False) for row in rows)
    about = json.dumps(machine, indent=2, allow_nan=False).replace("\n", "\n  ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "machine": {about},\n  "rows": [\n    {lines}\n  ]\n}}\n')


def read(path: Path) -> list[Row]:
    """Read the rows of one report."""
    return [Row.from_json(plain) for plain in json.loads(path.read_text())["rows"]]


def read_all(folder: Path) -> Iterator[Row]:
    """Read the rows of all reports of a folder."""
    for path in sorted(folder.glob("*.json")):
        yield from read(path)
