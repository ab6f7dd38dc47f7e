"""The calls of the sessions are right, and a session runs from its start to its files."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import randattn
from benchmarks import by_hand, machine, memory, rows
from benchmarks.app import app
from benchmarks.baselines import open_library
from benchmarks.cases import LINEAR, Workbench, case_of, keywords
from benchmarks.rows import PRODUCTS
from benchmarks.sizes import sizes_for

LIBRARIES = [
    pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason="not installed")
    )
    for name in ("numpy", "torch", "jax")
]


@pytest.fixture(params=LIBRARIES)
def library(request):
    return open_library(request.param)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("label", by_hand.FORMULAS)
def test_what_is_written_by_hand_is_the_same(library, label):
    """Else its time would say nothing about the library's."""
    estimator, _, options = label.partition(" ")
    inputs = Workbench(library).inputs(case_of(library, estimator, 64, options, features=16))
    ops = by_hand.operations(library)
    by_us = getattr(randattn, estimator)(*inputs.qkv, noise=inputs.noise, **keywords(options))
    close(by_hand.FORMULAS[label](ops, *inputs.qkv, inputs.noise), by_us)


def test_the_inputs_are_the_same_in_every_library(library):
    ours, theirs = (Workbench(each) for each in (library, open_library("numpy")))
    case = case_of(library, "rfa", 128)
    for a, b in zip(ours.inputs(case).qkv, theirs.inputs(case).qkv, strict=True):
        assert np.array_equal(np.asarray(a), b)


def test_the_exact_attention_is_exact(library):
    bench = Workbench(library)
    case = case_of(library, library.exact_name, 128, features=None)
    out = library.exact_layout(bench.call(case)())
    close(out, randattn.softmax_attention(*bench.inputs(case).qkv))


def test_the_matrix_products(library):
    bench = Workbench(library)
    case = case_of(library, PRODUCTS, 128)
    inputs = bench.inputs(case)
    q, k, v, w, f = map(np.asarray, (*inputs.qkv, inputs.noise, inputs.f))
    values, out = bench.call(case)()
    close(values, np.einsum("bhcd,bhmd,bhme->bhce", w, k, v))
    close(out, np.einsum("bhnd,bhcd,bhce->bhne", q, w, f))


@pytest.mark.parametrize(("estimator", "options"), LINEAR)
def test_forward_and_backward_gives_all_gradients(library, estimator, options):
    case = case_of(library, estimator, 64, options, passes="forward+backward")
    bench = Workbench(library)
    if library.name == "numpy":
        with pytest.raises(ValueError, match="has no gradients"):
            bench.call(case)
        return
    found = bench.call(case)()
    gradients = found[1] if library.name == "jax" else found
    assert [tuple(each.shape) for each in gradients] == [(1, 8, 64, 64)] * 3
    assert all(np.any(np.asarray(each)) for each in gradients)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_has_the_output_and_what_is_held():
    """Exact attention holds more than its output, and less than a hundred of it, of 4096 x 64."""
    case = case_of(open_library("numpy"), "softmax_attention", 4096, heads=1, features=None)
    found = memory.memory_row(case)
    assert found.baseline_bytes == 4096 * 64 * 4
    assert 1 < found.ratio < 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_of_the_call_alone():
    """Memory that was freed before does not count, nor hide memory that the call holds and frees."""
    held = np.ones(4 << 20)
    del held

    def call():
        scratch = np.ones(2 << 20)
        return scratch[:10].copy()

    found, _ = memory.peak(open_library("numpy"), call)
    assert found == pytest.approx(16 << 20, abs=2 << 20)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_lengths_have_their_quarter(name, on_gpu, quick):
    """Growth is over a quarter of the tokens: of all plans' lengths at least one has it."""
    lengths = sizes_for(name, on_gpu=on_gpu, quick=quick).growth
    assert any(4 * n in lengths for n in lengths)


def test_causal_rows_are_over_the_same_that_is_not(tmp_path):
    command = ["causal", "numpy", "--quick", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    found = rows.read(tmp_path / "causal-numpy-cpu.json")
    assert [row.case.estimator for row in found] == ["rfa", "lara", "lara", "eva", "softmax_attention"]
    assert all("is_causal=True" in row.case.options and row.ratio > 0 for row in found)


def test_the_machine_is_described_without_paths():
    found = machine.describe()
    assert {"date", "cpu", "cores", "os", "python", "packages", "blas"} <= set(found)
    assert not [text for text in json.dumps(found).split('"') if text.startswith(("/", "\\"))]


def test_a_session_writes_rows_and_plots(tmp_path):
    done = CliRunner().invoke(app, ["numpy", "--quick", "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    found = rows.read(tmp_path / "numpy-cpu.json")
    wanted = {"products", "exact", "growth", "overhead", "import"} | (
        {"memory"} if sys.platform == "linux" else set()
    )
    assert wanted <= {row.measure for row in found}
    for row in found:
        assert row.ratio is None or row.ratio > 0
        assert row.seconds is not None or row.bytes is not None
    for name in ("time", "products"):
        assert (tmp_path / f"{name}-cpu.png").read_bytes().startswith(b"\x89PNG")
    guarded = CliRunner().invoke(app, ["guard", "--quick", "--library", "numpy", "--results", str(tmp_path)])
    assert f"{len(LINEAR)} rows compared" in guarded.output


def test_quick_writes_nothing_where_no_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.sessions.measure", lambda *_: [])
    assert CliRunner().invoke(app, ["numpy", "--quick"], catch_exceptions=False).exit_code == 0
    assert not list(tmp_path.iterdir())
