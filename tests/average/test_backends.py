"""The `attend` of each backend is the plain one: results, gradients, and gradients of gradients."""

import math

import numpy as np
import pytest

from randattn import lara, rfa, softmax_attention
from randattn._backends import dispatch
from randattn._core import average as plain
from randattn._core import block_sizes
from randattn._core.average import Average, Keys
from randattn._core.library import namespace
from tests.average.cases import CASES, D, E, N, prepared
from tests.helpers.blocks import make_blocks, make_small
from tests.helpers.forms import ESTIMATORS, beyond

DIFFERENTIABLE = ("torch", "jax")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_same_average(lib, case, small, monkeypatch):
    if lib.name == "dask" and case.startswith("no head"):
        pytest.skip("Dask has no maximum over nothing")
    arrays, call, mask = prepared(lib, case)
    expected = call(plain.attend, mask, *arrays)
    if small:
        make_small(monkeypatch)
    actual = call(dispatch.attend, mask, *arrays)
    lib.close(actual.out, lib.numpy(expected.out))
    assert actual.log_norm.shape == expected.log_norm.shape
    left = lib.numpy(expected.log_norm) > -np.inf
    assert np.array_equal(left, lib.numpy(actual.log_norm) > -np.inf)
    lib.close(lib.asarray(lib.numpy(actual.log_norm)[left]), lib.numpy(expected.log_norm)[left])


@pytest.mark.parametrize(
    "case",
    [
        *("plain", "causal", "few queries", "many queries", "windows", "weighted"),
        *("logits far below zero", "biases that logits oppose", "windows that leave out keys"),
        *("bias of more heads, few keys", "bias of more heads, a hole"),
    ],
)
def test_in_single_precision(lib, case, monkeypatch):
    """Blocks of the sizes that are used, against the pure path in float64."""
    make_blocks(monkeypatch)
    arrays, call, mask = prepared(lib, case)
    expected = lib.numpy(call(plain.attend, mask, *arrays).out)
    xp = namespace(arrays[0])
    single = [xp.astype(x, xp.float32) for x in arrays]
    lib.close(call(dispatch.attend, mask, *single).out, expected, rtol=3e-6)


def test_a_last_block_of_queries_that_is_shorter(lib, monkeypatch):
    """It cuts the keys at the same places: their gradients are sums over all blocks."""
    if lib.name not in DIFFERENTIABLE:
        pytest.skip("for torch, jax")
    rng = np.random.default_rng(0)
    arrays = lib.arrays(*(rng.standard_normal(shape) for shape in ((25, D), (60, D), (60, E))))
    cotangents = lib.arrays(rng.standard_normal((25, E)), rng.standard_normal(25))

    def gradients(attend):
        return pullback(lib, lambda q, k, v: tuple(attend(q, Keys(k, v))), arrays, cotangents)

    expected = gradients(plain.attend)
    make_small(monkeypatch)
    for name, size in (("INPLACE_LOGITS", 200), ("INPLACE_MIN_QUERIES", 14), ("INPLACE_FEW_QUERIES", 100)):
        monkeypatch.setattr(block_sizes, name, size)
    for actual, right in zip(gradients(dispatch.attend), expected, strict=True):
        lib.close(actual, lib.numpy(right))


def test_large_values_of_large_sums(lib, monkeypatch):
    """Keys in several steps, whose sums are far from float32's end until they meet the values."""
    make_small(monkeypatch)
    q, k, v = lib.arrays(np.ones((8, 4)), np.full((90, 4), 59 / 4), np.full((90, 3), 1e17), dtype="float32")
    lib.close(dispatch.attend(q, Keys(k, v)).out, np.full((8, 3), 1e17), rtol=1e-5)


def pullback(lib, function, arrays, cotangents):
    """The gradients of the sum of the results times the cotangents."""
    if lib.name == "jax":
        import jax

        return jax.vjp(function, *arrays)[1](tuple(cotangents))
    import torch

    arrays = [x.detach().requires_grad_() for x in arrays]
    found = torch.autograd.grad(function(*arrays), arrays, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(arrays, found, strict=True)]


@pytest.mark.parametrize("small", [pytest.param(False, marks=pytest.mark.thorough("jax")), True])
@pytest.mark.parametrize(
    "case",
    beyond(
        [case for case in CASES if case != "no values"],
        (
            *("causal", "weighted, masked", "by features, biased", "no key left", "growing logits"),
            *("biased by pairs", "causal, second of two sets"),
        ),
        "jax",
    ),
)
def test_the_same_gradients(lib, case, small, monkeypatch):
    """Through both results: the average, and the logarithm of the weights' sum."""
    if lib.name not in DIFFERENTIABLE:
        pytest.skip("for torch, jax")
    arrays, call, mask = prepared(lib, case)

    def gradients(attend):
        def function(*arrays):
            out, log_norm = call(attend, mask, *arrays)
            return out, lib.xp.where(log_norm > -math.inf, log_norm, 0.0)

        shapes = [tuple(x.shape) for x in call(plain.attend, mask, *arrays)]
        rng = np.random.default_rng(1)
        return pullback(lib, function, arrays, lib.arrays(*(rng.standard_normal(shape) for shape in shapes)))

    expected = [lib.numpy(x) for x in gradients(plain.attend)]
    if small:
        make_small(monkeypatch)
    for actual, right in zip(gradients(dispatch.attend), expected, strict=True):
        assert np.all(np.isfinite(lib.numpy(actual)))
        assert np.linalg.norm(lib.numpy(actual) - right) <= 1e-10 * max(1.0, np.linalg.norm(right))


