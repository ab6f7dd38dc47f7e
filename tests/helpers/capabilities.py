"""The capabilities of each estimator on each library: the tests hold them, and the documentation prints them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from randattn._estimators.registry import ESTIMATORS

LIBRARIES = ("numpy", "torch", "jax", "cupy", "strict", "dask")
NAMES = {
    "numpy": "NumPy",
    "torch": "PyTorch",
    "jax": "JAX",
    "cupy": "CuPy",
    "strict": "array-api-strict",
    "dask": "Dask",
}


class Capability(NamedTuple):
    """Something that is asked of an estimator, and the libraries that have it."""

    title: str
    libraries: tuple[str, ...]


# Options that make a call small; a row of the registry that is not here is called as it comes.
_SMALL: dict[str, dict[str, Any]] = {
    "rfa": {"num_samples": 8},
    "lara": {"num_landmarks": 4},
    "eva": {"window": 4},
    "adaptive_eva": {"group_size": 3, "num_exact": 3},
}
# Forms of an estimator that can do less.
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {"rfa, trigonometric": ("rfa", {"features": "trigonometric"})}


def calls() -> dict[str, Any]:
    """Give a call of each estimator in the registry, and of each form that can do less."""
    found = {}
    for name, (of, options) in {**{row: (row, {}) for row in ESTIMATORS}, **_FORMS}.items():
        row = ESTIMATORS[of]
        draws = {} if row.draws == "never" else {"rng": 0}
        found[name] = partial(row.function, **_SMALL.get(of, {}), **draws, **options)
    return found


def without(capability: str) -> set[str]:
    """Name the calls that do not have a capability."""
    if capability != "causal":
        return set()
    return {name for name, row in ESTIMATORS.items() if not row.is_causal} | set(_FORMS)


CAPABILITIES = {
    "masked": Capability("padding", LIBRARIES),
    "grouped": Capability("grouped heads", LIBRARIES),
    "causal": Capability("causal", LIBRARIES),
    "half": Capability("half precision", ("numpy", "torch", "jax", "cupy")),
    "compiled": Capability("jit, torch.compile", ("torch", "jax")),
    "gradient": Capability("gradients", ("torch", "jax")),
}


def table() -> str:
    """Give the table of the documentation: estimators by capabilities."""
    lines = ["| | " + " | ".join(each.title for each in CAPABILITIES.values()) + " |"]
    lines.append("|---" * (len(CAPABILITIES) + 1) + "|")
    for name in calls():
        cells = []
        for key, each in CAPABILITIES.items():
            where = ", ".join(NAMES[library] for library in each.libraries)
            cells.append("no" if name in without(key) else "all" if each.libraries == LIBRARIES else where)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)
