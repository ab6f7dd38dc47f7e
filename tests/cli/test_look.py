"""`randattn diagnose`: what is printed, drawn and written is what `randattn.diagnose` finds."""

from __future__ import annotations

import io
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.image import imread

import randattn
import randattn.data
from randattn._estimators.registry import ESTIMATORS
from randattn._study import diagnose as library
from randattn.cli.diagnose import plot as own
from randattn.cli.diagnose.look import BINS, QUANTILES, labels

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["rfa", "ra", "lara", "eva", "adaptive_eva"]
KEYS = {"input", "shapes", "queries", "entropy", "looks"}


@pytest.fixture
def command(called: Any) -> Any:
    """`command("--json")` runs ``randattn diagnose`` with two replicates."""
    return partial(called, "diagnose", "--replicates", "2")


def test_numbers_are_the_librarys(command: Any, inputs: Path, arrays: dict[str, np.ndarray]) -> None:
    report = command("--json", "--input", inputs, "--samples", 6, "--seed", 3).report
    assert set(report) == KEYS
    assert report["input"] == str(inputs)
    assert report["queries"] == 80
    assert [each["estimator"] for each in report["looks"]] == NAMES == labels()
    for each in report["looks"]:
        row = ESTIMATORS[each["estimator"]]
        found = randattn.diagnose(
            row.function,
            *(arrays[name] for name in "qkv"),
            scale=float(arrays["scale"]),
            num_replicates=2,
            **{row.count: 6, **({} if row.draws == "never" else {"rng": 3})},
        )
        assert each["samples"] == 6
        assert each["relative_error"] == pytest.approx(found.relative_error)
        assert each["mean_error"] == pytest.approx(found.mean_error)
        assert each["recommendation"] == found.recommendation
        assert (each["relative_standard_error"] is None) == (each["estimator"] == "adaptive_eva")
        assert report["entropy"] == pytest.approx(np.quantile(found.entropy, QUANTILES).tolist())
        if each["estimator"] == "ra":
            assert each["effective_samples"] is each["histogram"] is each["largest_weight"] is None
            continue
        assert each["effective_samples"] == pytest.approx(
            np.quantile(found.effective_samples, QUANTILES).tolist()
        )
        assert each["largest_weight"] == pytest.approx(np.quantile(found.largest_weight, QUANTILES).tolist())
        assert sum(each["histogram"]) == 2 * 2 * 80
        assert len(each["histogram"]) == BINS
        half = np.mean(found.effective_samples / found.num_weights < 0.5)
        assert sum(each["histogram"][: BINS // 2]) == pytest.approx(320 * half)


def test_table_and_advice(command: Any, inputs: Path) -> None:
    result = command("--input", inputs, "--estimator", "lara", "--estimator", "rfa")
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if "───" in line) + 1 :]
    assert [line.split()[0] for line in lines[:2]] == ["rfa", "lara"]
    report = command("--json", "--input", inputs, "--estimator", "rfa").report
    (look,) = report["looks"]
    assert f"{look['relative_error']:.3f}" in lines[0]
    assert f"{look['effective_samples'][1]:.1f}/64" in lines[0]
    # The highest bar is that of the fullest bin.
    assert lines[0].rstrip()[-1] in "▁▂▃▄▅▆▇█"
    assert "█" in lines[0]
    assert look["recommendation"] in result.out
    assert f"{np.exp(report['entropy'][1]):.3g} equal keys of 80" in result.out


def test_sample_by_default(command: Any) -> None:
    """The sentence that users are to read."""
    result = command("--estimator", "rfa", "--estimator", "adaptive_eva")
    assert "embedded sample" in result.out
    assert "rfa would be worse than mean(V) here" in result.out
    assert "use softmax_attention" in result.out
    assert "adaptive_eva errs by " in result.out


def test_a_language_model_is_diagnosed_causally(command: Any, tmp_path: Path) -> None:
    result = command(
        "--sample", "language-model", "--estimator", "adaptive_eva", "--json", "--output", tmp_path
    )
    (look,) = result.report["looks"]
    q, k, v, scale = randattn.data.read_sample("language-model")
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    expected = randattn.diagnose(randattn.adaptive_eva, q, k, v, scale=scale, is_causal=True, num_exact=64)
    assert look["relative_error"] == pytest.approx(expected.relative_error)


def test_picture_and_numbers_are_written(command: Any, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = command("--input", inputs, "--output", folder, "--json")
    assert {path.name for path in folder.iterdir()} == {"diagnosis.png", "diagnosis.json"}
    assert json.loads((folder / "diagnosis.json").read_text()) == result.report
    picture = imread(io.BytesIO((folder / "diagnosis.png").read_bytes()))
    assert picture.shape[1] > picture.shape[0] > 500


def test_picture_of_many_pairs(
    command: Any, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rows there is no matrix, and it says so."""
    monkeypatch.setattr(library, "_MOST_PAIRS", 1)
    said: list[str] = []
    monkeypatch.setattr(own, "_nothing", lambda _, why: said.append(why))
    report = command("--input", inputs, "--output", tmp_path, "--json", "--estimator", "rfa").report
    assert report["queries"] == 64
    assert said == ["no weighting of values,\nor too many pairs"] * 2


def test_other_keys_than_queries(command: Any, arrays: dict[str, np.ndarray], save: Any) -> None:
    path = save({**arrays, "q": arrays["q"][:, :, :30]})
    report = command("--input", path, "--json").report
    assert [each["estimator"] for each in report["looks"]] == NAMES
    assert report["queries"] == 30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--estimator", "softmax"), "'softmax' is not one of"),
        (("--samples", "0"), "0 is not in the range"),
        (("--replicates", "1"), "1 is not in the range"),
        (("--input", "no.npz"), "no.npz: no such file"),
        (("--output", __file__), "not a directory"),
    ],
)
def test_refusals(command: Any, arguments: tuple[str, ...], says: str) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1
    assert says in result.err


def test_what_has_no_error_is_refused(command: Any, arrays: dict[str, np.ndarray], save: Any) -> None:
    for changed, says in (
        ({"v": 0 * arrays["v"]}, "exact attention is zero"),
        ({"scale": np.float32(1e38)}, "exact attention overflows"),
        ({"q": arrays["q"] * np.float32(1e20)}, "q: holds values whose squared norms are too large"),
    ):
        result = command("--input", save({**arrays, **changed}))
        assert result.code == 2
        assert says in result.err
        assert result.err.count("\n") == 1
