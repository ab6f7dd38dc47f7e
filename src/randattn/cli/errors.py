"""Errors that the command reports in one line."""

from __future__ import annotations

import click


class Refused(click.ClickException):
    """A fault of the caller's input, in one line."""

    exit_code = 2
