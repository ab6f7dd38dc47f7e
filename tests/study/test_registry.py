"""The registry of estimators: one row is enough."""

import inspect
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import randattn
from randattn._estimators.registry import ESTIMATORS, by_label, row_of

ROOT = Path(__file__).parents[2]


def test_every_public_estimator_has_a_row():
    """A public function of q, k and v with a scale is an estimator."""
    public = {name: getattr(randattn, name) for name in randattn.__all__}
    estimators = {
        name
        for name, function in public.items()
        if inspect.isfunction(function) and "scale" in inspect.signature(function).parameters
    }
    assert estimators == set(ESTIMATORS)
    assert all(row_of(public[name]) is row for name, row in ESTIMATORS.items())
    assert row_of(len) is None


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_row_is_true_of_its_function(name):
    row = ESTIMATORS[name]
    options = row.options
    assert row.count is None or row.count in options
    assert (row.draws == "never") == ("rng" not in options)
    assert row.is_causal == ("is_causal" in options and name != "ra")
    assert (row.landmarks is not None) == ("landmarks" in options)
    assert (row.step is not None) == ("return_state" in options)
    assert set(row.across) <= set(options)
    assert by_label()[row.label] is row
    assert len({one.colour for one in ESTIMATORS.values()}) == len(ESTIMATORS)


@pytest.mark.only("numpy")
def test_a_toy_estimator_is_found_everywhere(lib):
    """In compare, diagnose, multiply_adds, layers of PyTorch and Flax, the capability table."""
    if find_spec("torch") is None or find_spec("rich") is None:
        pytest.skip("no PyTorch, or not the command's packages")
    command = [sys.executable, "-m", "tests.programs.toy_estimator"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "found everywhere\n"


@pytest.mark.only("numpy")
def test_the_recipe_is_that_code(lib):
    """CONTRIBUTING shows the file of the toy estimator as it is run here."""
    program = (ROOT / "tests" / "programs" / "toy_estimator.py").read_text()
    own = program.partition("# The file of the estimator begins here.\n")[2]
    own, _, row = own.partition("# The file ends here. The row of the registry:\n")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert own.strip() in text
    (line,) = (line.strip() for line in row.splitlines() if line.strip().startswith("row = Estimator("))
    assert line.removeprefix("row = ") in text
