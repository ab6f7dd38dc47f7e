"""Parts of pages beyond their text: tables, pictures, formulas, examples that run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from latex2mathml.converter import convert
from matplotlib.figure import Figure

import randattn
from benchmarks import rows
from benchmarks.table import by_measure
from experiments import runs, tables
from randattn._estimators.registry import ESTIMATORS
from randattn.cli.style import as_png, settings
from randattn.data import read_sample
from tests.helpers import capabilities

if TYPE_CHECKING:
    from docutils import nodes

    from randattn._estimators.registry import Estimator

ROOT = Path(__file__).parents[1]
# Counts that an estimator is drawn with, and those of an estimator whose default is one.
COUNTS, FEW_COUNTS = (16, 64, 256), (1, 4, 16)
# The words for the counts, where the keyword does not end in one.
UNITS = {"num_exact": "exact keys"}


def fidelity() -> str:
    """Return the best of each curve at a quarter of exact attention's multiply-adds, as committed."""
    points = json.loads((ROOT / "benchmarks" / "results" / "fidelity" / "points.json").read_text())["points"]
    lines = [
        "| | options | of exact's multiply-adds | error: sample | error: encoder |",
        "|---|---|---|---|---|",
    ]
    errors: dict[tuple[str, str], dict[str, Any]] = {}
    for point in points:
        errors.setdefault((point["curve"], point["options"]), {})[point["inputs"]] = point
    best: dict[str, tuple[float, str]] = {}
    for (curve, options), both in errors.items():
        if both["sample"]["share"] is not None and both["sample"]["share"] <= 0.26:
            best[curve] = min(best.get(curve, (np.inf, "")), (both["sample"]["error"], options))
    for curve, (_, options) in best.items():
        both = errors[curve, options]
        sample, model = both["sample"], both["model"]
        errors_of = f"{sample['error']:.2f} | {model['error']:.2f}"
        lines.append(f"| {curve} | `{options}` | {sample['share']:.3f} | {errors_of} |")
    return "\n".join(lines)


def benchmarks() -> str:
    """Return the benchmarks' own page, with links that are right on the site."""
    text = (ROOT / "benchmarks" / "README.md").read_text().replace("](../docs/", "](")
    # A file that is not on the site is named without a link.
    return re.sub(r"\[([^\]]*)\]\((?:\.\./[A-Z]+\.md|results/)[^)]*\)", r"\1", text)


def measured() -> str:
    """Return every committed row: a section for each session, a table for each measure."""
    parts = []
    for path in sorted(rows.RESULTS.glob("*.json")):
        machine = json.loads(path.read_text())["machine"]
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        about = f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores; {packages}"
        parts += [f"## {path.stem}", about]
        for each in by_measure(rows.read(path)):
            parts += [f"### {each.title}", each.shared, _markdown(each.columns, each.rows)]
    return "\n\n".join(parts)


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def paper(name: str) -> str:
    """Return the tables of one of the papers' experiments, from the committed results."""
    done = runs.read(runs.FOLDER / f"{name}.json")
    return "\n\n".join(_markdown(*table) for table in (tables.claims(name, done), tables.numbers(name, done)))


PARTS = {
    "capabilities": capabilities.table,
    "fidelity": fidelity,
    "benchmarks": benchmarks,
    "measured": measured,
}
PARTS |= {f"paper_{name}": partial(paper, name) for name in tables.EXPERIMENTS}


def inline_math(translator: Any, node: nodes.math) -> None:
    """Write a formula in MathML, which browsers draw themselves."""
    translator.body.append(convert(node.astext()))
    raise _skip()


