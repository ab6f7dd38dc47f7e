import pytest

from tests.blocks import make_small


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """A few tokens in one block, or in several of them."""
    if request.param == "blocks":
        make_small(monkeypatch)
