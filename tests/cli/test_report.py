"""The report of compare: rows, values, filters, tables."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import randattn
from randattn._estimators import registry
from randattn.cli import app, libraries
from randattn.cli.compare import measure
from randattn.cli.compare.plan import EXACT, Config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEYWORDS = {
    "rfa": "num_samples",
    "ra": "num_samples",
    "lara": "num_landmarks",
    "eva": "num_groups",
    "adaptive_eva": "num_exact",
}
ROW = {"backend", "estimator", "samples", "relative_error", "seconds", "speedup", "max_abs_diff"}
CONFIGS = [
    ("softmax", None),
    *[("rfa", count) for count in (4, 8)],
    *[("ra", count) for count in (1, 2)],
    *[("lara", count) for count in (4, 8)],
    *[("eva", count) for count in (4, 8)],
    *[("adaptive_eva", count) for count in (4, 8)],
]


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    logits = scale * np.einsum("...nd,...md->...nm", *(x.astype(np.float64) for x in (q, k)))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("...nm,...me->...ne", weights / weights.sum(-1, keepdims=True), v.astype(np.float64))


def layer_error(out: np.ndarray, exact: np.ndarray) -> float:
    """Over a layer, averaged over layers: the first axis of four."""
    return float(
        np.mean([np.linalg.norm(o - e) / np.linalg.norm(e) for o, e in zip(out, exact, strict=True)])
    )


def test_rows_of_every_library_and_estimator(command: Any, inputs: Path) -> None:
    report = command("--json", "--input", inputs).report
    rows = report["rows"]
    assert [(row["backend"], row["estimator"], row["samples"]) for row in rows] == [
        (backend, *config) for backend in ("numpy", "torch", "jax") for config in CONFIGS
    ]
    for row in rows:
        assert set(row) == ROW
        for name in ("relative_error", "seconds", "speedup", "max_abs_diff"):
            assert isinstance(row[name], float)
            assert math.isfinite(row[name])
        assert row["seconds"] > 0
        exact = next(r for r in rows if r["backend"] == row["backend"] and r["estimator"] == "softmax")
        assert row["speedup"] == pytest.approx(exact["seconds"] / row["seconds"])
        assert row["max_abs_diff"] <= (0 if row["backend"] == "numpy" else 1e-4)
    assert report["seeds"] == 2
    assert report["input"] == str(inputs)
    assert report["shapes"] == {"q": [2, 2, 80, 8], "k": [2, 2, 80, 8], "v": [2, 2, 80, 5]}
    assert list(report["libraries"]) == ["numpy", "torch", "jax"]
    assert report["libraries"]["numpy"] == {"version": np.__version__, "device": "cpu"}


def test_time_against_length(command: Any, inputs: Path) -> None:
    report = command("--json", "--input", inputs, "--backend", "numpy", "--backend", "torch").report
    lengths = report["lengths"]
    assert {each["length"] for each in lengths} == {16, 32}
    assert {(each["backend"], each["estimator"]) for each in lengths} == {
        (backend, estimator) for backend in ("numpy", "torch") for estimator, _ in CONFIGS
    }
    assert all(each["seconds"] > 0 for each in lengths)


def test_what_is_slow_is_left_out_of_longer_ones(
    command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--json", "--input", inputs, "--backend", "numpy")
    monkeypatch.setattr(app, "FULL", replace(app.FULL, slowest=0.0))
    assert {each["length"] for each in command(*arguments).report["lengths"]} == {16}
    monkeypatch.setattr(app, "FULL", replace(app.FULL, deadline=0.0))
    assert command(*arguments).report["lengths"] == []


def test_calls_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call(name: str, *seconds: float) -> tuple[Config, Any]:
        each = iter(seconds)

        def run() -> None:
            order.append(name)
            now[0] += next(each)

        return Config(name, None), run

    calls = dict([call("a", 1.0, 9.0, 2.0), call("b", 3.0, 3.0, 4.0)])
    times, spread = measure._rounds(calls, rounds=3, seconds=8.0)
    assert times == {Config("a", None): [1.0, 9.0, 2.0], Config("b", None): [3.0, 3.0, 4.0]}
    assert spread == pytest.approx(np.mean([4.0 / 2, 0.5 / 3]))
    assert order == ["a", "b", "a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("spreads", "seconds", "is_disturbed"),
    [([0.1], 1.0, False), ([0.9, 0.1], 2.0, False), ([0.4, 0.9], 1.0, True)],
)
def test_a_disturbed_race_is_run_once_more(
    monkeypatch: pytest.MonkeyPatch, spreads: list[float], seconds: float, is_disturbed: bool
) -> None:
    races = iter([({EXACT: [float(number)]}, spread) for number, spread in enumerate(spreads, start=1)])
    monkeypatch.setattr(measure, "_rounds", lambda *_: next(races))
    assert measure._race({}, 3, 1.0) == ({EXACT: seconds}, is_disturbed)
    assert next(races, None) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_errors_are_those_of_the_library(
    command: Any, inputs: Path, arrays: dict[str, np.ndarray], seeds: int
) -> None:
    q, k, v, scale = (arrays[name] for name in ("q", "k", "v", "scale"))
    exact = exact_attention(q, k, v, float(scale))
    report = command("--json", "--input", inputs, "--seeds", seeds, "--backend", "numpy").report
    assert report["seeds"] == seeds
    mean_v = np.broadcast_to(v.mean(-2, keepdims=True), exact.shape)
    assert report["mean_v_error"] == pytest.approx(layer_error(mean_v, exact), rel=1e-6)
    for row in report["rows"]:
        name, samples = row["estimator"], row["samples"]
        if name == "softmax":
            assert 0 < row["relative_error"] < 1e-6
            continue
        function = getattr(randattn, name)
        draws = [{} if name == "adaptive_eva" else {"rng": seed} for seed in range(seeds)]
        options = {"scale": float(scale), KEYWORDS[name]: samples}
        outs = [function(q, k, v, **options, **own) for own in draws]
        expected = np.mean([layer_error(out, exact) for out in outs])
        assert row["relative_error"] == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def test_seeds_are_for_estimators_that_draw(
    command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of JAX for further seeds would take the time of the lengths."""
    seeds: dict[Config, list[int]] = {}
    bind = Config.bind

    def counted(config: Config, scale: float, seed: int, **more: Any) -> Any:
        seeds.setdefault(config, []).append(seed)
        return bind(config, scale, seed, **more)

    monkeypatch.setattr(Config, "bind", counted)
    monkeypatch.setattr(app, "FULL", replace(app.FULL, linear=(8,), quadratic=(1,), lengths=()))
    command("--json", "--input", inputs, "--backend", "numpy", "--seeds", 3)
    drawing = {config for config, used in seeds.items() if set(used) == {0, 1, 2}}
    assert {config.estimator for config in drawing} == {"rfa", "ra", "lara", "eva"}
    assert all(seeds[config] == [0, 0] for config in seeds if config not in drawing)


