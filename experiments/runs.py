"""Runs of an experiment: each is saved when it ends, so that a stopped session can go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from queue import Queue

    from rich.console import Console

    Say = Callable[[int, int, str], None]
    Work = Callable[["Run", Say], dict[str, Any]]

FOLDER = Path(__file__).parent / "results"
# Runs share a CPU, one a core: small models use one core well and two badly.
_JOBS = os.cpu_count() or 1
_POLL = 0.2


@dataclass(frozen=True)
class Mechanism:
    """An estimator with its options, as a model's layer takes them."""

    estimator: str
    options: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, bool] = field(default_factory=dict)

    def layer(self) -> dict[str, Any]:
        """Return the keywords of `Attention`."""
        return {"estimator": self.estimator, "options": self.options, **self.learned}


@dataclass(frozen=True)
class Run:
    """One training, or one series of measurements, by its settings.

    The code is not among the settings: after a change of the code that changes results, delete the file.
    """

    experiment: str
    library: str
    method: str
    seed: int
    device: str
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """The run's line in the progress."""
        return f"{self.library} {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Done:
    """A run, its results, its time, and the machine, packages and commit that made it."""

    run: Run
    found: dict[str, Any]
    seconds: float
    machine: dict[str, Any]


def carry_out(
    path: Path, runs: Sequence[Run], work: Work, console: Console, *, jobs: int | None = None
) -> list[Done]:
    """Carry out the runs that the file lacks, and add each to the file as soon as it ends.

    Parameters
    ----------
    path : Path
        The results. Runs of other settings that stand in it are dropped.
    runs : sequence of Run
    work : function
        A module's own, ``work(run, say)``, where ``say(done, of, text)`` shows progress.
    console : Console
        Where progress is shown.
    jobs : int, optional
        Processes at a time; by default one a core, or one on a GPU.

    Returns
    -------
    list of Done
        In the order of `runs`.

    Raises
    ------
    RuntimeError
        Where a run fails: those under way are kept, the others are not begun.
    """
    plain = {name: _plain(run) for name, run in enumerate(runs)}
    kept = read(path)
    found = {name: one for name, run in plain.items() for one in kept if _plain(one.run) == run}
    todo = [name for name in plain if name not in found]
    if not todo:
        return [found[name] for name in plain]
    console.print(f"{len(found)} of {len(runs)} runs are in {path.name}, {len(todo)} to do")
    machine_now = machine.describe()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    on_gpu = any(run.device != "cpu" for run in runs)
    context = multiprocessing.get_context("spawn")
    failed: list[tuple[Run, BaseException]] = []
    with (
        context.Manager() as manager,
        Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as progress,
        ProcessPoolExecutor(
            jobs or (1 if on_gpu else _JOBS), context, initializer=None if on_gpu else _one_thread
        ) as pool,
    ):
        queue = manager.Queue()
        all_of_them = progress.add_task("runs", total=len(runs), completed=len(found), text="")
        bars: dict[str, Any] = {}
        pending = {pool.submit(_carry_out, work, runs[name], queue): name for name in todo}
        try:
            while pending:
                ready, _ = wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    label, done, total, text = queue.get()
                    if label not in bars:
                        bars[label] = progress.add_task(label, text=text)
                    progress.update(bars[label], completed=done, total=total, text=text)
                for future in ready:
                    name = pending.pop(future)
                    if future.cancelled():
                        continue
                    if (error := future.exception()) is not None:
                        failed.append((runs[name], error))
                        # Runs under way are waited for, and kept.
                        for other in pending:
                            other.cancel()
                        continue
                    result, seconds = future.result()
                    found[name] = Done(runs[name], result, seconds, machine_now)
                    _write(path, [found[one] for one in sorted(found)])
                    if runs[name].label in bars:
                        progress.remove_task(bars.pop(runs[name].label))
                    progress.advance(all_of_them)
                    console.print(f"{runs[name].label}: {seconds:.0f} s, {_few(result)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        run, error = failed[0]
        raise RuntimeError(f"{run.experiment}: {run.label} failed: {error}") from error
    return [found[name] for name in sorted(found)]


def read(path: Path) -> list[Done]:
    """Read the runs of a file; none where there is no file."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [Done(Run(**row["run"]), row["found"], row["seconds"], row["machine"]) for row in rows]


def _write(path: Path, done: Sequence[Done]) -> None:
    """Write the file whole, or leave the old one."""
    lines = ",\n    ".join(json.dumps(asdict(one), allow_nan=False) for one in done)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(f'{{\n  "runs": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")
    new.replace(path)


def _plain(run: Run) -> Any:
    """Return a run in the form that a file has."""
    return json.loads(json.dumps(asdict(run)))


def _one_thread() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def _carry_out(work: Work, run: Run, queue: Queue[Any]) -> tuple[dict[str, Any], float]:
    def say(done: int, total: int, text: str) -> None:
        queue.put((run.label, done, total, text))

    start = time.perf_counter()
    found = work(run, say)
    return found, round(time.perf_counter() - start, 1)


def _few(found: dict[str, Any]) -> str:
    """Return the numbers of a result as text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
