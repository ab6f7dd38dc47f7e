"""Derivatives of first, second and third order: of each order those of the order before, by differences.

A derivative of a scalar along fixed directions is a scalar again, so that reverse mode can be applied to itself. The
arrays of a call may be one tensor, be computed from one, or be apart: gradients must count each path once.
"""

from functools import partial

import numpy as np
import pytest

from randattn import eva_step, rfa_step
from tests.helpers import calls
from tests.helpers.forms import ESTIMATORS, beyond
from tests.helpers.libraries import FOR_GRADIENTS

N, D = 8, 3
RNG = np.random.default_rng(0)
# Keys and values that are computed from the queries.
ONTO_K, ONTO_V = RNG.standard_normal((2, D, D))
WEIGHTS = RNG.standard_normal((2, N, D))
INPUTS = {
    "shared": lambda lib, x: (x, x, x),
    "derived": lambda lib, x: (x, x @ lib.asarray(ONTO_K), lib.xp.tanh(x @ lib.asarray(ONTO_V))),
    "separate": lambda lib, q, k, v: (q, k, v),
}
STEP = 1e-5


def attended(q, k, v, **options):
    """Both results: the average and the logarithm of the weights' sum."""
    out, log_norm = calls.attend(q, k, v, 0.3 * k[..., 0], **options)
    return out + log_norm[..., None] ** 2


def merged(q, k, v):
    return calls.merge(calls.attend(q, k[:, :3], v[:, :3]), calls.attend(q, k[:, 3:], v[:, 3:]))[0]


def in_steps(begin, step, q, k, v):
    """All but two tokens in one call, and these by a step."""
    first, state = begin(q[:, :-2], k[:, :-2], v[:, :-2], rng=0, is_causal=True, return_state=True)
    last, _ = step(q[:, -2:], k[:, -2:], v[:, -2:], state)
    return (first**2).mean() + last


FUNCTIONS = {
    **ESTIMATORS,
    "attend": attended,
    "attend causal": partial(attended, is_causal=True),
    "merge": merged,
    "rfa step": partial(in_steps, partial(calls.rfa, num_samples=8), rfa_step),
    "eva step": partial(in_steps, partial(calls.eva, window=3, group_size=1, max_tokens=N), eva_step),
}


def losses(lib, name, kind):
    """The scalar function of the leaves, the leaves, and a direction for each."""
    count = 3 if kind == "separate" else 1
    rng = np.random.default_rng(1)
    leaves, along = (rng.standard_normal((count, 2, N, D)) for _ in range(2))
    weights = lib.asarray(WEIGHTS)

    def loss(*leaves):
        out = FUNCTIONS[name](*INPUTS[kind](lib, *leaves))
        return lib.xp.sum(weights[..., -out.shape[-2] :, :] * lib.xp.sin(2 * out))

    return loss, leaves, along


def by_autograd(lib, loss, along, orders):
    """Make a function that gives the derivatives of all orders: each with a graph that the next one is taken of."""
    import torch

    def derivatives(*leaves):
        leaves = [x.clone().requires_grad_() for x in leaves]
        values = [loss(*leaves)]
        for _ in range(orders):
            slopes = torch.autograd.grad(values[-1], leaves, create_graph=True)
            values.append(sum((x * y).sum() for x, y in zip(slopes, lib.arrays(*along), strict=True)))
        return [x.detach() for x in values]

    return derivatives


def by_functions(lib, loss, along, orders):
    """Make that function by the library's own, which make gradients of functions."""
    if lib.name == "torch":
        import torch

        grad = torch.func.grad
    else:
        import jax

        grad = jax.grad
    each = [loss]
    for _ in range(orders):
        slopes = grad(each[-1], tuple(range(len(along))))
        each.append(
            lambda *leaves, slopes=slopes: sum(
                lib.xp.sum(x * y) for x, y in zip(slopes(*leaves), lib.arrays(*along), strict=True)
            )
        )

    def derivatives(*leaves):
        return [one(*leaves) for one in each]

    return derivatives if lib.name == "torch" else jax.jit(derivatives, compiler_options=FOR_GRADIENTS)


def check(lib, make, name, kind, orders):
    loss, leaves, along = losses(lib, name, kind)
    derivatives = make(lib, loss, along, orders)
    here, after, before = (
        np.array([float(x) for x in derivatives(*lib.arrays(*(leaves + step * along)))])
        for step in (0.0, STEP, -STEP)
    )
    differences = (after - before) / (2 * STEP)
    np.testing.assert_allclose(here[1:], differences[:-1], rtol=1e-6, atol=1e-6)
    assert np.max(np.abs(here[1:])) > 0.1


@pytest.mark.only("torch")
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_by_autograd(lib, name, kind):
    """`create_graph=True`, three times over; without it the first is the same."""
    import torch

    check(lib, by_autograd, name, kind, 3)
    loss, leaves, _ = losses(lib, name, kind)
    leaves = [x.requires_grad_() for x in lib.arrays(*leaves)]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    with_graph = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    for actual, expected in zip(with_graph, plain, strict=True):
        lib.close(actual, lib.numpy(expected))


@pytest.mark.only("torch")
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_is_as_the_pure_path(lib, name, kind):
    """`torch.func` goes through the plain operations; PyTorch's own graph through gradients of ours."""
    loss, leaves, along = losses(lib, name, kind)
    arrays = lib.arrays(*leaves)
    ours, pure = (make(lib, loss, along, 2)(*arrays) for make in (by_autograd, by_functions))
    for actual, expected in zip(ours, pure, strict=True):
        lib.close(actual, lib.numpy(expected), rtol=1e-9)


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", ["softmax", "rfa positive", "ra", "lara optimal", "eva", "attend"])
def test_by_torch_func(lib, name):
    check(lib, by_functions, name, "derived", 3)


@pytest.mark.only("jax")
@pytest.mark.parametrize(
    "name",
    beyond(
        [
            *("softmax", "rfa positive", "rfa optimal", "ra", "lara optimal", "eva", "adaptive_eva"),
            *("rfa causal", "eva causal", "attend causal", "merge", "rfa step", "eva step"),
        ],
        ("softmax", "ra", "eva", "adaptive_eva", "merge"),
        "jax",
    ),
)
def test_by_jax(lib, name):
    """Reverse over reverse."""
    check(lib, by_functions, name, "derived", 2)


@pytest.mark.only("jax")
@pytest.mark.parametrize("name", ["softmax", "rfa positive", "attend"])
def test_third_by_jax(lib, name):
    check(lib, by_functions, name, "shared", 3)


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_cotangents_at_once(lib, name):
    """`vectorize=True` and `is_grads_batched=True`, with a graph and without."""
    import torch

    _, (leaf,), _ = losses(lib, name, "derived")

    def function(x):
        return FUNCTIONS[name](*INPUTS["derived"](lib, x))[..., :2]

    x = lib.asarray(leaf).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(function, x, create_graph=True)
    (expected,) = torch.autograd.grad((jacobian**2).sum(), x)
    lib.close(torch.autograd.functional.jacobian(function, x, vectorize=True), lib.numpy(jacobian))
    out = function(x)
    each = torch.eye(out.numel(), dtype=out.dtype).reshape(-1, *out.shape)
    for create_graph in (False, True):
        options = {"is_grads_batched": True, "create_graph": create_graph, "retain_graph": True}
        (rows,) = torch.autograd.grad(out, x, each, **options)
        lib.close(rows, lib.numpy(jacobian).reshape(rows.shape))
    (slope,) = torch.autograd.grad((rows**2).sum(), x)
    lib.close(slope, lib.numpy(expected), rtol=1e-9)
