"""Print what each public function costs a device: ``python -m tests.libraries.cupy_standin``, or rows that begin with a name.

A step's row has the call before it too.
"""

from __future__ import annotations

import sys

from tests.helpers.libraries import open_library

from .counting import cases, count


def main(names: list[str]) -> None:
    library = open_library("cupy-standin", None)
    print(f"{'':44}{'launches':>10}{'copies':>10}{'syncs':>10}")
    for case in cases():
        if case.row.startswith(tuple(names or [""])):
            found = count(library, case)
            print(f"{case!s:44}{found.launches:10}{found.copies:10}{found.syncs:10}")


if __name__ == "__main__":
    main(sys.argv[1:])
