"""Add an estimator by one file and one row, and find it everywhere: ``python -m tests.programs.toy_estimator``.

CONTRIBUTING's recipe is the code between the two marks. A process of its own: the row stays in the registry.
"""

from __future__ import annotations

# The file of the estimator begins here.
from collections.abc import Mapping
from typing import Any

from randattn._core.average import Keys
from randattn._core.inputs import prepare, refuse_causal
from randattn._core.library import Array
from randattn._estimators.final_average import final_average
from randattn._tokens.grids import blocks, number_on_grid
from randattn._tokens.pooling import pool


def pooled(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_segments: int = 64,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    """Attend to the means of segments of keys (here the numpydoc sections, as in rfa.py)."""
    refuse_causal("pooled", is_causal)
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, query_mask=query_mask, enable_gqa=enable_gqa)
    tokens = (x.k.shape[-2],)
    segments = blocks(tokens, "segments", number_on_grid("num_segments", num_segments, tokens))
    kt, log_size = pool(x.k, segments, x.key_mask)
    vt, _ = pool(x.v, segments, x.key_mask)
    return x.finish(final_average(x.q, Keys(kt, vt, log_size), scale=x.scale))


def pooled_cost(n: int, m: int, d: int, e: int, options: Mapping[str, Any]) -> float:
    """Count the multiply-adds: the means, and an average over segments."""
    return m * (d + e) + n * min(options["num_segments"], m) * (d + e)


# The file ends here. The row of the registry:
def add() -> None:
    """Add the row."""
    from randattn._estimators.registry import ESTIMATORS, Estimator

    row = Estimator(pooled, pooled_cost, "#56B4E9", count="num_segments", default=64, counts_tokens=True)
    ESTIMATORS[row.name] = row


def main() -> None:
    """Find the estimator in each place that reads the registry."""
    import contextlib
    import importlib
    import io
    import json
    import sys

    import numpy as np

    import randattn

    add()
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 36, 4))
    assert np.allclose(pooled(q, k, v, num_segments=36), randattn.softmax_attention(q, k, v))

    assert randattn.multiply_adds(pooled, 36, 36, 4, 4, num_segments=9) == 36 * 8 + 36 * 9 * 8
    found = randattn.diagnose(pooled, q, k, v, num_segments=9)
    assert found.estimator == "pooled"
    assert found.effective_samples is not None
    np.testing.assert_array_equal(found.num_weights, 9)

    from randattn.cli.app import run

    for command in ("compare", "diagnose"):
        more = ["--quick", "--backend", "numpy"] if command == "compare" else []
        sys.argv = ["randattn", command, "--estimator", "pooled", "--json", *more]
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            assert run() == 0
        report = json.loads(written.getvalue())
        names = {row["estimator"] for row in report["rows" if command == "compare" else "looks"]}
        assert names == {"pooled"}, (command, names)

    import torch

    layer = importlib.import_module("randattn.integrations.torch").Attention(8, 2, estimator="pooled")
    assert layer(torch.ones(1, 36, 8)).shape == (1, 36, 8)
    if importlib.util.find_spec("flax") is not None:
        import jax.numpy as jnp
        from flax import nnx

        layer = importlib.import_module("randattn.integrations.flax").Attention(
            8, 2, estimator="pooled", rngs=nnx.Rngs(0)
        )
        assert layer(jnp.ones((1, 36, 8))).shape == (1, 36, 8)

    from tests.helpers import capabilities

    (line,) = (line for line in capabilities.table().splitlines() if line.startswith("| `pooled` |"))
    assert line == "| `pooled` | all | all | no | NumPy, PyTorch, JAX, CuPy | PyTorch, JAX | PyTorch, JAX |"
    print("found everywhere")


if __name__ == "__main__":
    main()
