"""The guard against slower estimators."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import guard, rows, sessions
from benchmarks.app import app
from benchmarks.rows import PRODUCTS, Case, Row

LIMIT = guard.LIMIT
RFA, EVA = (Case("numpy", "cpu", name, 16384) for name in ("rfa", "eva"))


def row(case=RFA, ratio=2.0):
    return Row("products", case, PRODUCTS, seconds=ratio, baseline_seconds=1.0, ratio=ratio)


class Bench:
    """Gives these ratios, one after the other, and notes what it was asked for."""

    def __init__(self, *ratios, case=RFA):
        self.ratios, self.case, self.asked = list(ratios), case, []

    def __call__(self, only):
        self.asked.append(only)
        return [row(self.case, self.ratios.pop(0))]


def test_the_limit_is_a_quarter():
    assert LIMIT == 1.25


@given(st.floats(0.1, 100.0), st.floats(0.1, 10.0))
def test_a_loss_is_more_than_the_limit(committed, factor):
    verdict = guard.judge([row(ratio=committed)], Bench(*[committed * factor] * 2))
    slower = committed * factor > LIMIT * committed
    assert bool(verdict.losses) is slower
    assert bool(verdict.kept) is not slower


def test_what_failed_once_is_measured_again():
    bench = Bench(9.0, 2.1)
    verdict = guard.judge([row()], bench)
    assert bench.asked == [None, {RFA}]
    assert not verdict.losses
    assert [kept.ratio for kept in verdict.kept] == [2.1]


def test_what_failed_twice_counts_with_its_better_ratio():
    verdict = guard.judge([row()], Bench(4.0, 3.0))
    assert [loss.row.ratio for loss in verdict.losses] == [3.0]
    assert "committed 2" in str(verdict.losses[0])


def test_what_passes_is_measured_once():
    bench = Bench(2.0)
    guard.judge([row()], bench)
    assert bench.asked == [None]


def test_rows_without_a_partner_are_named():
    verdict = guard.judge([row(EVA)], Bench(99.0))
    assert verdict.new == [row(RFA, 99.0)]
    assert verdict.gone == [row(EVA)]
    assert not verdict.losses
    assert not verdict.kept


def test_other_measures_are_not_compared():
    assert not guard.judge([replace(row(), measure="peers"), row()], Bench(2.0)).gone


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command on a committed ratio of 2; what is measured comes from `measured`."""

    def run(measured, committed=None):
        def products(_library, _plan, _say, only):
            return [row for row in measured if only is None or row.case in only]

        monkeypatch.setattr(sessions, "products", products)
        if committed is not None:
            rows.write(tmp_path / "numpy-cpu.json", {}, committed)
        return CliRunner().invoke(app, ["guard", "--library", "numpy", "--results", str(tmp_path)])

    return run


def test_the_command_fails_on_a_loss(run):
    done = run([row(ratio=2.6), row(EVA, 2.0)], [row(), row(EVA)])
    assert done.exit_code == 1
    assert "slower: numpy on cpu: rfa" in done.output
    assert "2 rows compared, 1 over 1.25 times" in done.output


def test_the_command_passes_without_one(run):
    done = run([row(ratio=2.4)], [row()])
    assert done.exit_code == 0
    assert "1 rows compared, 0 over" in done.output


def test_the_command_names_missing_rows(run):
    done = run([row(ratio=2.4), row(replace(RFA, tokens=5))], [row(), row(EVA)])
    assert done.exit_code == 0
    assert "not committed, not compared: numpy rfa, 5 tokens" in done.output
    assert "committed, no longer measured: numpy eva, 16384 tokens" in done.output


def test_a_guard_that_compares_nothing_fails(run):
    done = run([row()])
    assert done.exit_code == 1
    assert "no numpy-cpu.json is committed" in done.output
    assert "no committed row was compared" in done.output


def test_committed_results_are_whole():
    """Every row can be read, is there once, and names no path of the machine."""
    for path in rows.RESULTS.glob("*.json"):
        identities = [row.identity for row in rows.read(path)]
        assert len(set(identities)) == len(identities), path
        machine = json.loads(path.read_text())["machine"]
        assert not [value for value in json.dumps(machine).split('"') if value.startswith(("/", "\\"))], path
