"""Sequences on 8 devices: what the compiled programs send does not grow with the sequence."""

import json
import subprocess
import sys

import pytest

from benchmarks import sharding
from tests.programs import sharded

pytest.importorskip("jax")

# A process of its own compiles for minutes.
pytestmark = pytest.mark.thorough("numpy")

KINDS = {
    "Auto": tuple(sharded.CASES),
    "Explicit": sharded.EXPLICIT,
    "Auto gradient": sharded.WITH_GRADIENTS,
    "Auto in blocks": sharded.IN_BLOCKS,
}
RUNS = [(kind, name) for kind, names in KINDS.items() for name in names]


@pytest.fixture(scope="module")
def compiled():
    found = subprocess.run(
        [sys.executable, "-m", "tests.programs.sharded"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture
def pair(compiled, kind, name):
    """The case at both lengths."""
    rows = [row for row in compiled["rows"] if (row["kind"], row["case"]) == (kind, name)]
    assert [row["tokens"] for row in rows] == list(sharded.LENGTHS)
    return rows


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_results_are_those_of_one_device(pair):
    for row in pair:
        assert row["error"] < 1e-9


def test_results_are_right_where_keys_may_be_gathered(compiled):
    assert [row["case"] for row in compiled["others"]] == list(sharded.OTHERS)
    for row in compiled["others"]:
        assert row["error"] < 1e-9, row


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_results_lie_along_the_tokens(pair):
    assert all(row["along_tokens"] for row in pair)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_no_key_is_gathered(pair, name):
    """Whatever the length, as many bytes: of groups, of pieces of them, and of windows' edges."""
    short, long = pair
    assert short["bytes"] > 0
    if name == "eva group_size":
        # Of groups, which are as many as the tokens allow.
        assert long["bytes"] == 2 * short["bytes"]
        count = sharded.LENGTHS[0] // sharded.WINDOW
    else:
        assert long["bytes"] == short["bytes"]
        assert max(row["longest"] for row in pair) < sharded.LENGTHS[0] // sharding.DEVICES
        count = 24 + 2 * sharding.DEVICES
    per_group = 2 * (sharded.FEATURES + 1) + sharded.VALUES + 2
    edges = 2 * 3 * 16 * (2 * sharded.FEATURES + sharded.VALUES)
    # Forward and backward, and where samples come in pairs.
    assert short["bytes"] <= 8 * sharded.HEADS * (4 * count * per_group + 2 * edges)


@pytest.mark.parametrize(("label", "groups", "window"), sharded.COUNTED)
def test_the_cost_model_has_the_bytes_of_the_program(compiled, label, groups, window):
    (counted,) = [
        sharding.Traffic(*numbers)
        for *case, numbers in compiled["counts"]
        if tuple(case) == (label, groups, window)
    ]
    assert counted == sharding.traffic(label, sharded.layout_of(groups, window))
