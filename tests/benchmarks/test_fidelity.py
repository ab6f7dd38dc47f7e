"""The fidelity benchmark: its references, its file and its plot."""

import json

import numpy as np
from click.testing import CliRunner

from benchmarks import fidelity, rows
from benchmarks.app import app
from randattn import multiply_adds, softmax_attention

COMMITTED = rows.RESULTS / "fidelity" / "points.json"


def test_references():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 16, 4))
    found = {(curve, options): function(q, k, v) for curve, options, function in fidelity._references(None)}
    np.testing.assert_allclose(found[fidelity.MEAN, ""], np.broadcast_to(v.mean(axis=1)[:, None], v.shape))
    logits = q @ np.swapaxes(k, 1, 2) / 2
    best = np.argsort(-logits, axis=-1)[..., :4]
    for head in range(2):
        for query in range(16):
            own = best[head, query]
            expected = softmax_attention(q[head, query][None], k[head, own], v[head, own])[0]
            actual = found[fidelity.TRUE_TOP, "0.25 of the keys"][head, query]
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_entries_can_be_counted_and_have_their_colour():
    from benchmarks import plots_fidelity

    for entry in fidelity.entries():
        assert multiply_adds(entry.estimator, 512, 512, 32, 32, **entry.options) > 0
        assert entry.curve in plots_fidelity._COLOURS or entry.curve == "ra"


def test_the_command_on_the_sample(tmp_path):
    done = CliRunner().invoke(
        app, ["fidelity", "--no-model", "--output", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    points = fidelity.read(tmp_path / "points.json")
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
    of_sample = {(point.curve, point.options): point for point in points}
    committed = [point for point in fidelity.read(COMMITTED) if point.inputs == fidelity.SAMPLE]
    assert len(committed) == len(points)
    for point in committed:
        now = of_sample[point.curve, point.options]
        np.testing.assert_allclose(now.error, point.error, rtol=0.02)
        assert now.share == point.share


def test_what_the_documentation_says():
    """The committed points: chosen keys are what comes near exact attention, and mean(V) beats rfa."""
    points = fidelity.read(COMMITTED)
    about = json.dumps(json.loads(COMMITTED.read_text())["about"])
    assert not [value for value in about.split('"') if value.startswith(("/", "\\"))]
    for inputs in (fidelity.SAMPLE, fidelity.MODEL):
        own = [point for point in points if point.inputs == inputs]
        (mean,) = (point.error for point in own if point.curve == fidelity.MEAN)
        assert min(point.error for point in own if point.curve == "rfa") > mean
        quarter, third = (
            min(
                (one for one in own if one.share is not None and one.share <= most), key=lambda one: one.error
            )
            for most in (0.25, 0.35)
        )
        assert quarter.curve == third.curve == "adaptive_eva"
        assert quarter.error < 0.2
        best = third
        assert best.error < 0.125
        (true_top,) = (
            point for point in own if point.curve == fidelity.TRUE_TOP and point.options.startswith("0.25")
        )
        assert best.error < true_top.error
        if inputs == fidelity.MODEL:
            assert best.similarity > 0.97 > true_top.similarity
