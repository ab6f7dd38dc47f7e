"""Make the console and the tables of the command."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Return a console on standard output."""
    out = Console(highlight=False)
    # A file or a pipe has no width: Rich would take 80 columns and cut the tables.
    return out if out.is_terminal else Console(highlight=False, width=100)


def table(title: str, *names: str, numbers: Iterable[str] = ()) -> Table:
    """Return a table with columns of these names, and then columns of numbers."""
    made = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name in names:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right")
    return made
