"""The command: a session for each library, one for the peers, the guard, and the plots."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from . import fidelity as fronts
from . import guard as guarding
from . import machine, peers, rows, sessions, sharding, streaming
from .baselines import NAMES, open_library
from .sizes import sizes_for
from .table import tables

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from .rows import Case, Row

_QUICK = click.option(
    "--quick", is_flag=True, help="The smallest sizes: whether everything works, not how fast it is."
)
_DEVICE = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
_OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where results and plots go, instead of benchmarks/results and docs/benchmarks. "
    "With --quick nothing is written without it.",
)


CPU_LIBRARIES = ("numpy", "torch", "jax")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def app() -> None:
    """Measure randattn, or check that it has not become slower."""


def _register(name: str) -> None:
    @app.command(name=name, help=f"Measure {name}.")
    @_DEVICE
    @_QUICK
    @_OUTPUT
    def session(device: str, *, quick: bool, output: Path | None) -> None:
        library = open_library(name, "cuda" if name == "cupy" else device)
        about = machine.describe()
        sizes = sizes_for(name, on_gpu=library.on_gpu, quick=quick)
        if library.on_gpu:
            about["gpu_bandwidth"] = float(f"{sessions.measured_bandwidth(library):.4g}")
        found = list(sessions.measure(library, sizes, _say))
        _finish(name, library.device, about, found, quick=quick, output=output)


for _name in NAMES:
    _register(_name)


@app.command(name="peers")
@_QUICK
@_OUTPUT
def measure_peers(*, quick: bool, output: Path | None) -> None:
    """Measure over other packages, on the CPU."""
    # Opened first, so that the machine's description has PyTorch's threads.
    open_library("torch")
    about = machine.describe()
    found = list(peers.measure(sizes_for("torch", quick=quick), _say))
    _finish("peers", "cpu", about, found, quick=quick, output=output)


@app.command(name="causal")
@click.argument("name", metavar="LIBRARY", type=click.Choice(CPU_LIBRARIES))
@_QUICK
@_OUTPUT
def measure_causal(name: str, *, quick: bool, output: Path | None) -> None:
    """Measure causal calls over the same calls without is_causal, on the CPU."""
    library = open_library(name)
    about = machine.describe()
    found = list(sessions.causal(library, sizes_for(name, quick=quick), _say))
    _finish(f"causal-{name}", "cpu", about, found, quick=quick, output=output)


@app.command(name="trained")
@click.argument("name", metavar="LIBRARY", type=click.Choice(CPU_LIBRARIES))
@click.option("--long/--no-long", default=True, help="With inputs of 16,384 and 32,768 tokens.")
@click.option("--steps", is_flag=True, help="Steps of a token, after a call on the tokens before.")
@_OUTPUT
def measure_trained(name: str, output: Path | None, *, long: bool, steps: bool) -> None:
    """Measure error and time of adaptive_eva on a trained language model's own inputs."""
    from . import trained

    about = machine.describe()
    found = list(trained.measure(name, _say, long=long, steps=steps))
    _console().print(trained.table(found), "")
    file = f"{name}-steps-cpu.json" if steps else f"{name}-cpu.json"
    trained.write((output or rows.RESULTS / "trained") / file, about, found)


@app.command(name="perplexity")
@click.option("--tokens", type=int, multiple=True, default=(2048, 8192), show_default=True)
@_OUTPUT
def measure_perplexity(output: Path | None, tokens: tuple[int, ...]) -> None:
    """Measure the perplexity of a language model with its attention replaced in all layers; draw it."""
    from . import layers, trained
    from .plots_trained import draw_perplexity

    about = machine.describe()
    found, errors = list(trained.perplexities(_say, tokens)), list(layers.layer_errors(_say, max(tokens)))
    _console().print(trained.table(found), trained.table(errors), "")
    folder = output or rows.RESULTS / "trained"
    trained.write(folder / "perplexity.json", about, found)
    trained.write(folder / "layers.json", about, errors)
    click.echo(f"drew {draw_perplexity(found, errors, output or rows.PLOTS).name}")


@app.command(name="choice")
@_OUTPUT
def measure_choice(output: Path | None) -> None:
    """Measure every estimator's error and time on a language model's inputs, and draw them."""
    from . import choice, trained

    about, found = machine.describe(), list(choice.measure(_say))
    _console().print(trained.table(found), "")
    trained.write((output or rows.RESULTS / "trained") / "choice.json", about, found)
    click.echo(f"drew {choice.draw(found, output or rows.PLOTS).name}")


