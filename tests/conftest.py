"""One suite, any library: `pytest tests/shared --backend torch --device cuda`."""

from __future__ import annotations

import pytest

from tests.libraries import LIBRARIES, Library, open_library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="numpy", choices=sorted(LIBRARIES), help="the array library")
    parser.addoption("--device", default=None, help="its device, where it has several")


@pytest.fixture(scope="session")
def lib(request: pytest.FixtureRequest) -> Library:
    return open_library(request.config.getoption("--backend"), request.config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("--backend")
    for item in items:
        only = item.get_closest_marker("only")
        if only is not None and backend not in only.args:
            item.add_marker(pytest.mark.skip(reason=f"for {', '.join(only.args)}"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(*libraries): the test is about these array libraries")
