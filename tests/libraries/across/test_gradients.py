"""Gradients of torch and JAX, with the same seeds, in one environment."""

import numpy as np
import pytest

from tests.helpers.forms import VARIANTS
from tests.helpers.libraries import jax_gradient, open_library
from tests.tracing.test_tracing import EAGER, MASK, N, inputs

torch = pytest.importorskip("torch")
pytest.importorskip("jax")
TORCH, JAX = open_library("torch", None), open_library("jax", None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in EAGER if name not in VARIANTS])
def test_torch_and_jax_agree(name, masked):
    weights = np.random.default_rng(2).standard_normal((2, N, 3))

    def gradients(lib, transform):
        options = {"key_mask": lib.asarray(MASK)} if masked else {}
        loss = lambda *a: lib.xp.sum(lib.asarray(weights) * EAGER[name](*a, **options))  # noqa: E731
        return [lib.numpy(g) for g in transform(loss)(*lib.arrays(*inputs()))]

    ours = gradients(TORCH, lambda f: torch.func.grad(f, argnums=(0, 1, 2)))
    theirs = gradients(JAX, lambda f: jax_gradient(f, (0, 1, 2)))
    for one, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(one) > 0
        assert np.linalg.norm(one - other) <= 1e-9 * np.linalg.norm(other)
