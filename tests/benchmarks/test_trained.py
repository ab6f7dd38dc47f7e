"""The measurements in a language model: without the model, on random inputs, and what was committed."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import trained  # noqa: E402
from benchmarks.rows import RESULTS  # noqa: E402

COMMITTED = RESULTS / "trained"


def inputs(tokens=96):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, 8, generator=generator) for heads in (6, 2, 2)]


def test_a_case_is_cut_from_whole_inputs():
    q, k, v = inputs()
    case = trained.Case("", 64, last=16, before=True, layers=(0,))
    cut = case.cut(q, k, v)
    assert [tuple(x.shape) for x in cut] == [(1, 6, 16, 8), (1, 2, 48, 8), (1, 2, 48, 8)]
    assert torch.equal(cut[0], q[:, :, 48:64])
    of_heads = trained.Case("", 64, heads=4, layers=(0,)).cut(q, k, v)
    assert torch.equal(of_heads[1][:, 3], k[:, 1, :64])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_error_is_that_of_the_call(library):
    case = trained.Case("causal", 96, layers=(0,), texts=("one",))
    exact, few = (
        trained._row(library, trained._LIBRARIES[library], case, options, [{0: inputs()}])
        for options in ({}, {"num_exact": 4, "group_size": 4, "block_size": 8, "exact_heads": 0})
    )
    # Without options a short call is exact attention.
    assert exact.error < 1e-5
    assert 0.05 < few.error <= few.worst
    assert few.options == "num_exact=4, group_size=4, block_size=8, exact_heads=0"


def test_kept_keys():
    q, k, v = inputs(300)
    q = 4 * q
    exact = trained.exact_attention(0, q, k, v)
    kept = {
        name: trained._masked(0, q, k, v, function=function)
        for name, function in (("top", trained._true_top), ("recent", trained._first_and_recent))
    }
    for out in kept.values():
        # The first queries have no other keys.
        torch.testing.assert_close(out[:, :, :60], exact[:, :, :60])
    lost = {name: float((out - exact).norm() / exact.norm()) for name, out in kept.items()}
    assert 0 < lost["top"] < 0.5 * lost["recent"]


def test_figures_of_the_documentation():
    """Errors of at most 0.07, faster than exact attention, and a perplexity near that of exact attention."""
    for library, most in (("torch", 0.65), ("jax", 0.65), ("numpy", 0.5)):
        rows = json.loads((COMMITTED / f"{library}-cpu.json").read_text())["rows"]
        (row,) = (one for one in rows if one["case"] == "causal, 8,192 tokens" and not one["options"])
        assert row["error"] < 0.05
        assert row["time"] < most
    rows = json.loads((COMMITTED / "torch-cpu.json").read_text())["rows"]
    (row,) = (one for one in rows if one["case"] == "last 1,024 queries over 7,168 keys")
    assert row["error"] < 0.07
    assert row["time"] < 0.5
    rows = json.loads((COMMITTED / "perplexity.json").read_text())["rows"]
    found = [
        one["over_exact"] for one in rows if one["tokens"] == 8192 and one["attention"] == "adaptive_eva"
    ]
    assert len(found) == 2
    assert np.max(found) < 0.02
