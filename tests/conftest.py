"""One suite, any library: `pytest tests/shared --backend torch --device cuda`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests import calls
from tests.libraries import LIBRARIES, Library, open_library

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="numpy", choices=sorted(LIBRARIES), help="the array library")
    parser.addoption("--device", default=None, help="its device, where it has several")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A stand-in is held to what its library is.
    backend = config.getoption("--backend").removesuffix("-standin")
    for item in items:
        only = item.get_closest_marker("only")
        if only is not None and backend not in only.args:
            item.add_marker(pytest.mark.skip(reason=f"for {', '.join(only.args)}"))


def pytest_configure(config: pytest.Config) -> None:
    # JAX compiles every operation for every shape, Dask builds a graph: fewer examples there.
    examples = {"jax": 15, "dask": 60}.get(config.getoption("--backend"), 300)
    hypothesis.settings.register_profile("suite", max_examples=examples, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("suite")
    config.addinivalue_line("markers", "only(*libraries): the test is about these array libraries")