@app.command(name="streaming")
@click.argument("libraries", nargs=-1, type=click.Choice(streaming.LIBRARIES))
@_QUICK
@_OUTPUT
def measure_streaming(libraries: tuple[str, ...], *, quick: bool, output: Path | None) -> None:
    """Measure decoding a token at a time, on one thread of the CPU; by default on all of these libraries."""
    about = machine.describe() | {"threads": streaming.ONE_THREAD}
    found = [
        row
        for name in libraries or streaming.LIBRARIES
        for row in streaming.in_own_process(name, quick=quick)
    ]
    _finish("streaming", "cpu", about, found, quick=quick, output=output)


@app.command(name="fidelity")
@click.option("--model/--no-model", default=True, help="With the pretrained model, or on the sample alone.")
@_OUTPUT
def measure_fidelity(output: Path | None, *, model: bool) -> None:
    """Measure errors against multiply-adds, and a pretrained model with its attention replaced."""
    about = machine.describe()
    points = list(fronts.measure(with_model=model, say=_say))
    _console().print(fronts.table(points), "")
    path = (output or rows.RESULTS / "fidelity") / "points.json"
    fronts.write(path, about, points)
    click.echo(f"wrote {path.name}: {len(points)} points")
    from .plots_fidelity import draw_fidelity

    click.echo(f"drew {draw_fidelity(points, output or rows.PLOTS).name}")


@app.command()
@click.option(
    "--library", "libraries", multiple=True, type=click.Choice(NAMES), help="Default: all on a CPU."
)
@_DEVICE
@_QUICK
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=rows.RESULTS,
    help="The committed results.",
)
def guard(libraries: tuple[str, ...], device: str, *, quick: bool, results: Path) -> None:
    """Fail where a ratio over the matrix products is above 1.25 times the committed one."""
    compared, losses = 0, []
    for name in libraries or CPU_LIBRARIES:
        library = open_library(name, device)
        path = rows.result_path(results, name, library.device)
        if not path.exists():
            click.echo(f"{name} on {library.device}: no {path.name} is committed, nothing to compare with")
            continue
        sizes = sizes_for(name, on_gpu=library.on_gpu, quick=quick)

        def measure(
            only: Collection[Case] | None, library: Any = library, sizes: Any = sizes
        ) -> Iterable[Row]:
            return sessions.products(library, sizes, _say, only)

        verdict = guarding.judge(rows.read(path), measure)
        compared += len(verdict.kept) + len(verdict.losses)
        losses += verdict.losses
        for table in tables([*verdict.kept, *verdict.new, *(loss.row for loss in verdict.losses)]):
            _console().print(table, "")
        for row in verdict.new:
            click.echo(f"not committed, not compared: {name} {row.case.label}, {row.case.tokens} tokens")
        for row in verdict.gone:
            click.echo(f"committed, no longer measured: {name} {row.case.label}, {row.case.tokens} tokens")
    for loss in losses:
        click.echo(f"slower: {loss}")
    if not compared:
        click.echo("no committed row was compared: `nox -s bench-numpy` and the others write them")
    click.echo(f"{compared} rows compared, {len(losses)} over {guarding.LIMIT} times the committed ratio")
    if losses or not compared:
        sys.exit(1)


@app.command()
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=rows.RESULTS, help="What is drawn."
)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=rows.PLOTS)
def plot(results: Path, output: Path) -> None:
    """Draw the results that exist."""
    _draw(results, output)


@app.command(name="sharding")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=rows.PLOTS)
def measure_sharding(output: Path) -> None:
    """Print the cost of sharding a sequence, compare it with compiled programs, and draw it."""
    wrong = 0
    sharding.force_devices()
    for label, at, expected, found in sharding.check():
        wrong += expected != found
        click.echo(
            f"{label}, {at.groups} groups, {at.tokens} tokens, {at.devices} devices: "
            f"{sum(expected)} bytes of results, in the compiled program {sum(found)}"
        )
    _console().print(sharding.table(sharding.Layout(), (8, 64, 512, 4096)))
    from .plots import draw_sharding

    click.echo(f"drew {draw_sharding(output).name}")
    if wrong:
        click.echo(f"{wrong} programs send something else than the model says")
        sys.exit(1)


def _finish(
    name: str, device: str, about: dict[str, Any], found: list[Row], *, quick: bool, output: Path | None
) -> None:
    for table in tables(found):
        _console().print(table, "")
    if quick and output is None:
        return
    results = output or rows.RESULTS
    path = rows.result_path(results, name, device)
    rows.write(path, about, found)
    click.echo(f"wrote {path.name}: {len(found)} rows")
    _draw(results, output or rows.PLOTS)


def _draw(results: Path, output: Path) -> None:
    # Imported late: it takes a second, which no measurement needs.
    from .plots import draw

    for path in draw(list(rows.read_all(results)), output):
        click.echo(f"drew {path.name}")


def _console() -> Console:
    """Return a console that is wide enough for the tables where no terminal gives a width."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _say(what: str) -> None:
    click.echo(what, err=True)
