"""The command as a process: its two names, its streams, and what it needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np
import pytest

import randattn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SOURCE = Path(randattn.__file__).parents[1]
FEW = ("--quick", "--backend", "numpy", "--estimator", "rfa")


def environment(*path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, *path)))}


def python(*arguments: str, path: Sequence[Path] = (), **keywords: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment(*path), text=True, timeout=120, check=False, **keywords
    )


def parts(terminal: int) -> Iterator[bytes]:
    """Read the output to a terminal, until its last writer closes it: an error on Linux, an end elsewhere."""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 1 << 16):
            yield part


def test_as_a_module(inputs: Path) -> None:
    done = python("-m", "randattn", "compare", "--json", "--input", str(inputs), *FEW, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {row["estimator"] for row in json.loads(done.stdout)["rows"]} == {"rfa"}
    assert done.stderr == ""


def test_refused_as_a_process(tmp_path: Path) -> None:
    done = python("-m", "randattn", "compare", "--input", str(tmp_path / "no.npz"), capture_output=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"Error: {tmp_path / 'no.npz'}: no such file or directory\n"


def test_the_installed_command() -> None:
    """Where the package is installed, its command is this one."""
    try:
        importlib.metadata.distribution("randattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("randattn is not installed, only on the path")
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="randattn")
    assert entry.value == "randattn.cli:main"


def test_help() -> None:
    done = python("-m", "randattn", "compare", "--help", capture_output=True)
    assert done.returncode == 0
    for option in ("--backend", "--estimator", "--input", "--seeds", "--output", "--json", "--quick"):
        assert option in done.stdout
    assert "array-api-strict and dask" in done.stdout


def test_without_a_command() -> None:
    done = python("-m", "randattn", capture_output=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "compare" in done.stderr


def test_the_library_stays_light() -> None:
    heavy = ("click", "rich", "matplotlib", "safetensors", "randattn.cli")
    code = f"import randattn, sys; print([name for name in {heavy} if name in sys.modules])"
    assert python("-c", code, capture_output=True).stdout == "[]\n"


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
def test_without_the_extra(tmp_path: Path) -> None:
    """On a Python with NumPy and the library alone."""
    site = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    (tmp_path / "array_api_compat").symlink_to(Path(array_api_compat.__file__).parent)
    done = python("-S", "-m", "randattn", "compare", path=[tmp_path], capture_output=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "Error: the randattn command needs click, rich, matplotlib, safetensors: "
        'python -m pip install "randattn[cli]"\n'
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_progress_bar_on_a_terminal(inputs: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = (sys.executable, "-m", "randattn", "compare", "--json", "--input", str(inputs), *FEW)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b"".join(parts(ours))
        out, _ = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0
    assert json.loads(out)["rows"]
    text = shown.decode()
    assert "numpy: error of rfa 64" in text
    assert "numpy: 1024 tokens" in text
    # A number of samples, the times, 2 lengths; then the bar is taken away.
    assert "4/4" in text
    assert text.endswith("\x1b[2K")


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe")
def test_a_reader_who_has_read_enough(inputs: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = python(
        *("-m", "randattn", "compare", "--json", "--input", str(inputs), *FEW),
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_an_encoding_without_block_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars of `diagnose` in Windows' code page."""
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    result = python("-m", "randattn", "diagnose", "--estimator", "rfa", capture_output=True)
    assert result.returncode == 0
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("rfa  "))
    assert "@" in row
    assert result.stdout.isascii()