@pytest.mark.parametrize(
    "case",
    beyond(
        ["plain", "of one width", "by features", "shared keys", "causal", "windows", "weighted"],
        ("weighted",),
        "jax",
    ),
)
def test_the_same_second_derivatives(lib, case):
    """The gradient of the norm of the gradient."""
    if lib.name not in DIFFERENTIABLE:
        pytest.skip("for torch, jax")
    arrays, call, mask = prepared(lib, case)

    if lib.name == "jax":
        import jax

        def second(attend):
            def first(*arrays):
                slopes = jax.grad(lambda *arrays: (call(attend, mask, *arrays).out ** 2).sum(), (0, 1))(
                    *arrays
                )
                return sum((x**2).sum() for x in slopes)

            return jax.grad(first, (0, 1))(*arrays)
    else:
        import torch

        def second(attend):
            leaves = [x.detach().requires_grad_() for x in arrays]
            total = (call(attend, mask, *leaves).out ** 2).sum()
            slopes = torch.autograd.grad(total, leaves[:2], create_graph=True)
            return torch.autograd.grad(sum((x**2).sum() for x in slopes), leaves[:2])

    for actual, expected in zip(second(dispatch.attend), second(plain.attend), strict=True):
        lib.close(actual, lib.numpy(expected), rtol=1e-9)


def test_layouts_that_a_kernel_may_not_know(lib):
    """Axes in any order in memory, keys that are one in memory, and no sequence at all."""
    q, k, v = np.random.default_rng(2).standard_normal((3, 2, 3, D, N))
    arrays = [lib.xp.asarray(x) if lib.name == "numpy" else lib.asarray(x) for x in (q, k, v)]
    turned = [namespace(x).matrix_transpose(x) for x in arrays]
    straight = lib.arrays(*(np.ascontiguousarray(x.swapaxes(-1, -2)) for x in (q, k, v)))
    expected = lib.numpy(plain.attend(straight[0], Keys(*straight[1:])).out)
    lib.close(dispatch.attend(turned[0], Keys(*turned[1:])).out, expected)
    nothing = [x[:0, ...] for x in straight]
    assert tuple(dispatch.attend(nothing[0], Keys(*nothing[1:])).out.shape) == (0, 3, N, D)


def test_gradients_of_some_arrays_alone(lib):
    """Fixed frequencies: what needs no gradient gets none, the others the same."""
    if lib.name != "torch":
        pytest.skip("for torch")
    import torch

    q, k, v, w = lib.arrays(*np.random.default_rng(3).standard_normal((4, 2, N, D)))
    everything = [x.clone().requires_grad_() for x in (q, k, v)]
    all_of_them = torch.autograd.grad((rfa(*everything, noise=w) ** 2).sum(), everything)
    for number, expected in enumerate(all_of_them):
        some = [x.clone().requires_grad_(i == number) for i, x in enumerate((q, k, v))]
        (rfa(*some, noise=w) ** 2).sum().backward()
        lib.close(some[number].grad, lib.numpy(expected))
        assert all(x.grad is None for i, x in enumerate(some) if i != number)


# PyTorch's own rules for it are made with what it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode(lib):
    """Jacobian times vector, by dual numbers and by a transformation: as the pure path has it."""
    if lib.name != "torch":
        pytest.skip("for torch")
    import torch
    from torch.autograd import forward_ad

    q, k, v, dq = lib.arrays(*np.random.default_rng(4).standard_normal((4, 2, N, D)))
    step = 1e-6
    expected = (lara(q + step * dq, k, v) - lara(q - step * dq, k, v)) / (2 * step)
    _, slope = torch.func.jvp(lambda q: lara(q, k, v), (q,), (dq,))
    lib.close(slope, lib.numpy(expected), rtol=1e-6)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(lara(forward_ad.make_dual(q, dq), k, v)).tangent
    lib.close(slope, lib.numpy(expected), rtol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_autocast_changes_nothing(lib, name):
    """Logits in half precision would be off by whole units; also in the gradient."""
    if lib.name != "torch":
        pytest.skip("for torch")
    import torch

    rng = np.random.default_rng(5)
    q, k, v = lib.arrays(*(3 * rng.standard_normal((3, 2, N, D))), dtype="float32")
    q.requires_grad_()
    expected = ESTIMATORS[name](q, k, v)
    slope = torch.autograd.grad(expected.sum(), q)[0]
    with torch.autocast(lib.device.type, dtype=torch.bfloat16):
        actual = ESTIMATORS[name](q, k, v)
    again = torch.autograd.grad(actual.sum(), q)[0]
    assert torch.equal(actual, expected)
    assert torch.equal(again, slope)


def test_a_gradient_of_gradients_within_autocast(lib):
    """PyTorch takes its own products in half precision there; the average stays in float32."""
    if lib.name != "torch":
        pytest.skip("for torch")
    import torch

    q, k, v = lib.arrays(*(3 * np.random.default_rng(5).standard_normal((3, 2, N, D))), dtype="float32")
    q.requires_grad_()
    expected = torch.autograd.grad(softmax_attention(q, k, v).sum(), q)[0]
    with torch.autocast(lib.device.type, dtype=torch.bfloat16):
        actual = torch.autograd.grad(softmax_attention(q, k, v).sum(), q, create_graph=True)[0]
    lib.close(actual, lib.numpy(expected), rtol=1e-5)


def test_without_the_kernel_of_pytorch(lib, monkeypatch):
    """A future PyTorch may not have it, or have another."""
    if lib.name != "torch":
        pytest.skip("for torch")
    arrays, call, mask = prepared(lib, "of one width")
    expected = call(plain.attend, mask, *arrays)
    from randattn._backends import torch as own

    assert own.flash_works()
    monkeypatch.setattr(own, "flash_works", lambda: False)
    actual = call(dispatch.attend, mask, *arrays)
    lib.close(actual.out, lib.numpy(expected.out))
    assert isinstance(actual, Average)