@pytest.mark.parametrize("shape", [(24,), (2, 24), (3, 2, 2, 24)])
def test_layers_are_what_stands_before_the_last_three_axes(
    command: Any, save: Callable[..., Path], shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((*shape, 4)) for _ in range(3))
    report = command(
        "--json", "--input", save({"q": q, "k": k, "v": v}), "--estimator", "softmax", "--backend", "numpy"
    ).report
    exact = exact_attention(q, k, v, 0.5)
    mean_v = np.broadcast_to(v.mean(-2, keepdims=True), exact.shape)
    layers = (-1, *exact.shape[-3:]) if exact.ndim > 2 else (1, *exact.shape)
    expected = layer_error(mean_v.reshape(layers), exact.reshape(layers))
    assert report["mean_v_error"] == pytest.approx(expected, rel=1e-6)


def test_agreement_is_the_largest_difference_with_the_same_seed(
    command: Any, inputs: Path, arrays: dict[str, np.ndarray]
) -> None:
    torch = pytest.importorskip("torch")
    q, k, v, scale = (arrays[name] for name in ("q", "k", "v", "scale"))
    tensors = [torch.asarray(x) for x in (q, k, v)]
    expected = 0.0
    for seed in range(2):
        common = {"scale": float(scale), "num_samples": 8, "rng": seed}
        got = randattn.rfa(*tensors, **common).numpy()
        expected = max(expected, float(np.abs(got - randattn.rfa(q, k, v, **common)).max()))
    rows = command("--json", "--input", inputs, "--backend", "torch", "--estimator", "rfa").report["rows"]
    assert [row["backend"] for row in rows] == ["torch", "torch"]
    # Threads may add in another order.
    assert rows[1]["max_abs_diff"] == pytest.approx(expected, abs=1e-6)


