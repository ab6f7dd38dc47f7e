"""The examples of the README and of docs/ run as they stand."""

import contextlib
import io
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.libraries import cupy_standin as standin

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Those with a test of their own: what they show needs several devices or processes, or other packages.
ELSEWHERE = {"sharding.md", "dask.md", "torch_distributed.md", "integrations.md"}


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


BLOCKS = blocks(ROOT / "README.md")


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
    """Each block runs alone, as it is pasted."""
    if number == 3 and find_spec("cupy") is None:
        standin.install()
    if number == 1:
        # The example's default back end wants a C compiler; what it traces is the same.
        torch = pytest.importorskip("torch")
        compiled = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, **options: compiled(f, backend="aot_eager", **options)
        )
    scope = {}
    exec(BLOCKS[number], scope)
    if number:
        assert scope["out"].shape == (8, 1024, 64)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.stem
)
def test_page(page, tmp_path, monkeypatch):
    """Its blocks one after the other; a line number of the page says where one fails.

    What a block prints is what the text after it says, its numbers but for the last digit.
    """
    # A block may write a file.
    monkeypatch.chdir(tmp_path)
    scope, text = {}, page.read_text()
    for block in blocks(page):
        start = text.index(block)
        lines = text[:start].count("\n")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * lines + block, page.name, "exec"), scope)
        said = re.match(r"```\n\n```text\n(.*?)```", text[start + len(block) :], flags=re.DOTALL)
        if said:
            ours, theirs = (re.split(r"(\d+\.\d+)", each) for each in (printed.getvalue(), said.group(1)))
            assert ours[::2] == theirs[::2]
            for x, y in zip(ours[1::2], theirs[1::2], strict=True):
                assert abs(float(x) - float(y)) < 1.5 * 10 ** -len(y.partition(".")[2])
