"""What the command refuses."""

from __future__ import annotations

import click


class Refused(click.ClickException):
    """What is wrong with what the caller gave, in one line."""

    exit_code = 2
