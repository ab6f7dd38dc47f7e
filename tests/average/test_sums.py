"""Sums of rows by groups: each library's own, and by the array API alone."""

import numpy as np
import pytest

from randattn._backends.dispatch import backend_of
from randattn._backends.generic import Backend


def test_sums_by_group(lib):
    """Each library's own are the plain ones, and what the definition says; of groups without a row, zero."""
    if lib.name == "dask":
        pytest.skip("it has the tokens whole")
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 9, 3))
    group = np.sort(rng.integers(0, 5, (2, 4, 6)), axis=-1)
    group[0, 0], group[1, 1] = 0, 4
    index = rng.integers(0, 9, (2, 4, 6))
    chosen = np.arange(5)[:, None] == group[..., None, :]
    expected = chosen @ np.stack([rows[at] for rows, at in zip(x, index, strict=True)])
    (x,) = lib.arrays(x)
    index, group = lib.asarray(index), lib.asarray(group)
    own = backend_of(x)
    lib.close(own.sums_by_group(x, index, group, 5), expected)
    lib.close(Backend.sums_by_group(own, x, index, group, 5), expected)
    if lib.name == "torch":
        import torch

        x.requires_grad_()
        # A GPU adds rows in another order each time.
        check = {"nondet_tol": 1e-12}
        assert torch.autograd.gradcheck(lambda x: own.sums_by_group(x, index, group, 5), x, **check)
        assert torch.autograd.gradgradcheck(lambda x: own.sums_by_group(x, index, group, 5) ** 2, x, **check)
