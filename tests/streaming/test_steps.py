"""Steps of EVA make groups where a window is over, and only there, whether or not that is known."""

import numpy as np
import pytest

from randattn import eva_step
from randattn._backends.dispatch import backend_of
from tests.helpers.calls import eva

N, WINDOW, D = 13, 4, 4


def inputs(lib, lead=(2,), seed=0):
    return lib.arrays(*np.random.default_rng(seed).standard_normal((3, *lead, N, D)))


def begun(arrays, n):
    options = {"window": WINDOW, "group_size": 2, "rng": 0, "is_causal": True}
    return eva(*(x[..., :n, :] for x in arrays), max_tokens=N, return_state=True, **options)[1]


def one(arrays, n):
    return [x[..., n : n + 1, :] for x in arrays]


def same(lib, found, expected):
    """Results and states; -inf stands for what a window does not have yet."""
    for x, y in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(lib.numpy(x), lib.numpy(y), rtol=1e-11, atol=1e-13)


def test_groups_are_left_alone_within_a_window(lib):
    """In the same memory, where the window's end is known without waiting for a device."""
    arrays = inputs(lib)
    at_hand = lib.name in ("numpy", "torch") and backend_of(arrays[0]).is_at_hand(arrays[0])
    state = begun(arrays, WINDOW)
    for n in range(WINDOW, 3 * WINDOW):
        _, after = eva_step(*one(arrays, n), state)
        is_last = (n + 1) % WINDOW == 0
        for name in ("mean_key", "beta", "weight"):
            old, new = (lib.numpy(getattr(s, name)) for s in (state, after))
            assert np.array_equal(old, new) is not is_last
            if at_hand:
                assert np.shares_memory(old, new) is not is_last
        state = after


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("n", [WINDOW, 2 * WINDOW - 1])
def test_a_step_that_is_compiled(lib, n):
    arrays = inputs(lib)
    state, token = begun(arrays, n), one(arrays, n)
    if lib.name == "jax":
        import jax

        compiled = jax.jit(eva_step)
    elif lib.name == "torch":
        import torch

        compiled = torch.compile(eva_step, fullgraph=True, backend="eager")
    else:
        pytest.skip("for torch, jax")
    same(lib, compiled(*token, state), eva_step(*token, state))


def test_sequences_that_are_not_as_long(lib):
    """Mapped over: the one has a window that is over with this token, the other has not."""
    if lib.name == "jax":
        import jax

        mapped = jax.vmap(eva_step)
    elif lib.name == "torch":
        import torch

        mapped = torch.func.vmap(eva_step)
    else:
        pytest.skip("for torch, jax")
    arrays, xp = inputs(lib), lib.xp
    lengths = (WINDOW + 1, 2 * WINDOW - 1)
    states, tokens = [begun(arrays, n) for n in lengths], [one(arrays, n) for n in lengths]
    together = type(states[0])(*(xp.stack(fields) for fields in zip(*states, strict=True)))
    out, after = mapped(*(xp.stack(x) for x in zip(*tokens, strict=True)), together)
    for i, (state, token) in enumerate(zip(states, tokens, strict=True)):
        same(lib, (out[i], [field[i] for field in after]), eva_step(*token, state))


def test_a_step_on_no_device(lib):
    """PyTorch's meta device has shapes alone."""
    if lib.name != "torch":
        pytest.skip("for torch")
    arrays = inputs(lib)
    state = begun(arrays, 5)
    out, after = eva_step(
        *(x.to("meta") for x in one(arrays, 5)), type(state)(*(x.to("meta") for x in state))
    )
    assert out.shape == (2, 1, D)
    assert [x.shape for x in after] == [x.shape for x in state]
