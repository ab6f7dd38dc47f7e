"""What the sources promise: light import, one hot loop, libraries named in two places."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import randattn

SOURCES = sorted(Path(randattn.__file__).parent.glob("*.py"))
LIBRARIES = ("torch", "jax", "cupy", "dask", "array_api_strict")


def test_import_brings_no_array_library():
    """In a fresh interpreter, where all of them may be installed."""
    code = "import sys, randattn; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "randattn" in loaded
    assert not {*LIBRARIES, "numpy", "scipy", "rich", "click", "matplotlib"} & set(loaded)


def code_without_texts(path):
    """A module's code, less its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            node.value.value = ""
    return ast.unparse(tree)


def test_few_files_name_a_library():
    named = {
        path.name
        for path in SOURCES
        if re.search(rf"\b(?:is_)?({'|'.join(LIBRARIES)})\b|is_\w+_namespace", code_without_texts(path))
    }
    assert named == {
        "_draws.py",
        "_fused.py",
        "_fused_torch.py",
        "_fused_jax.py",
        "_fused_dask.py",
        "_fused_jax_mesh.py",
        "_tracing.py",
    }


def test_the_hot_loop_stands_once():
    """Exponentials of logits are taken where the average is, and by no estimator that is no exception."""
    exponentials = {path.name: len(re.findall(r"\bxp\.exp\(", code_without_texts(path))) for path in SOURCES}
    assert exponentials["_attend.py"] > 0
    # RFA's signed features are no average, nor are kernels of pairs; RA samples from a row; LARA's weights
    # are probabilities; EVA's state counts keys; what is concluded is looked at weight by weight.
    allowed = {
        "_attend.py",
        "_inplace.py",
        "_rfa.py",
        "_rfa_features.py",
        "_ra.py",
        "_lara_weights.py",
        "_eva_step.py",
        "_eva_keys.py",
        "_eva_exact.py",
        "_conclude.py",
    }
    assert {name for name, count in exponentials.items() if count} <= allowed
    for name in ("_softmax.py", "_eva.py"):
        assert exponentials[name] == 0


def test_files_stay_small():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_everything_public_is_documented():
    """numpydoc sections, with an example each."""
    for name in randattn.__all__:
        text = getattr(randattn, name).__doc__
        assert text, name
        if not isinstance(getattr(randattn, name), type):
            for section in ("Parameters", "Returns", "Raises", "Examples"):
                assert f"{section}\n" in text, (name, section)


def test_no_file_names_a_machines_path():
    root = Path(__file__).parents[2]
    for path in [*SOURCES, *root.glob("*.md"), *root.glob("*.py"), *root.glob("*.toml")]:
        assert not re.search(r"/work/|/opt/|/root/|\.library", path.read_text()), path
