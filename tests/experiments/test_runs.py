"""Runs that are kept: a session that was stopped goes on where it was."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from experiments.runs import Mechanism, Run, carry_out, read

CONSOLE = Console(quiet=True)


def runs(**settings):
    return [Run("test", "torch", "softmax", seed, "cpu", {"power": 2, **settings}) for seed in range(3)]


def power(run, say):
    """The work of a run, in another process."""
    say(1, 1, "half way")
    if (folder := run.settings.get("marks")) is not None:
        mark = Path(folder) / str(run.seed)
        first = not mark.exists()
        mark.write_text("x" if first else "xx")
        if run.seed == 2 and first:
            raise RuntimeError("stopped")
    return {"value": float(run.seed ** run.settings["power"])}


def test_what_is_done_is_kept_and_not_done_again(tmp_path):
    path, own = tmp_path / "found.json", runs(marks=str(tmp_path))
    with pytest.raises(RuntimeError, match="seed 2 failed: stopped"):
        carry_out(path, own, power, CONSOLE, jobs=1)
    assert [one.run.seed for one in read(path)] == [0, 1]
    done = carry_out(path, own, power, CONSOLE, jobs=2)
    assert [one.found["value"] for one in done] == [0.0, 1.0, 4.0]
    assert done == read(path)
    assert [(tmp_path / str(seed)).read_text() for seed in range(3)] == ["x", "x", "xx"]
    assert not path.with_suffix(".new").exists()


def slow(run, say):
    """One fails while another is under way."""
    time.sleep(0.5 if run.seed == 0 else 1.5)
    if run.seed == 0:
        raise ValueError("no result")
    return {"value": 1.0}


def test_what_is_under_way_when_one_fails_is_kept(tmp_path):
    path = tmp_path / "found.json"
    with pytest.raises(RuntimeError, match="torch softmax, seed 0 failed: no result"):
        carry_out(path, runs(), slow, CONSOLE, jobs=2)
    assert 1 in [one.run.seed for one in read(path)]


def test_other_settings_are_another_run(tmp_path):
    path = tmp_path / "found.json"
    carry_out(path, runs(), power, CONSOLE, jobs=1)
    done = carry_out(path, runs(power=3), power, CONSOLE, jobs=1)
    assert [one.found["value"] for one in done] == [0.0, 1.0, 8.0]
    assert len(read(path)) == 3


def test_settings_are_compared_as_they_are_read(tmp_path):
    """Tuples come back from JSON as lists."""
    path, own = tmp_path / "found.json", runs(marks=None, sizes=(1, 2))
    first = carry_out(path, own, power, CONSOLE, jobs=1)
    before = json.loads(path.read_text())
    again = carry_out(path, own, power, CONSOLE, jobs=1)
    assert [one.seconds for one in again] == [one.seconds for one in first]
    assert json.loads(path.read_text()) == before


def test_a_mechanism_gives_a_layer_its_keywords():
    found = Mechanism("lara", {"num_landmarks": 4}, {"learned_landmarks": True}).layer()
    assert found == {"estimator": "lara", "options": {"num_landmarks": 4}, "learned_landmarks": True}


def test_a_label_tells_runs_apart():
    first = runs()[0]
    labels = {first.label, replace(first, seed=1).label, replace(first, method="rfa").label}
    assert len(labels | {replace(first, library="jax").label}) == 4
