"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples_for_four_libraries():
    assert [re.search(r"import (\w+)", block).group(1) for block in BLOCKS] == [
        "numpy",
        "torch",
        "jax",
        "cupy",
    ]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("number", range(4), ids=["numpy", "torch", "jax", "cupy"])
def test_example(number, monkeypatch):
    if number == 3:
        pytest.importorskip("cupy", exc_type=ImportError)
    if number == 1:
        # The example's default back end wants a C compiler; what it traces is the same.
        torch = pytest.importorskip("torch")
        compiled = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, **options: compiled(f, backend="aot_eager", **options)
        )
    scope = {}
    exec(BLOCKS[0], scope)
    exec(BLOCKS[number], scope)
    if number:
        assert scope["out"].shape == (8, 1024, 64)
