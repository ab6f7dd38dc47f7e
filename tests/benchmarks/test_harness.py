"""The clock that the benchmarks go by, with a clock of our own."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import best, best_ratio, race
from benchmarks.rows import Case, Row, read, time_row, write


class Machine:
    """Calls that take the seconds that they are told to, and a clock that knows."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def clock(self):
        return self.now

    def call(self, name, seconds):
        remaining = iter(seconds)

        def run():
            self.log.append(name)
            self.now += next(remaining)
            return name

        return run


def test_calls_take_turns_after_a_warm_up():
    machine = Machine()
    calls = {name: machine.call(name, [1.0] * 9) for name in "abc"}
    race(calls, rounds=2, sets=2, clock=machine.clock)
    assert machine.log == list("abc") * 5


def test_the_warm_up_does_not_count():
    machine = Machine()
    medians = race({"a": machine.call("a", [100.0, 1.0, 2.0, 3.0])}, rounds=3, sets=1, clock=machine.clock)
    assert medians == {"a": (2.0,)}


seconds = st.integers(1, 1000).map(float)


# Fewer than elsewhere: each collects the garbage of all libraries that are loaded.
@settings(max_examples=10)
@given(st.lists(st.tuples(seconds, seconds), min_size=10, max_size=10))
def test_medians_of_each_set(pairs):
    machine = Machine()
    a, b = zip(*pairs, strict=True)
    calls = {"a": machine.call("a", (1.0, *a)), "b": machine.call("b", (1.0, *b))}
    medians = race(calls, rounds=5, sets=2, clock=machine.clock)
    assert medians == {
        "a": (sorted(a[:5])[2], sorted(a[5:])[2]),
        "b": (sorted(b[:5])[2], sorted(b[5:])[2]),
    }


def test_the_device_is_waited_for_within_the_time():
    machine = Machine()

    def wait(out):
        assert out == "a"
        machine.now += 10.0

    medians = race({"a": machine.call("a", [1.0] * 9)}, wait=wait, rounds=1, sets=1, clock=machine.clock)
    assert medians == {"a": (11.0,)}


def test_a_time_of_several_calls_is_their_mean():
    machine = Machine()
    call = machine.call("a", [9.0, 1.0, 2.0, 6.0])
    assert race({"a": call}, rounds=1, sets=1, number=3, clock=machine.clock) == {"a": (3.0,)}


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_as_before_whatever_happens(before):
    def fail():
        if not gc.isenabled():
            raise RuntimeError
        return 0

    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(RuntimeError):
            race({"a": fail})
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()


def test_the_better_ratio_is_of_times_taken_in_turn():
    # 2.2 / 1.05 is the better of the sets; 2.1 / 1.0 too would be, of sets that are mixed.
    assert best_ratio((3.0, 2.2), (1.0, 1.05)) == pytest.approx(2.2 / 1.05)
    assert best((3.0, 2.2)) == 2.2


def test_a_slow_baseline_flatters_nobody():
    """A ratio of 0.1, had the set counted in which something else held up the baseline."""
    assert best_ratio((2.0, 2.0), (1.0, 20.0)) == 2.0


CASE = Case("torch", "cpu", "lara", 256, "weighting=balance")


def test_rows_survive_their_file(tmp_path):
    rows = [
        time_row("products", CASE, (2.0, 3.0), "matrix products", (1.0, 1.0)),
        time_row("growth", replace(CASE, features=None), (2.0, 3.0), note="why"),
        Row("memory", CASE, "the output's size", bytes=10, baseline_bytes=5, ratio=2.0),
    ]
    write(tmp_path / "a.json", {"cpu": "ours"}, rows)
    assert read(tmp_path / "a.json") == rows
    text = (tmp_path / "a.json").read_text()
    assert sum('"measure"' in line for line in text.splitlines()) == len(rows)
    assert "null" not in text


def test_what_identifies_a_row():
    row = time_row("products", CASE, (2.0,), "matrix products", (1.0,))
    assert row.identity == time_row("products", CASE, (9.0,), "matrix products", (3.0,)).identity
    for other in (
        replace(row, measure="growth"),
        replace(row, baseline="torch SDPA"),
        *(replace(row, case=replace(CASE, **{name: 1})) for name in ("tokens", "heads", "features")),
        *(replace(row, case=replace(CASE, **{name: "x"})) for name in ("dtype", "mode", "passes", "options")),
    ):
        assert other.identity != row.identity
