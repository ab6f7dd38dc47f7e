"""Define the options of the command, and make its calls."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import randattn
from randattn._estimators.registry import by_label
from randattn.data import SAMPLES

from .compare.measure import Advance, measure
from .compare.plan import FULL, QUICK
from .compare.table import print_tables
from .diagnose.look import labels, look
from .diagnose.table import print_looks
from .errors import Refused
from .files import Arrays, check_output, read_inputs, read_sample, write_report
from .libraries import CHECKS, NAMES, ArrayLibrary, Unusable, installed, open_library

# Exit status of a program that an interrupt ended: 128 + SIGINT, as shells report it.
_INTERRUPTED = 130


_INPUT = click.option(
    "--input",
    "path",
    type=Path,
    metavar="FILE",
    help="A .npz or .safetensors file with q (..., N, D), k (..., M, D), v (..., M, E) and optionally scale, "
    "is_causal and key_mask, as randattn.integrations.capture writes it. Default: an embedded sample.",
)
_SAMPLE = click.option(
    "--sample",
    type=click.Choice(list(SAMPLES)),
    help="The embedded sample without --input: the attention inputs of a small sentence encoder, or of a "
    "causal language model. Default: encoder.",
)


def _estimators(verb: str, names: list[str]) -> Callable[..., Any]:
    """Return the option of the estimators to measure or to diagnose."""
    text, kind = f"An estimator to {verb}: {', '.join(names)}. Repeatable. Default: all.", click.Choice(names)
    return click.option("--estimator", "estimators", multiple=True, type=kind, metavar="NAME", help=text)


def _output(name: str) -> Callable[..., Any]:
    """Return the option of the directory that a command writes its two files to."""
    text = (
        f"Directory for {name}.png and {name}.json. Older files of that name are replaced, both or neither."
    )
    return click.option("--output", type=Path, metavar="DIR", help=text)


def _json(name: str) -> Callable[..., Any]:
    """Return the option of JSON instead of tables."""
    text = f"Print the content of {name}.json, and nothing else."
    return click.option("--json", "as_json", is_flag=True, help=text)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(randattn.__version__, prog_name="randattn")
@click.pass_context
def app(context: click.Context) -> None:
    """Compare and diagnose randomized attention on any array library."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def _read(path: Path | None, sample: str | None) -> Arrays:
    """Read the caller's file, or an embedded sample."""
    if path is None:
        return read_sample(sample or "encoder")
    if sample is not None:
        raise Refused("--sample: expected no --input with it")
    return read_inputs(path)


@app.command()
@click.option(
    "--backend",
    "names",
    multiple=True,
    type=click.Choice(NAMES),
    metavar="NAME",
    help=f"An array library to measure: {', '.join(NAMES)}. Repeatable. Default: all installed libraries "
    f"except {' and '.join(CHECKS)}, which serve for checks. PyTorch runs on a CUDA device if it finds one, "
    "JAX on its default device; CuPy needs a CUDA device.",
)
@_estimators("measure", list(by_label()))
@_INPUT
@_SAMPLE
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Number of seeds that errors are averaged over. Default: {FULL.seeds}, with --quick {QUICK.seeds}.",
)
@_output("report")
@_json("report")
@click.option("--quick", is_flag=True, help="Measure less, in seconds: fewer samples, seeds and lengths.")
def compare(
    *,
    names: tuple[str, ...],
    estimators: tuple[str, ...],
    path: Path | None,
    sample: str | None,
    seeds: int | None,
    output: Path | None,
    as_json: bool,
    quick: bool,
) -> None:
    """Compare the estimators with exact attention: error, time, and agreement between libraries.

    The error of a layer is the norm of the difference from exact attention over the norm of exact
    attention. It is averaged over layers and seeds. A layer is the last three axes: heads, tokens and
    features. The trivial answer, mean(V), is the mean of all values: an estimator with a larger error
    is worse than one that ignores the queries.

    Times are medians in float32, from the draws to the device's last result. JAX is compiled, and its
    draws are then constants. Speedup is the time of exact attention over that of the estimator, both by
    one library. Agreement is the largest difference from NumPy's result with the same seed.
    """
    start = time.perf_counter()
    plan = QUICK if quick else FULL
    inputs = _read(path, sample)
    if output is not None:
        check_output(output)
    libraries = _open_libraries(names)
    with _progress() as advance:
        report = measure(
            inputs,
            libraries,
            # In the order of the table, each once: an option may be repeated.
            [name for name in by_label() if name in estimators or not estimators],
            plan=plan,
            seeds=plan.seeds if seeds is None else seeds,
            start=start,
            advance=advance,
        )
    text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    if output is not None:
        # Imported late: matplotlib would delay every call of the command.
        from .compare.plot import plot

        write_report(output, {"report.png": plot(report), "report.json": text.encode()})
    click.echo(text, nl=False) if as_json else print_tables(report)


@app.command()
@_INPUT
@_SAMPLE
@_estimators("diagnose", labels())
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of draws, landmarks, groups or exact keys. Default: "
    + ", ".join(f"{by_label()[name].default} for {name}" for name in labels())
    + ".",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of draws. Default: 0.")
@click.option(
    "--replicates",
    type=click.IntRange(min=2),
    default=8,
    metavar="N",
    help="Number of calls with draws of their own, for the standard error. Default: 8.",
)
@_output("diagnosis")
@_json("diagnosis")
def diagnose(
    *,
    path: Path | None,
    sample: str | None,
    estimators: tuple[str, ...],
    samples: int | None,
    seed: int,
    replicates: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Diagnose the estimators on these inputs: when to trust one, and what to use instead.

    The table has the error of each estimator and of the trivial answer, mean(V). Three columns do without
    exact attention: the standard error over replicates, the effective sample size of a query's
    self-normalized weights, and the largest weight. All figures are those of randattn.diagnose on these
    inputs, on NumPy in float32.
    """
    inputs = _read(path, sample)
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
    click.echo(text, nl=False) if as_json else print_looks(found)


def run() -> int:
    """Run the command line, and report an error in one line of standard error."""
    try:
        # Not click's standalone mode, which prints errors in its own form and ends the process. The call
        # returns the status of a command, of `--help` too.
        return int(app(standalone_mode=False) or 0)
    except click.ClickException as error:
        # The name of a file can have line breaks: the message stays in one line.
        sys.stderr.write(f"Error: {' '.join(error.format_message().split())}\n")
        return error.exit_code
    except click.Abort:
        sys.stderr.write("Error: interrupted\n")
        return _INTERRUPTED


def _open_libraries(names: tuple[str, ...]) -> list[ArrayLibrary]:
    if names:
        try:
            # Each library once, in the order of the options.
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
    """Yield a function that advances a progress bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        # Not `Progress(disable=True)`, which prints a line in older versions of Rich.
        yield lambda _done, _total, _doing: None
        return
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Four times a second: a thread that draws more often would show in the measured times.
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("")

        def advance(done: int, total: int, doing: str) -> None:
            bar.update(task, completed=done, total=total, description=doing, refresh=True)

        yield advance
