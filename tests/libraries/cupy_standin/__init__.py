"""A stand-in for CuPy that needs no device: NumPy underneath, CuPy's signatures, its refusals, and counts.

Only what CuPy's recording (record.py, cupy.json) has is there. It is stricter than CuPy in one thing: an
index on the host, which CuPy copies at each use, is refused.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from . import names
from .arrays import COUNTS, Device, ndarray

__all__ = ["COUNTS", "install"]


def install() -> ModuleType:
    """Have `import cupy` give the stand-in."""
    found = sys.modules.get("cupy")
    if found is not None:
        if found.ndarray is not ndarray:
            raise RuntimeError("cupy: expected not to be imported yet, got CuPy itself")
        return found
    cupy = module("cupy", __version__=names.VERSION, **dict(names.members("cupy", np)))
    cupy.cuda = module("cupy.cuda", Device=Device, device=module("cupy.cuda.device", Device=Device))
    for name in ("fft", "linalg", "random"):
        own = dict(names.members(f"cupy.{name}", getattr(np, name)))
        setattr(cupy, name, module(f"cupy.{name}", **own))
    return cupy


def module(name: str, **members: Any) -> Any:
    """A module that can be imported by this name."""
    made = sys.modules[name] = ModuleType(name)
    vars(made).update(members, __spec__=ModuleSpec(name, None))
    return made
