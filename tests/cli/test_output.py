"""A report that is there is replaced whole or not at all."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from randattn.cli.compare import measure, plot
from randattn.cli.errors import Refused
from randattn.cli.files import write_report

if TYPE_CHECKING:
    from collections.abc import Callable

OLD = {"report.png": b"old picture", "report.json": b"old numbers"}
NEW = {"report.png": b"new picture", "report.json": b"new numbers"}
# After the terminal's ^C.
INTERRUPTED = "\nError: interrupted\n"
FEW = ("--backend", "numpy", "--estimator", "rfa")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a report and what is no report's."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in {**OLD, "notes.txt": b"mine"}.items():
        (folder / name).write_bytes(content)
    return folder


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException, *, after: bool = False) -> None:
    """Let the call-th rename fail, or be interrupted right after it."""
    rename, calls = Path.replace, iter(range(99))

    def replace(self: Path, target: Path) -> Path:
        fails = next(calls) == call
        if fails and not after:
            raise error
        result = rename(self, target)
        if fails:
            raise error
        return result

    monkeypatch.setattr(Path, "replace", replace)


def test_a_report_is_replaced(folder: Path) -> None:
    write_report(folder, NEW)
    assert contents(folder) == {**NEW, "notes.txt": b"mine"}


def test_the_command_replaces_a_report(command: Any, inputs: Path, folder: Path) -> None:
    assert command("--input", inputs, "--output", folder, *FEW).code == 0
    there = contents(folder)
    assert set(there) == {*NEW, "notes.txt"}
    assert there["report.png"].startswith(b"\x89PNG")
    assert there["report.json"].startswith(b"{")


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_the_old_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: int, after: bool, error: BaseException
) -> None:
    fail_at(monkeypatch, call, error, after=after)
    with pytest.raises((Refused, KeyboardInterrupt)):
        write_report(folder, NEW)
    assert contents(folder) == {**OLD, "notes.txt": b"mine"}


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("after", [False, True])
def test_a_rename_that_fails_leaves_nothing_where_nothing_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    fail_at(monkeypatch, call, OSError(errno.EIO, "I/O error"), after=after)
    with pytest.raises(Refused, match="the report is not written, i/o error"):
        write_report(tmp_path / "new" / "out", NEW)
    assert list(tmp_path.iterdir()) == []


def test_half_a_report_is_left_as_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "report.png").unlink()
    fail_at(monkeypatch, 1, OSError(errno.EIO, "I/O error"))
    with pytest.raises(Refused, match="not written"):
        write_report(folder, NEW)
    assert contents(folder) == {"report.json": b"old numbers", "notes.txt": b"mine"}


def test_links_are_left_as_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "report.png").unlink()
    (folder / "report.png").symlink_to("notes.txt")
    fail_at(monkeypatch, 1, OSError(errno.EIO, "I/O error"))
    with pytest.raises(Refused, match="not written"):
        write_report(folder, NEW)
    assert (folder / "report.png").readlink() == Path("notes.txt")
    assert (folder / "notes.txt").read_bytes() == b"mine"


def test_a_full_disk(folder: Path, refused: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
        if "w" in mode and self.name == "report.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *rest, **keywords)

    monkeypatch.setattr(Path, "open", full)
    line = refused("--input", inputs, "--output", folder, *FEW)
    assert line.endswith("the report is not written, no space left on device\n")
    assert contents(folder) == {**OLD, "notes.txt": b"mine"}


@pytest.mark.parametrize("error", [RuntimeError("no picture"), KeyboardInterrupt()])
def test_a_picture_that_fails_leaves_the_old_report(
    command: Any, inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(report: Any) -> bytes:
        raise error

    monkeypatch.setattr(plot, "plot", fail)
    arguments = ("--json", "--input", inputs, "--output", folder, *FEW)
    if isinstance(error, KeyboardInterrupt):
        result = command(*arguments)
        assert (result.code, result.out, result.err) == (130, "", INTERRUPTED)
    else:
        with pytest.raises(RuntimeError, match="no picture"):
            command(*arguments)
    assert contents(folder) == {**OLD, "notes.txt": b"mine"}


def test_an_interrupt_while_it_measures(
    command: Any, inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At a step, not at a time: where Python calls back it drops what a signal raises.
    begin, steps = measure._Progress.begin, iter(range(99))

    def interrupted(self: Any, what: str) -> None:
        begin(self, what)
        if next(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(measure._Progress, "begin", interrupted)
    # A program in the background of a script is started to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = command("--input", inputs, "--output", folder, "--backend", "numpy")
    finally:
        signal.signal(signal.SIGINT, before)
    assert next(steps) == 6
    assert (result.code, result.out, result.err) == (130, "", INTERRUPTED)
    assert contents(folder) == {**OLD, "notes.txt": b"mine"}


@pytest.mark.parametrize("where", ["file", "file/below", "x" * 300])
def test_where_no_folder_can_be(
    refused: Callable[..., str], inputs: Path, tmp_path: Path, where: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    there = contents(tmp_path)
    assert "--output" in refused("--input", inputs, "--output", tmp_path / where, *FEW)
    assert contents(tmp_path) == there


def test_where_nothing_may_be_written(
    refused: Callable[..., str], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so that the question's answer is changed.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    line = refused("--input", inputs, "--output", tmp_path / "new", *FEW)
    assert line == f"Error: --output {tmp_path / 'new'}: permission denied\n"
    assert not (tmp_path / "new").exists()
