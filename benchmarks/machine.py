"""The machine that the numbers were measured on: no paths, no names of users or hosts."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .rows import ROOT

_PACKAGES = (
    "randattn",
    "array-api-compat",
    "numpy",
    "torch",
    "jax",
    "jaxlib",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "performer-pytorch",
    "nystrom-attention",
    "linear-attention-transformer",
)


def describe() -> dict[str, Any]:
    """Describe the machine at the beginning of a session."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": _cores(),
        "memory_gib": _memory(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: at for name in _PACKAGES if (at := _version(name))},
        "blas": _blas(),
        "threads": _threads(),
        "load_average": _load(),
        "gpu": _gpu(),
    }
    return {name: value for name, value in found.items() if value is not None}


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> int | None:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _blas() -> dict[str, str]:
    about = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    # Most other entries are paths of the machine that built NumPy.
    return {name: str(about[name]) for name in ("name", "version", "openblas configuration") if name in about}


def _threads() -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].get_num_threads()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        if name in os.environ:
            found[name] = os.environ[name]
    return found


def _load() -> list[float] | None:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _gpu() -> dict[str, str] | None:
    """Ask the driver's own tool for the first device's name and the driver's version."""
    command = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        name, driver, memory = (part.strip() for part in answer.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return {"name": name, "driver": driver, "memory": memory}
