"""Peak memory of one call, in a process of its own: `python -m benchmarks.memory CASE`, CASE in JSON.

On the CPU it is the system's count of the process's pages (VmHWM of Linux, reset before the call; else
the process's largest size so far), which includes the allocations of every library; on a GPU it is the
count of the library's own allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .baselines import open_library
from .cases import Workbench
from .rows import OUTPUT, ROOT, Case, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from .baselines import Library

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_QUADRATIC = ("ra", "softmax_attention")


def memory_row(case: Case) -> Row | None:
    """Measure a case in a fresh process; None where the system does not say."""
    command = (sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(case)))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {case}: the process failed\n{done.stderr.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["bytes"] is None:
        return None
    return Row(
        "memory",
        case,
        OUTPUT,
        bytes=found["bytes"],
        baseline_bytes=found["output"],
        ratio=found["bytes"] / found["output"],
        note=found["note"],
    )


def main(plain: str) -> None:
    """Measure in this process: print the bytes beyond the inputs, the output's bytes, and their counter."""
    case = Case(**json.loads(plain))
    library = open_library(case.library, "cpu" if case.device == "cpu" else "cuda")
    bench = Workbench(library)
    # Memory that the first call loads, allocates and keeps does not belong to this one.
    tokens = min(case.tokens, 1024 if case.estimator in _QUADRATIC else 4096)
    library.own.wait(Workbench(library).call(replace(case, tokens=tokens))())

    arrays = bench.arrays(case)
    function = bench.function(case)
    itemsize = 2 if case.dtype.endswith("16") else 4
    output = arrays[0].size if library.name != "torch" else arrays[0].numel()
    if library.name == "jax":
        function = function.lower(*arrays).compile() if case.mode == "jit" else function
    found, note = peak(library, lambda: function(*arrays), function)
    # The forward pass's output, also where the call gives gradients.
    print(json.dumps({"bytes": found, "output": output * itemsize, "note": note}))


def peak(library: Library, call: Callable[[], Any], function: Any = None) -> tuple[int | None, str | None]:
    """Return the most bytes that a call holds beyond those held before it, and who counted them."""
    if not library.on_gpu:
        return _of_process(library, call)
    if library.name == "torch":
        cuda = library.xp.cuda
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        out = call()
        cuda.synchronize()
        del out
        return cuda.max_memory_allocated() - before, "torch's allocator"
    if library.name == "jax":
        # The allocator's peak cannot be reset after the program is tuned.
        about = function.memory_analysis()
        return about.temp_size_in_bytes + about.output_size_in_bytes, "as compiled by XLA"
    return _of_cupy(library, call)


def _of_cupy(library: Library, call: Callable[[], Any]) -> tuple[int, str]:
    pool = library.xp.get_default_memory_pool()
    hooks = import_module("cupy.cuda.memory_hook")
    before = most = pool.used_bytes()

    class Peak(hooks.MemoryHook):  # type: ignore[misc, name-defined]
        name = "peak"

        def malloc_postprocess(self, **_: Any) -> None:
            nonlocal most
            most = max(most, pool.used_bytes())

    with Peak():
        library.own.wait(call())
    return most - before, "CuPy's memory pool"


def _of_process(library: Library, call: Callable[[], Any]) -> tuple[int | None, str | None]:
    gc.collect()
    _trim()
    try:
        # 5 resets the peak to the present size.
        _CLEAR.write_text("5")
        before = _status("VmRSS")
        library.own.wait(call())
        return _status("VmHWM") - before, None
    except OSError:
        return _of_ever(library, call)


def _of_ever(library: Library, call: Callable[[], Any]) -> tuple[int | None, str | None]:
    """Return the growth of the largest size so far, for systems without /proc; None where it did not grow."""
    try:
        resource = import_module("resource")
    except ImportError:
        return None, None
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    library.own.wait(call())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return (grown * unit, "growth of ru_maxrss") if grown else (None, None)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1]) * 1024


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: reused memory would not be counted."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


if __name__ == "__main__":
    main(sys.argv[1])
