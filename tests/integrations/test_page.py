"""The examples of docs/integrations.md, one after the other."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm", exc_type=ImportError)
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def test_page():
    text = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    scope = {}
    for block in blocks:
        lines = text[: text.index(block)].count("\n")
        exec(compile("\n" * lines + block, PAGE.name, "exec"), scope)
        if "ours" in scope and "x" in scope and "checked" not in scope:
            # "What PyTorch's layer gives."
            scope["checked"], layer = True, scope["layer"].eval()
            x = scope["x"].numpy()
            ours = np.asarray(scope["ours"](scope["jnp"].asarray(x)))
            np.testing.assert_allclose(ours, layer(scope["x"]).detach().numpy(), atol=1e-5)
    assert scope["checked"]
    assert all(type(block.attn).__module__.startswith("randattn") for block in scope["model"].blocks)
