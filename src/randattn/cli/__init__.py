"""The ``randattn`` command. Nothing of it is imported with the library."""

from __future__ import annotations

import importlib.util
import sys

# What the extra `cli` installs, and what it needs with it.
_NEEDED = ("numpy", "click", "rich", "matplotlib", "safetensors")


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f'Error: the randattn command needs {", ".join(missing)}: python -m pip install "randattn[cli]"\n'
        )
        sys.exit(2)
    # Late, because it imports click and rich.
    from .app import run

    sys.exit(run())
