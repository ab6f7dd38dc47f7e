"""Print the slowest ten tests: ``python -m tests.programs.slowest FILE``, a file that tests/conftest.py wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    """Print the time, the library and the name of each."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print("The slowest ten tests:")
    for seconds, library, name in sorted(lines, reverse=True)[:10]:
        print(f"{seconds:7.1f} s  {library:12}  {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
