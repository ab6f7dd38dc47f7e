"""One suite, any library: `pytest tests/average --backend torch --device cuda`.

Mathematics is tested on NumPy; the other libraries are held to NumPy by `tests.programs.agreement`, which is quick. Where a
test has to compile a program for each of its cases, on PyTorch, JAX and Dask, the suite leaves out, without `--thorough`, forms
of an estimator beyond its first and tests that are marked `mathematics`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.helpers import calls
from tests.helpers.blocks import make_small
from tests.helpers.forms import VARIANTS
from tests.helpers.libraries import LIBRARIES, Library, open_library

if TYPE_CHECKING:
    from collections.abc import Iterator

# Libraries on which most of a test's time is that of making programs.
SLOW = ("torch", "jax", "dask")
_durations: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="numpy", choices=sorted(LIBRARIES), help="the array library")
    parser.addoption("--device", default=None, help="its device, where it has several")
    parser.addoption(
        "--thorough", action="store_true", help="all forms of estimators, and mathematics, everywhere"
    )


def pytest_configure(config: pytest.Config) -> None:
    # JAX compiles every operation for every shape, Dask builds a graph: fewer examples there.
    examples = {"jax": 15, "dask": 60}.get(config.getoption("--backend"), 300)
    hypothesis.settings.register_profile("suite", max_examples=examples, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("suite")
    config.addinivalue_line("markers", "only(*libraries): the test is about these array libraries")
    config.addinivalue_line("markers", "mathematics: the test is of formulas that all libraries share")
    config.addinivalue_line("markers", "thorough(*libraries): on these libraries with --thorough alone")


@pytest.fixture(scope="session")
def lib(request: pytest.FixtureRequest) -> Library:
    return open_library(request.config.getoption("--backend"), request.config.getoption("--device"))


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """JAX keeps every program that it compiles: thousands in this suite, gigabytes."""
    yield
    if "jax" in sys.modules:
        calls.forget()
        sys.modules["jax"].clear_caches()


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """A few tokens in one block, or in several of them."""
    if request.param == "blocks":
        make_small(monkeypatch)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A stand-in is held to what its library is.
    backend = config.getoption("--backend").removesuffix("-standin")
    left_out, kept = [], []
    for item in items:
        only = item.get_closest_marker("only")
        if only is not None and backend not in only.args:
            item.add_marker(pytest.mark.skip(reason=f"for {', '.join(only.args)}"))
        is_quick = config.getoption("--thorough") or not _is_thorough(item, backend)
        (kept if is_quick else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _is_thorough(item: pytest.Item, backend: str) -> bool:
    """Tell whether the quick suite leaves a test out on this library."""
    marked = item.get_closest_marker("thorough")
    if marked is not None and backend in marked.args:
        return True
    if item.config.getoption("--backend") == "cupy-standin" and item.get_closest_marker("mathematics"):
        # The stand-in computes by NumPy: its formulas are NumPy's.
        return True
    if backend not in SLOW:
        return False
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    is_variant = any(isinstance(value, str) and value in VARIANTS for value in values)
    return is_variant or (backend != "torch" and item.get_closest_marker("mathematics") is not None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _durations[report.nodeid] = _durations.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Append the slowest tests to a file that the caller names, who prints them at last."""
    path = os.environ.get("RANDATTN_DURATIONS")
    if not path or hasattr(session.config, "workerinput"):
        return
    backend = session.config.getoption("--backend")
    slowest = sorted(_durations.items(), key=lambda one: -one[1])[:10]
    with Path(path).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps([seconds, backend, name]) + "\n" for name, seconds in slowest)
