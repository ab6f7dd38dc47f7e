"""What pages of the site are made of beyond their text: tables, pictures, formulas, examples that run."""

from __future__ import annotations

import contextlib
import io
import json
import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from latex2mathml.converter import convert
from matplotlib.figure import Figure

import randattn
from benchmarks import rows
from experiments import runs, tables
from benchmarks.table import by_measure
from randattn.cli.style import as_png, settings
from tests.helpers import capabilities

if TYPE_CHECKING:
    from docutils import nodes

ROOT = Path(__file__).parents[1]
COUNTS = (16, 64, 256)
ESTIMATORS = {
    "rfa": lambda count: partial(randattn.rfa, num_samples=count, rng=0),
    "ra": lambda count: partial(randattn.ra, num_samples=count // 16, rng=0),
    "lara": lambda count: partial(randattn.lara, num_landmarks=count, rng=0),
    "eva": lambda count: partial(randattn.eva, num_groups=count),
    # An eighth of the keys exactly.
    "eva_top": lambda count: partial(
        randattn.eva, num_groups=count, groups="tree", exact="top", num_exact=count / 8
    ),
}


def fidelity() -> str:
    """The best of each curve at a quarter of exact attention's multiply-adds, from the committed figures."""
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
    """The benchmarks' own page, with links from here."""
    text = (ROOT / "benchmarks" / "README.md").read_text().replace("](../docs/", "](")
    # What is not on the site is named only.
    return re.sub(r"\[([^\]]*)\]\((?:\.\./[A-Z]+\.md|results/)[^)]*\)", r"\1", text)


def measured() -> str:
    """Every committed row: a section for each session, a table for each measure."""
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
    """One of the papers' experiments: how its claims fare, and the numbers, from the committed results."""
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
    """A formula in MathML, which browsers draw themselves."""
    translator.body.append(convert(node.astext()))
    raise _skip()


def block_math(translator: Any, node: nodes.math_block) -> None:
    """One on a line of its own; of several lines, one after the other."""
    lines = [line.replace("&", "") for line in re.split(r"\\\\|\n\n", node.astext()) if line.strip()]
    shown = "".join(f"<p>{convert(line, display='block')}</p>" for line in lines)
    translator.body.append(f'<div class="math">{shown}</div>')
    raise _skip()


def _skip() -> Exception:
    from docutils.nodes import SkipNode

    return SkipNode()


def run_examples(page: str, text: str) -> None:
    """Run a page's Python blocks, one after the other; an error in one is the build's."""
    scope: dict[str, Any] = {}
    for found in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        line = text[: found.start(1)].count("\n")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * line + found.group(1), f"{page}.md", "exec"), scope)


def draw(folder: Path) -> None:
    """What there is to estimate; of each estimator its matrix and its error against samples."""
    with files("randattn").joinpath("data/attention_inputs.npz").open("rb") as file:
        data = np.load(file)
        arrays, scale = [data[name].astype(np.float64) for name in "qkv"], float(data["scale"])
    exact = randattn.diagnose(randattn.softmax_attention, *arrays, scale=scale)
    (folder / "softmax.png").write_bytes(_exact_picture(exact.rows[:3, 0]))
    for name, make in ESTIMATORS.items():
        looks = [randattn.diagnose(make(count), *arrays, scale=scale, num_replicates=3) for count in COUNTS]
        (folder / f"{name}.png").write_bytes(_picture(name, exact, looks))


def _exact_picture(heads: np.ndarray) -> bytes:
    """Attention matrices of three heads, and how the weight of each is shared by keys."""
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


def _picture(name: str, exact: randattn.Diagnosis, looks: list[randattn.Diagnosis]) -> bytes:
    with settings():
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        axes = figure.subplots(1, 4)
        black = float(np.sqrt(np.quantile(exact.rows[0, 0].max(axis=-1), 0.9)))
        unit = "samples" if name in ("rfa", "ra") else "landmarks" if name == "lara" else "groups"
        counts = [count // 16 if name == "ra" else count for count in COUNTS]
        titles = ("exact attention", f"{name}, {counts[0]} {unit}", f"{name}, {counts[-1]} {unit}")
        for one, look, title in zip(axes, (exact, looks[0], looks[-1]), titles, strict=False):
            _matrix(one, look.rows[0, 0], black, title.replace("_", " "))
        axes[3].plot(counts, [look.relative_error for look in looks], "o-", color="#0072B2", label="error")
        if all(look.relative_standard_error is not None for look in looks):
            spread = [look.relative_standard_error for look in looks]
            axes[3].plot(counts, spread, "s:", color="#E69F00", label="standard error")
        axes[3].axhline(looks[0].mean_error, color="#6E6E6E", linestyle="--", label="mean(V)")
        axes[3].set_xscale("log", base=2)
        axes[3].set_xticks(counts, [str(count) for count in counts])
        axes[3].set_ylim(bottom=0)
        axes[3].set_title("relative error")
        axes[3].set_xlabel(unit)
        axes[3].legend(fontsize=9)
        return as_png(figure, dpi=100)
