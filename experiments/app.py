"""The commands `figures`, `digits`, `translation` and `language`, one for each experiment."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.rows import PLOTS

from .runs import FOLDER, carry_out

# Processes at a time on a CPU: an experiment that measures time runs alone.
EXPERIMENTS = {"figures": 1, "digits": None, "translation": None, "language": None}


def _command(name: str) -> click.Command:
    @click.command(name=name, help=f"The papers' experiment: {name}. Goes on where it was stopped.")
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--jobs", type=click.IntRange(min=1), help="Processes at a time; by default one a core.")
    @click.option(
        "--output",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where results and plots go, instead of experiments/results and docs/benchmarks.",
    )
    def command(device: str, jobs: int | None, output: Path | None) -> None:
        # Imported late: each imports the library that it trains with.
        experiment = import_module(f"experiments.{name}")
        from .plots import draw
        from .tables import claims, numbers

        console = Console()
        console = console if console.is_terminal else Console(width=140)
        stem = name if device == "cpu" else f"{name}-{device}"
        runs, path = experiment.runs(device), (output or FOLDER) / f"{stem}.json"
        done = carry_out(path, runs, experiment.work, console, jobs=jobs or EXPERIMENTS[name])
        for header, rows in (numbers(name, done), claims(name, done)):
            table = Table(*header)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        picture = (output or PLOTS) / f"paper-{stem}.png"
        draw(name, done, picture)
        console.print(f"wrote {path.name} and {picture.name}")

    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def app() -> None:
    """Run the papers' experiments."""


for _name in EXPERIMENTS:
    app.add_command(_command(_name))
