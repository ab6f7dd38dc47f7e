"""Check that every public name has a complete numpydoc docstring: `python -m tests.programs.docstrings`."""

from __future__ import annotations

import inspect
import sys

from numpydoc.validate import validate

import randattn

# A docstring, its sections and their order, every parameter with type and description, what is returned.
CHECKS = (
    *("GL01", "GL06", "GL07", "GL08", "SS01", "SS02", "SS04"),
    *("PR01", "PR02", "PR03", "PR04", "PR07", "PR10", "RT01", "RT03", "YD01"),
)


def main() -> int:
    """Print what is missing, and return 1 where something is."""
    names = [name for name in randattn.__all__ if callable(getattr(randattn, name))]
    faults = 0
    for name in names:
        for code, message in validate(f"randattn.{name}")["errors"]:
            # The fields of a named tuple are attributes, not parameters.
            if code in CHECKS and not (inspect.isclass(getattr(randattn, name)) and code.startswith("PR")):
                print(f"randattn.{name}: {code} {message}")
                faults += 1
    print(f"{len(names)} public names, {faults} faults")
    return 1 if faults or not names else 0


if __name__ == "__main__":
    sys.exit(main())
