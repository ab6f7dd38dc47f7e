"""What is said of a paper's claim follows from the numbers, and changes with them."""

from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_1samp

from benchmarks.papers import digits, figures, language, translation
from benchmarks.papers.claims import CLAIMS, Results, Value
from benchmarks.papers.figures import COSTS, GAUSSIAN, MEAN, REAL
from benchmarks.papers.runs import FOLDER, Done, Run, read
from benchmarks.papers.tables import claims, numbers

EXPERIMENTS = {"figures": figures, "digits": digits, "translation": translation, "language": language}


def test_an_interval_is_students():
    values = [0.91, 0.95, 0.94]
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    value = Value.of(values)
    assert math.isclose(value.mean - value.half, interval.low)
    assert math.isclose(value.mean + value.half, interval.high)
    assert math.isinf(Value.of([1.0]).half)


def trained(experiment, found, spread=0.001):
    return [
        Done(Run(experiment, library, method, seed, "cpu", {}), {name: value + spread * (seed - 1)}, 1.0, {})
        for library in ("torch", "jax")
        for method, (name, value) in found.items()
        for seed in range(3)
    ]


def words(experiment, done):
    return [row[1] for row in claims(experiment, done)[1]]


def test_trained_models():
    good = {"softmax": 0.95, "rfa": 0.85, "ra": 0.95, "lara": 0.9, "eva": 0.96}
    done = trained("digits", {method: ("accuracy", value) for method, value in good.items()})
    assert words("digits", done) == ["confirmed"] * 4
    bad = {"softmax": 0.95, "rfa": 0.9, "ra": 0.85, "lara": 0.8, "eva": 0.7}
    done = trained("digits", {method: ("accuracy", value) for method, value in bad.items()})
    assert words("digits", done) == ["not confirmed"] * 4
    # Better, but by less than seeds differ by.
    near = {**good, "lara": 0.8505}
    done = trained("digits", {method: ("accuracy", value) for method, value in near.items()})
    assert words("digits", done)[0] == "partly"
    # Nothing is as good as softmax by numbers that differ too much.
    done = trained("digits", {method: ("accuracy", value) for method, value in good.items()}, spread=0.05)
    assert words("digits", done)[1] == words("digits", done)[3] == "partly"


def test_two_libraries_that_differ():
    good = {"softmax": 0.95, "rfa": 0.85, "ra": 0.95, "lara": 0.9, "eva": 0.96}
    bad = {**good, "ra": 0.8}
    in_torch, in_jax = (
        [
            one
            for one in trained("digits", {method: ("accuracy", value) for method, value in each.items()})
            if one.run.library == library
        ]
        for each, library in ((good, "torch"), (bad, "jax"))
    )
    assert words("digits", in_torch + in_jax)[1] == "partly"


@pytest.mark.parametrize(
    ("eva", "expected"),
    [(2.0, ["confirmed", "confirmed"]), (2.9, ["confirmed", "not confirmed"]), (4.0, ["not confirmed"] * 2)],
)
def test_fewer_bits_are_better(eva, expected):
    bits = {"softmax": 2.5, "rfa": 3.0, "eva": eva}
    done = trained("language", {method: ("sources", value) for method, value in bits.items()})
    assert words("language", done) == expected


def drawn(lara, growth, slowness):
    """Figures where RFA's error is 1 and grows not, RA's 0.4 and mean(V)'s 0.9."""
    settings = figures.SMALL | {"samples": [8, 16, 32], "ra_samples": [8, 16], "lengths": [128, 512]}
    levels, found = {"rfa": 1.0, "ra": 0.4, "lara": lara, MEAN: 0.9}, []
    for seed in range(3):
        for method, level in levels.items():
            points = []
            for inputs in (GAUSSIAN, REAL):
                at = {"inputs": inputs}
                counts = [1] if method == MEAN else [8, 16, 32]
                points += [{**at, "tokens": 512, "samples": count, "error": level} for count in counts]
                grown = level / (growth if method == "lara" else 1)
                points.append({**at, "tokens": 128, "samples": 1 if method == MEAN else 32, "error": grown})
            found.append(
                Done(Run("figures", "torch", method, seed, "cpu", settings), {"points": points}, 1.0, {})
            )
        points = [
            {"estimator": method, "tokens": 512, "seconds": slow, "bytes": int(100 * slow)}
            for method, slow in (("rfa", 1.0), ("lara", slowness))
        ]
        found.append(Done(Run("figures", "torch", COSTS, seed, "cpu", settings), {"points": points}, 1.0, {}))
    return found


def test_figures():
    assert words("figures", drawn(lara=0.4, growth=0.9, slowness=1.5)) == ["confirmed"] * 6
    assert words("figures", drawn(lara=1.2, growth=1.5, slowness=9)) == ["not confirmed"] * 6
    assert words("figures", drawn(lara=0.7, growth=1.0, slowness=3)) == ["partly"] * 6


def test_each_claim_is_of_one_of_the_papers_and_said_once():
    said = [claim.text for each in CLAIMS.values() for claim in each]
    assert len(set(said)) == len(said)
    assert len({claim.paper for each in CLAIMS.values() for claim in each}) == 2


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_committed(name, monkeypatch):
    """All runs of the settings that stand in the code, from three seeds or more."""
    done = read(FOLDER / f"{name}.json")
    # The texts are those of the machine that it was measured on.
    if name == "language":
        monkeypatch.setattr(language, "fingerprint", lambda: done[0].run.settings["text"])
    if name == "translation":
        monkeypatch.setattr(translation, "read_pairs", lambda _: [])
        monkeypatch.setattr(translation, "fingerprint", lambda _: done[0].run.settings["messages"])
    expected = EXPERIMENTS[name].runs("cpu")
    assert {one.seed for one in expected} >= {0, 1, 2}
    key = [(run.library, run.method, run.seed) for run in expected]
    assert [(one.run.library, one.run.method, one.run.seed) for one in done] == key
    for one, run in zip(done, expected, strict=True):
        assert one.run.settings == run.settings
    header, rows = claims(name, done)
    assert all(len(row) == len(header) and row[1] in ("confirmed", "partly", "not confirmed") for row in rows)
    header, rows = numbers(name, done)
    assert rows
    assert all(len(row) == len(header) for row in rows)
    assert Results(done).has(name)
