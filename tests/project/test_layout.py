"""Hold the sources to their layout: floors of imports, no circle, libraries named in few places, small files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import randattn
from tests.project import guards
from tests.project.guards import Import

PACKAGE = Path(randattn.__file__).parent
ROOT = Path(__file__).parents[2]
MODULES = guards.modules_of(PACKAGE)
# A module may import modules of its own floor and of lower ones, which come first here.
FLOORS = ("_core", "_backends", "_tokens", "_estimators", "_study", "data", "integrations", "cli")
MAY_NAME_A_LIBRARY = ("_backends", "integrations", "cli")


def floor_of(module: str) -> int:
    """Return the floor's number; that of `randattn` itself is above all."""
    first = module.split(".", maxsplit=1)[0]
    return FLOORS.index(first) if first in FLOORS else len(FLOORS)


def test_every_module_has_its_floor():
    folders = {name.split(".", maxsplit=1)[0] for name in MODULES} - {"__init__", "__main__"}
    assert folders == set(FLOORS)


def test_imports_point_down():
    imports = guards.imports_of(PACKAGE)
    assert len(imports) > 200
    assert guards.upward(imports, floor_of) == []


def test_the_core_imports_nothing_else():
    imports = guards.imports_of(PACKAGE)
    found = {
        one for one in imports if one.importer.startswith("_core.") and not one.imported.startswith("_core.")
    }
    assert found == set()


def test_no_circle():
    assert guards.circle(guards.imports_of(PACKAGE)) == []


def test_few_modules_name_a_library():
    named = guards.naming_a_library(PACKAGE)
    assert "_backends.torch" in named
    outside = {name for name in named if name.split(".", maxsplit=1)[0] not in MAY_NAME_A_LIBRARY}
    assert outside == {"_core.draws"}


def plant(folder: Path, **modules: str) -> Path:
    """Make a package of these modules, whose folders are named before two underscores."""
    package = folder / "planted"
    for name, text in modules.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_guards_find_what_is_planted(tmp_path):
    """Faults in folders, in late imports and in absolute ones, which a flat look would pass over."""
    package = plant(
        tmp_path,
        _core__low="def late():\n    from .._estimators import high\n",
        _estimators__high="from .._core.low import late\n",
        _estimators__named="import planted._core.low\n\ndef is_it(x):\n    return compat.is_jax_array(x)\n",
        _core__documented='"""Of jax, torch and dask, in a docstring alone."""\n',
    )
    imports = guards.imports_of(package)
    assert guards.circle(imports) == ["_core.low", "_estimators.high", "_core.low"]
    assert guards.upward(imports, floor_of) == [Import("_core.low", "_estimators.high")]
    assert Import("_estimators.named", "_core.low") in imports
    assert guards.naming_a_library(package) == {"_estimators.named"}


@pytest.mark.parametrize(
    "text",
    [
        "import torch",
        "from jax import numpy",
        "x = _fused_jax.attend",
        'sys.modules["cupy"]',
        "compat.is_torch_namespace(xp)",
        "dask.array",
    ],
)
def test_every_way_to_name_a_library_is_found(tmp_path, text):
    assert guards.naming_a_library(plant(tmp_path, one=text, other="import numpy")) == {"one"}


def test_import_brings_no_array_library():
    """In a fresh interpreter, where all of them may be installed."""
    code = "import sys, randattn; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "randattn" in loaded
    heavy = {
        "torch",
        "jax",
        "cupy",
        "dask",
        "array_api_strict",
        "numpy",
        "scipy",
        "rich",
        "click",
        "matplotlib",
    }
    assert not heavy & set(loaded)


def test_the_hot_loop_stands_once():
    """Exponentials of logits are taken where the average is, and by no estimator that is no exception."""
    counts = guards.exponentials(PACKAGE)
    assert counts["_core.average"] > 0
    # RFA's signed features are no average, nor are kernels of pairs; RA samples from a row; LARA's weights
    # are probabilities; EVA's state counts keys; what is concluded is looked at weight by weight.
    allowed = {
        *(
            "_core.average",
            "_backends.inplace",
            "_estimators.rfa",
            "_estimators.rfa_features",
            "_estimators.ra",
        ),
        *("_estimators.lara_weights", "_estimators.eva_step", "_estimators.final_average"),
    }
    assert {name for name, count in counts.items() if count} == allowed


def test_files_and_functions_stay_small():
    """Files of 400 lines, functions of 60 lines and 20 parameters; the papers' estimators have more options."""
    assert len(MODULES) > 60
    checked = 0
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 400, path
        for function in guards.functions_of(path):
            checked += 1
            assert guards.body_lines(function) <= 60, (name, function.name, guards.body_lines(function))
            if (name, function.name) not in (("_estimators.eva", "eva"), ("_estimators.lara", "lara")):
                assert guards.parameters(function) <= 20, (name, function.name)
    assert checked > 400


def test_files_beside_the_package_stay_small():
    files = [
        path for folder in ("tests", "benchmarks", "experiments") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 80
    files.append(ROOT / "noxfile.py")
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_comments_are_neither_few_nor_many():
    share = guards.comment_share(MODULES.values())
    assert 0.03 <= share <= 0.06, f"{share:.2%}"


def test_everything_public_is_documented():
    """numpydoc sections, with an example each."""
    for name in randattn.__all__:
        text = getattr(randattn, name).__doc__
        assert text, name
        if not isinstance(getattr(randattn, name), type):
            for section in ("Parameters", "Returns", "Raises", "Examples"):
                assert f"{section}\n" in text, (name, section)


def test_no_file_names_a_machines_path():
    texts = [
        path
        for folder in ("src", "tests", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.[pm][yd]")
    ]
    texts += [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("*.toml")]
    assert len(texts) > 150
    for path in texts:
        if "_build" not in path.parts and path != Path(__file__):
            assert not re.search(r"/work/|/opt/|/root/|\.library/", path.read_text()), path
