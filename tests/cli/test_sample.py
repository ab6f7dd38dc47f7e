"""The samples that the package carries, and the measurements on them."""

from __future__ import annotations

import importlib.resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import randattn
import randattn.data
from randattn.cli.files import read_sample

if TYPE_CHECKING:
    from pathlib import Path


def layer_error(out: np.ndarray, exact: np.ndarray) -> float:
    """Relative to exact attention, over a layer, averaged over layers: the first axis."""
    norms = [np.sqrt((x.astype(np.float64) ** 2).sum(axis=(1, 2, 3))) for x in (out - exact, exact)]
    return float(np.mean(norms[0] / norms[1]))


def test_the_sample_is_real_and_small() -> None:
    sample = read_sample()
    assert sample.q.shape == sample.k.shape == sample.v.shape == (6, 1, 512, 32)
    assert sample.scale == pytest.approx(32**-0.5)
    out = randattn.softmax_attention(sample.q, sample.k, sample.v, scale=sample.scale)
    # Far from uniform, as Gaussian arrays of this size are not.
    assert 0.6 < layer_error(np.broadcast_to(sample.v.mean(-2, keepdims=True), out.shape), out) < 0.9


def test_without_input_the_sample_is_measured(command: Any) -> None:
    report = command("--json", "--backend", "numpy", "--estimator", "eva", "--seeds", 1).report
    assert report["input"] == "embedded sample"
    assert report["shapes"]["q"] == [6, 1, 512, 32]
    assert 0.7 < report["mean_v_error"] < 0.8
    assert report["rows"][0]["relative_error"] < report["mean_v_error"]


def test_the_sample_of_a_language_model() -> None:
    """Two query heads that share a key head; at most a mebibyte."""
    sample = read_sample("language-model")
    assert sample.is_causal
    assert (sample.q.shape, sample.k.shape, sample.v.shape) == ((2, 2048, 64), (1, 2048, 64), (1, 2048, 64))
    assert sample.scale == pytest.approx(64**-0.5)
    file = importlib.resources.files("randattn.data") / "language_model_inputs.npz"
    assert len(file.read_bytes()) <= 1 << 20
    with pytest.raises(ValueError, match="name: expected one of encoder, language-model, got 'decoder'"):
        randattn.data.read_sample("decoder")


def test_a_language_model_is_measured_as_it_attends(command: Any) -> None:
    """Causally, without the estimator that has no causal form; mean(V) is that of the values so far."""
    report = command("--json", "--backend", "numpy", "--sample", "language-model", "--seeds", 1).report
    sample = read_sample("language-model")
    q, k, v = (x.astype(np.float64) for x in (sample.q, sample.k, sample.v))
    causal = {"is_causal": True, "scale": sample.scale}
    exact = randattn.softmax_attention(q, k, v, **causal)
    calls = {
        ("softmax", None): exact,
        ("rfa", 8): randattn.rfa(q, k, v, num_samples=8, rng=0, **causal),
        ("lara", 8): randattn.lara(q, k, v, num_landmarks=8, rng=0, **causal),
        ("eva", 8): randattn.eva(q, k, v, group_size=256, window=256, rng=0, **causal),
        ("adaptive_eva", 8): randattn.adaptive_eva(q, k, v, num_exact=8, **causal),
    }
    found = {(row["estimator"], row["samples"]): row["relative_error"] for row in report["rows"]}
    assert "ra" not in {estimator for estimator, _ in found}
    for config, out in calls.items():
        assert found[config] == pytest.approx(layer_error(out[None], exact[None]), rel=1e-3, abs=1e-5)
    so_far = np.array([v[:, : n + 1].mean(axis=1) for n in range(2048)]).swapaxes(0, 1)
    assert report["mean_v_error"] == pytest.approx(layer_error(so_far[None], exact[None]), rel=1e-6)
    assert report["lengths"]


def test_what_does_not_go_with_the_language_model(refused: Any, inputs: Path) -> None:
    assert "--sample: expected no --input with it" in refused("--sample", "encoder", "--input", inputs)
    said = refused("--sample", "language-model", "--estimator", "ra", "--backend", "numpy")
    assert "is causal, and ra has no causal form" in said
