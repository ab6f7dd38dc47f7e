"""Build the wheel from the sdist, and use it in an empty environment: ``python -m tests.programs.wheel FOLDER``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WANTED = (
    "randattn/py.typed",
    "randattn/data/attention_inputs.npz",
    "randattn/data/language_model_inputs.npz",
    "/licenses/LICENSE",
    "randattn/cli/",
)


def run(*command: str, where: Path = ROOT) -> str:
    """Run a command and return what it prints; the program ends where it fails."""
    found = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        sys.exit(f"{found.stdout}\n{' '.join(command)}: exit status {found.returncode}")
    return found.stdout


def built(folder: Path) -> Path:
    """Return the only wheel of a new build."""
    for old in folder.glob("*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", str(folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """End the program where the wheel lacks a file, or has one that is not the package's."""
    names = zipfile.ZipFile(wheel).namelist()
    missing = [want for want in WANTED if not any(want in found for found in names)]
    foreign = [found for found in names if not found.startswith(("randattn/", "randattn-"))]
    if missing or foreign:
        sys.exit(f"{wheel.name} lacks {missing} and has {foreign}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size >> 10} KiB")


def use(wheel: Path, work: Path) -> None:
    """Install the wheel alone and call it; then with the command's packages, and run the command."""
    run("virtualenv", "--clear", "--quiet", str(work / "empty"))
    scripts = work / "empty" / ("Scripts" if os.name == "nt" else "bin")
    # Away from the checkout, and with -I, so that nothing but the wheel is found.
    python = (str(scripts / "python"), "-I")
    install = (*python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints" / "cpu.txt"))
    run(*install, str(wheel), where=work)
    print(run(*python, str(ROOT / "tests" / "programs" / "installed.py"), where=work), end="")
    run(*install, f"{wheel}[cli]", where=work)
    report = json.loads(run(str(scripts / "randattn"), "compare", "--quick", "--json", where=work))
    if not report["rows"] or not report["lengths"]:
        sys.exit("randattn compare: its report has no rows or no lengths")
    print(f"randattn compare --quick --json: {len(report['rows'])} rows, {len(report['lengths'])} lengths")


def main(work: Path) -> None:
    """Build, check and use."""
    wheel = built(work / "dist")
    check_files(wheel)
    use(wheel, work)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
