"""The command's options, and the calls that they make."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from randattn._estimators.registry import by_label

from .compare.measure import measure
from .compare.plan import FULL, QUICK
from .compare.table import print_tables
from .diagnose.look import labels, look
from .diagnose.table import print_looks
from .errors import Refused
from .files import check_output, read_inputs, read_sample, write_report
from .libraries import CHECKS, NAMES, Unusable, installed, open_library

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .compare.measure import Advance
    from .libraries import ArrayLibrary

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.pass_context
def app(context: click.Context) -> None:
    """Randomized attention for any array library."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


@app.command()
@click.option(
    "--backend",
    "names",
    multiple=True,
    type=click.Choice(NAMES),
    metavar="NAME",
    help=f"An array library to measure: {', '.join(NAMES)}. Repeatable. Default: all that are installed, "
    f"except {' and '.join(CHECKS)}, which are checks rather than tools. PyTorch runs on a CUDA device where "
    "it has one, JAX on its default device; CuPy needs a CUDA device.",
)
@click.option(
    "--estimator",
    "estimators",
    multiple=True,
    type=click.Choice(list(by_label())),
    metavar="NAME",
    help=f"An estimator to measure: {', '.join(by_label())}. Repeatable. Default: all.",
)
@click.option(
    "--input",
    "path",
    type=Path,
    metavar="FILE",
    help="A .npz or .safetensors file with q (..., N, D), k (..., M, D), v (..., M, E) and optionally scale. "
    "Default: the embedded sample, what a small sentence encoder passes to its attention.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"How many seeds errors are averaged over. Default: {FULL.seeds}, or {QUICK.seeds} with --quick.",
)
@click.option(
    "--output",
    type=Path,
    metavar="DIR",
    help="Write report.png and report.json there, in place of those that are there: both or neither.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print what report.json holds, alone, on standard output."
)
@click.option("--quick", is_flag=True, help="Fewer sample counts, seeds, repetitions and lengths: seconds.")
def compare(
    *,
    names: tuple[str, ...],
    estimators: tuple[str, ...],
    path: Path | None,
    seeds: int | None,
    output: Path | None,
    as_json: bool,
    quick: bool,
) -> None:
    """Compare the estimators with exact attention: error, time, and agreement between libraries.

    The error of a layer is the norm of the difference from exact attention over the norm of exact
    attention; it is averaged over layers and seeds. A layer is what the last three axes hold: heads,
    tokens and features. Beside it stands the error of the trivial answer, mean(V), the mean of all
    values: an estimator that errs more is worse than not looking at the queries.

    Times are medians in float32, from the drawing of random numbers to the device's last result; JAX
    is compiled, and its draws are constants then. Speedup is over exact attention by the same
    library. Agreement is the largest difference from NumPy's result with the same seed.
    """
    start = time.perf_counter()
    plan = QUICK if quick else FULL
    inputs = read_sample() if path is None else read_inputs(path)
    if output is not None:
        check_output(output)
    libraries = _open_libraries(names)
    with _progress() as advance:
        report = measure(
            inputs,
            libraries,
            # In the table's order, and once.
            [name for name in by_label() if name in estimators or not estimators],
            plan=plan,
            seeds=plan.seeds if seeds is None else seeds,
            start=start,
            advance=advance,
        )
    text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    if output is not None:
        # Late: it takes a second to import.
        from .compare.plot import plot

        write_report(output, {"report.png": plot(report), "report.json": text.encode()})
    if as_json:
        click.echo(text, nl=False)
    else:
        print_tables(report)


@app.command()
@click.option(
    "--input",
    "path",
    type=Path,
    metavar="FILE",
    help="A .npz or .safetensors file with q (..., N, D), k (..., M, D), v (..., M, E) and optionally scale. "
    "Default: the embedded sample, what a small sentence encoder passes to its attention.",
)
@click.option(
    "--estimator",
    "estimators",
    multiple=True,
    type=click.Choice(labels()),
    metavar="NAME",
    help=f"An estimator to diagnose: {', '.join(labels())}. Repeatable. Default: all.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Draws, landmarks, groups or exact keys. Default: "
    + ", ".join(f"{by_label()[name].default} for {name}" for name in labels())
    + ".",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the draws. Default: 0.")
@click.option(
    "--replicates",
    type=click.IntRange(min=2),
    default=8,
    metavar="N",
    help="Calls with draws of their own, for the standard error. Default: 8.",
)
@click.option(
    "--output",
    type=Path,
    metavar="DIR",
    help="Write diagnosis.png and diagnosis.json there, in place of those that are there: both or neither.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print what diagnosis.json holds, alone, on standard output."
)
def diagnose(
    *,
    path: Path | None,
    estimators: tuple[str, ...],
    samples: int | None,
    seed: int,
    replicates: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say when to trust an estimator on these inputs, and what to use instead.

    Beside the error of each estimator and of the trivial answer, mean(V), stand what tells without exact
    attention: the standard error over replicates, the effective sample size of a query's self-normalized
    weights, and the largest weight. Everything printed was computed on these inputs; it is
    randattn.diagnose, in float32 and on NumPy.
    """
    inputs = read_sample() if path is None else read_inputs(path)
    if output is not None:
        check_output(output)
    with _progress() as advance:
        found = look(
            inputs,
            [name for name in labels() if name in estimators or not estimators],
            samples=samples,
            seed=seed,
            replicates=replicates,
            advance=advance,
        )
    text = json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n"
    if output is not None:
        from .diagnose.plot import plot_looks

        write_report(output, {"diagnosis.png": plot_looks(found), "diagnosis.json": text.encode()})
    if as_json:
        click.echo(text, nl=False)
    else:
        print_looks(found)


def run() -> int:
    """Run the command line: an error goes on one line of standard error, never as a traceback."""
    try:
        # The status of a command, `--help` among them.
        return int(app(standalone_mode=False) or 0)
    except click.ClickException as error:
        # One line whatever a file is called.
        sys.stderr.write(f"Error: {' '.join(error.format_message().split())}\n")
        return error.exit_code
    except click.Abort:
        sys.stderr.write("Error: interrupted\n")
        return _INTERRUPTED


def _open_libraries(names: tuple[str, ...]) -> list[ArrayLibrary]:
    if names:
        try:
            # Once each, in the order in which they are named.
            return [open_library(name) for name in dict.fromkeys(names)]
        except Unusable as error:
            raise Refused(f"--backend {error}") from None
    libraries = []
    for name in installed():
        try:
            libraries.append(open_library(name))
        except Unusable as error:
            sys.stderr.write(f"Leaving out {error}\n")
    return libraries


@contextmanager
def _progress() -> Iterator[Advance]:
    """A progress bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        # Not the bar's own `disable`, which in older versions of Rich still prints a line.
        yield lambda _done, _total, _doing: None
        return
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn seldom: it would show in the times.
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("")

        def advance(done: int, total: int, doing: str) -> None:
            bar.update(task, completed=done, total=total, description=doing, refresh=True)

        yield advance