def block_math(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of a line of its own; several lines stand one after the other."""
    lines = [line.replace("&", "") for line in re.split(r"\\\\|\n\n", node.astext()) if line.strip()]
    shown = "".join(f"<p>{convert(line, display='block')}</p>" for line in lines)
    translator.body.append(f'<div class="math">{shown}</div>')
    raise _skip()


def _skip() -> Exception:
    from docutils.nodes import SkipNode

    return SkipNode()


def run_examples(page: str, text: str) -> None:
    """Run a page's Python blocks, one after the other; an error in one fails the build."""
    scope: dict[str, Any] = {}
    for found in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        line = text[: found.start(1)].count("\n")
        # Away from the checkout: a block may write a file.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
        ):
            exec(compile("\n" * line + found.group(1), f"{page}.md", "exec"), scope)


def draw(folder: Path) -> None:
    """Draw exact attention on the sample; of each estimator its matrix, and its error against its count."""
    q, k, v, scale = read_sample()
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    exact = randattn.diagnose(randattn.softmax_attention, *arrays, scale=scale)
    (folder / "softmax.png").write_bytes(_exact_picture(exact.rows[:3, 0]))
    for name, row in ESTIMATORS.items():
        if row.count is None:
            continue
        draws = {} if row.draws == "never" else {"rng": 0}
        counts = FEW_COUNTS if row.default == 1 else COUNTS
        looks = [
            randattn.diagnose(
                row.function, *arrays, scale=scale, num_replicates=3, **{row.count: count}, **draws
            )
            for count in counts
        ]
        (folder / f"{name}.png").write_bytes(_picture(row, exact, counts, looks))


def _exact_picture(heads: np.ndarray) -> bytes:
    """Draw the attention matrices of three heads, and the share of the weight that the largest keys have."""
    with settings():
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        axes = figure.subplots(1, 4)
        for one, (head, rows) in zip(axes[:3], enumerate(heads), strict=True):
            _matrix(one, rows, np.sqrt(np.quantile(rows.max(axis=-1), 0.9)), f"layer {head + 1}")
        for head, rows in enumerate(heads):
            largest = np.sort(rows, axis=-1)[:, ::-1].cumsum(axis=-1).mean(axis=0)
            axes[3].plot(np.arange(1, len(largest) + 1), largest, label=f"layer {head + 1}")
        axes[3].set_xscale("log", base=2)
        axes[3].set_ylim(0, 1)
        axes[3].set_title("share of the weight")
        axes[3].set_xlabel("largest keys of each query")
        axes[3].legend(fontsize=9)
        return as_png(figure, dpi=100)


def _matrix(axes: Any, rows: np.ndarray, black: float, title: str) -> None:
    axes.imshow(np.sqrt(np.clip(rows, 0, None)), cmap="Greys", vmin=0, vmax=black, aspect="auto")
    axes.set_title(title)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])


def _picture(
    row: Estimator, exact: randattn.Diagnosis, counts: tuple[int, ...], looks: list[randattn.Diagnosis]
) -> bytes:
    """Draw the matrices with the least and the largest count, and the error against the count."""
    with settings():
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        axes = figure.subplots(1, 4)
        black = float(np.sqrt(np.quantile(exact.rows[0, 0].max(axis=-1), 0.9)))
        unit = UNITS.get(row.count or "", (row.count or "").removeprefix("num_"))
        titles = ("exact attention", f"{counts[0]} {unit}", f"{counts[-1]} {unit}")
        for one, look, title in zip(axes, (exact, looks[0], looks[-1]), titles, strict=False):
            _matrix(one, look.rows[0, 0], black, title)
        axes[3].plot(counts, [look.relative_error for look in looks], "o-", color=row.colour, label="error")
        if all(look.relative_standard_error is not None for look in looks):
            spread = [look.relative_standard_error for look in looks]
            axes[3].plot(counts, spread, "s:", color=row.colour, label="standard error")
        axes[3].axhline(looks[0].mean_error, color="#6E6E6E", linestyle="--", label="mean(V)")
        axes[3].set_xscale("log", base=2)
        axes[3].set_xticks(counts, [str(count) for count in counts])
        axes[3].set_ylim(bottom=0)
        axes[3].set_title("relative error")
        axes[3].set_xlabel(unit)
        axes[3].legend(fontsize=9)
        return as_png(figure, dpi=100)