def test_a_library_that_disagrees_is_found_out(
    command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter((0.0, 0.25))

    class OffByAQuarter(libraries.CLASSES["torch"]):
        def to_numpy(self, x: Any) -> np.ndarray:
            return super().to_numpy(x) + np.float32(next(results))

    monkeypatch.setitem(libraries.CLASSES, "torch", OffByAQuarter)
    monkeypatch.setattr(app, "FULL", replace(app.FULL, linear=(8,)))
    # With the second of two seeds alone.
    (row,) = command("--json", "--input", inputs, "--backend", "torch", "--estimator", "rfa").report["rows"]
    assert row["max_abs_diff"] == pytest.approx(0.25, abs=1e-5)


def test_times_wait_for_the_device(command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(libraries.CLASSES["torch"]):
        def wait(self, x: Any) -> None:  # noqa: ARG002
            time.sleep(0.02)

    monkeypatch.setitem(libraries.CLASSES, "torch", Slow)
    report = command("--json", "--input", inputs, "--backend", "torch", "--estimator", "rfa").report
    assert all(each["seconds"] >= 0.02 for each in report["rows"] + report["lengths"])


def test_speedup_is_over_exact_attention(command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"softmax": 3.0, "rfa": 0.5, "eva": 6.0}
    monkeypatch.setattr(
        measure, "_race", lambda calls, *_, **__: ({each: seconds[each.estimator] for each in calls}, True)
    )
    arguments = (
        "--json",
        "--input",
        inputs,
        "--backend",
        "numpy",
        "--estimator",
        "rfa",
        "--estimator",
        "eva",
    )
    report = command(*arguments).report
    assert [row["speedup"] for row in report["rows"]] == [6.0, 6.0, 0.5, 0.5]
    assert report["disturbed"][0] == "numpy"
    assert "measure again on an idle machine" in command(*arguments[1:]).out


def test_filters_keep_order_and_repeat_nothing(command: Any, inputs: Path) -> None:
    report = command(
        *("--json", "--input", inputs, "--backend", "torch", "--backend", "numpy", "--backend", "torch"),
        *("--estimator", "eva", "--estimator", "rfa", "--estimator", "eva"),
    ).report
    assert [(row["backend"], row["estimator"]) for row in report["rows"]] == [
        (backend, name) for backend in ("torch", "numpy") for name in ("rfa", "rfa", "eva", "eva")
    ]
    assert {each["estimator"] for each in report["lengths"]} == {"rfa", "eva"}
    assert all(row["speedup"] > 0 for row in report["rows"])


@pytest.mark.parametrize("backend", ["array-api-strict", "dask"])
def test_checks_are_measured_where_they_are_asked_for(command: Any, inputs: Path, backend: str) -> None:
    report = command("--json", "--input", inputs, "--backend", backend, "--seeds", 1).report
    assert [(row["estimator"], row["samples"]) for row in report["rows"]] == CONFIGS
    assert all(row["max_abs_diff"] <= 1e-4 for row in report["rows"])


def test_only_what_is_installed(command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_is_installed", lambda name: name == "numpy")
    result = command("--json", "--input", inputs)
    assert list(result.report["libraries"]) == ["numpy"]
    assert result.err == ""


def test_a_library_that_cannot_be_imported_is_left_out(
    command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(libraries.CLASSES["torch"]):
        def __init__(self) -> None:
            raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setitem(libraries.CLASSES, "torch", Broken)
    result = command("--json", "--input", inputs, "--estimator", "rfa")
    assert list(result.report["libraries"]) == ["numpy", "jax"]
    assert result.err.startswith("Leaving out torch: cannot be imported (libcudart")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("n, m", [(24, 10), (10, 24), (3, 3), (1, 1)])
def test_few_tokens_and_other_numbers_of_keys(
    command: Any, save: Callable[..., Path], tmp_path: Path, n: int, m: int
) -> None:
    rng = np.random.default_rng(2)
    path = save(
        {"q": rng.normal(size=(2, n, 4)), "k": rng.normal(size=(2, m, 4)), "v": rng.normal(size=(2, m, 4))}
    )
    # The picture too: errors may all be zero.
    result = command("--json", "--input", path, "--backend", "numpy", "--output", tmp_path / "out")
    rows = result.report["rows"]
    counts = {name: [row["samples"] for row in rows if row["estimator"] == name] for name, _ in CONFIGS}
    clamped = sorted({min(count, m) for count in (4, 8)})
    assert counts == {
        "softmax": [None],
        "rfa": [4, 8],
        "ra": [1, 2],
        "lara": clamped,
        "eva": clamped,
        "adaptive_eva": clamped,
    }
    eva = [row["relative_error"] for row in rows if row["estimator"] == "eva"]
    # Its window holds them all, but there is none where queries are not keys.
    assert (max(eva) < 1e-6) == (n == m)


def test_what_is_not_finite_is_null(command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rfa(q: np.ndarray, k: np.ndarray, v: np.ndarray, **_: Any) -> np.ndarray:
        return q[..., :5] * np.float32(np.nan)

    monkeypatch.setitem(registry.ESTIMATORS, "rfa", replace(registry.ESTIMATORS["rfa"], function=rfa))
    arguments = ("--input", inputs, "--backend", "numpy", "--estimator", "rfa")
    result = command("--json", *arguments)
    assert "NaN" not in result.out
    assert {row["relative_error"] for row in result.report["rows"]} == {None}
    table = command(*arguments)
    assert table.code == 0
    assert "not finite" in table.out


def test_the_table_says_all_that_the_report_says(command: Any, inputs: Path, tmp_path: Path) -> None:
    result = command(
        "--input", inputs, "--output", tmp_path / "out", "--backend", "numpy", "--backend", "torch"
    )
    assert result.code == 0
    assert result.err == ""
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    mean_v = f"{report['mean_v_error']:.3f}"
    errors, _, times = result.out.partition("mean(V), the same")
    lines = [line.split() for line in errors.splitlines()]
    worse = 0
    for row in report["rows"]:
        samples = "-" if row["samples"] is None else str(row["samples"])
        (line,) = [line for line in lines if line[:3] == [row["backend"], row["estimator"], samples]]
        if row["estimator"] != "softmax":
            assert line[3] == f"{row['relative_error']:.3f}"
        assert line[4] == mean_v
        is_worse = row["relative_error"] > report["mean_v_error"]
        assert ("worse" in line) == is_worse
        worse += is_worse
        assert f"{row['speedup']:.2f}x" in line
    assert worse
    assert worse < len(report["rows"])
    assert f"mean(V), the same for all queries, errs by {mean_v}" in result.out
    assert {"16", "32"} <= set(times.split())


@pytest.mark.parametrize("load", [0.1, 9.0])
def test_a_busy_machine_is_named(
    command: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch, load: float
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    arguments = ("--input", inputs, "--backend", "numpy", "--estimator", "softmax")
    assert command("--json", *arguments).report["load_per_core"] == load / 4
    assert ("The machine was busy" in command(*arguments).out) == (load == 9.0)


def test_the_json_is_the_report(command: Any, inputs: Path, tmp_path: Path) -> None:
    result = command("--json", "--input", inputs, "--output", tmp_path / "new" / "out", "--estimator", "lara")
    assert result.err == ""
    assert result.out == (tmp_path / "new" / "out" / "report.json").read_text()
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["report.json", "report.png"]
    assert (tmp_path / "new" / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
