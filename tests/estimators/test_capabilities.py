"""The table of capabilities in the documentation is true of each estimator on each library."""

import functools
import importlib

import numpy as np
import pytest

from tests.helpers.capabilities import CAPABILITIES, calls, without
from tests.helpers.forms import beyond
from tests.helpers.libraries import jax_gradient

N, D, E = 12, 4, 3
CALLS = calls()
RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, N, size)) for size in (D, D, E))


def masked(lib, call):
    arrays, mask = lib.arrays(Q, K, V), lib.asarray(np.arange(N) < N - 2)
    changed = np.where((np.arange(N) < N - 2)[:, None], V, np.nan)
    out = call(*arrays, key_mask=mask)
    np.testing.assert_array_equal(
        lib.numpy(call(*arrays[:2], lib.asarray(changed), key_mask=mask)), lib.numpy(out)
    )
    return out, arrays[0]


def grouped(lib, call):
    q, k, v = lib.arrays(Q, K[:1], V[:1])
    return call(q, k, v, enable_gqa=True), q


def causal(lib, call):
    q, k, v = lib.arrays(Q, K, V)
    changed = V.copy()
    changed[:, 7:] = 9
    out, other = (lib.numpy(call(q, k, x, is_causal=True)) for x in (v, lib.asarray(changed)))
    np.testing.assert_array_equal(out[:, :7], other[:, :7])
    return lib.asarray(out), q


def half(lib, call):
    for dtype in lib.half:
        arrays = lib.arrays(Q, K, V, dtype=dtype)
        out = call(*arrays)
        assert out.dtype == arrays[0].dtype
    return out, arrays[0]


def compiled(lib, call):
    arrays = lib.arrays(Q, K, V)
    if lib.name == "jax":
        return importlib.import_module("jax").jit(call)(*arrays), arrays[0]
    lib.xp.compiler.reset()
    made = lib.xp.compile(call, fullgraph=True, backend="eager")
    return made(*arrays), arrays[0]


def gradient(lib, call):
    arrays = lib.arrays(Q, K, V)
    if lib.name == "jax":
        found = jax_gradient(lambda *x: lib.xp.sum(call(*x) ** 2), (0, 1, 2))(*arrays)
    else:
        leaves = [x.requires_grad_() for x in arrays]
        found = lib.xp.autograd.grad((call(*leaves) ** 2).sum(), leaves)
    # Exact attention of one key alone would not ask for the others.
    assert all(np.abs(lib.numpy(one)).max() > 0 for one in found)
    return call(*lib.arrays(Q, K, V)), arrays[0]


CHECKS = {check.__name__: check for check in (masked, grouped, causal, half, compiled, gradient)}


def test_each_has_its_check():
    assert set(CHECKS) == set(CAPABILITIES)
    for capability in CAPABILITIES:
        assert without(capability) < set(CALLS)
    assert without("causal")


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize(
    "capability", beyond(CAPABILITIES, ("causal", "half", "compiled"), "jax", "dask", "torch")
)
@pytest.mark.parametrize("name", CALLS)
def test_as_the_table_says(lib, name, capability):
    if lib.name not in CAPABILITIES[capability].libraries:
        # Nothing is claimed: what a library has not, it has not for any of them.
        assert capability in ("half", "compiled", "gradient")
        return
    check = functools.partial(CHECKS[capability], lib, CALLS[name])
    if name in without(capability):
        with pytest.raises((NotImplementedError, ValueError, TypeError), match=capability):
            check()
        return
    out, like = check()
    lib.check(out, like, (2, N, E))
    assert np.all(np.isfinite(lib.numpy(out)))
