"""The picture of the choice: the trivial answer, and what was committed."""

import json

import pytest

torch = pytest.importorskip("torch")

from benchmarks import choice  # noqa: E402
from benchmarks.language_model import exact_attention  # noqa: E402
from benchmarks.rows import RESULTS  # noqa: E402


def test_the_trivial_answer_is_attention_with_equal_logits():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 20, 4, generator=generator) for heads in (6, 2, 2))
    torch.testing.assert_close(choice._mean_so_far(q, k, v), exact_attention(0, 0 * q, k, v))


def test_calls_are_those_that_are_measured():
    (first, *others) = choice.calls(8192)
    assert first == ("adaptive_eva", "")
    assert {name for name, _ in others} == {"adaptive_eva", "eva", "lara", "rfa"}


def test_figures_of_the_picture():
    """In a model trained with softmax only adaptive_eva is near to exact attention."""
    rows = json.loads((RESULTS / "trained" / "choice.json").read_text())["rows"]
    for tokens in choice.LENGTHS:
        own = {(row["estimator"], row["options"]): row for row in rows if row["tokens"] == tokens}
        trivial = own[choice.MEAN, ""]["error"]
        for (name, _), row in own.items():
            assert (row["error"] < trivial / 5) == (name == "adaptive_eva") or name == choice.MEAN
    assert own["adaptive_eva", ""]["error"] < 0.07
    assert own["adaptive_eva", ""]["time"] < 1
