"""The command in this process, on small inputs and a small plan."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from randattn.cli import app, main
from randattn.cli.compare.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = Plan(
    linear=(4, 8),
    quadratic=(1, 2),
    seeds=2,
    rounds=1,
    seconds=1e-3,
    quadratic_curves=True,
    lengths=(16, 32),
    slowest=9.0,
    deadline=99.0,
)


@dataclass(frozen=True)
class Result:
    """The result of one call of the command."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)


Command = "Callable[..., Result]"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`called("compare", "--json")` runs ``randattn compare --json``."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["randattn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def command(called: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command("--json", "--input", path)` runs ``randattn compare`` with a small plan."""
    monkeypatch.setattr(app, "FULL", SMALL)
    return partial(called, "compare")


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """Run the command, see that it is refused in one line and prints nothing else; the line."""

    def run(*arguments: object) -> str:
        result = command(*arguments)
        assert result.code == 2
        assert result.out == ""
        assert result.err.startswith("Error: ")
        assert result.err.endswith("\n")
        assert result.err.count("\n") == 1
        return result.err

    return run


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Two layers of two heads, 80 tokens (more than EVA's window) and 8 features, values of 5."""
    rng = np.random.default_rng(7)
    return {
        "q": rng.standard_normal((2, 2, 80, 8), dtype=np.float32),
        "k": rng.standard_normal((2, 2, 80, 8), dtype=np.float32),
        "v": rng.standard_normal((2, 2, 80, 5), dtype=np.float32),
        "scale": np.float32(0.4),
    }


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write arrays to an .npz file."""

    def write(arrays: dict[str, Any], name: str = "inputs.npz") -> Path:
        path = tmp_path / name
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def inputs(arrays: dict[str, np.ndarray], save: Callable[..., Path]) -> Path:
    return save(arrays)
