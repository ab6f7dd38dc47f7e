"""The ``randattn`` command, which is not imported with the library."""

from __future__ import annotations

import importlib.util
import sys

# Modules of the extra `cli`, and NumPy.
_NEEDED = ("numpy", "click", "rich", "matplotlib", "safetensors")


def main() -> None:
    """Run the command line, or name the missing modules in one line."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f'Error: the randattn command needs {", ".join(missing)}: python -m pip install "randattn[cli]"\n'
        )
        sys.exit(2)
    # Imported late: an import of click or rich at the top would fail with a traceback.
    from .app import run

    sys.exit(run())
