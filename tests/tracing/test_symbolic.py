"""Sizes that a compiler keeps symbolic: one program serves many, and what must be known says so."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from randattn import adaptive_eva, attend, eva, lara, ra, rfa, softmax_attention
from randattn._core import block_sizes
from randattn._core import tracing as static
from randattn._core.library import namespace
from tests.helpers.forms import beyond

HEADS, N, D = 2, 24, 4


def own_noise(function, *lead, **options):
    """Draws of one sequence for all: no size of the batch is in them."""
    draws = np.random.default_rng(1).standard_normal((*lead, D))

    def call(q, k, v):
        return function(q, k, v, noise=namespace(q).asarray(draws), **options)

    return call


def own_noise_and_mask(q, k, v, key_mask):
    return own_noise(rfa, 8, features="optimal", key_mask=key_mask)(q, k, v)


# No size but that of the features has to be known.
ANY_LENGTH = {
    "softmax": softmax_attention,
    "softmax causal": partial(softmax_attention, is_causal=True),
    "attend": lambda q, k, v: attend(q, k, v, pair_bias=q @ k.swapaxes(-1, -2)).out,
    "rfa": own_noise(rfa, 8),
    "rfa trigonometric": own_noise(rfa, 8, features="trigonometric"),
    "rfa optimal": own_noise(rfa, 8, features="optimal", precondition=True),
}
KNOWN_LENGTH = {
    "rfa causal": own_noise(rfa, 8, is_causal=True),
    "lara": own_noise(lara, 5),
    "lara biased": partial(lara, num_landmarks=5, weighting="biased"),
    "lara causal": own_noise(lara, 2, window=12, is_causal=True),
    "eva": partial(eva, num_groups=5, window=4),
    "eva causal": partial(eva, group_size=2, window=4, is_causal=True),
    "adaptive_eva": partial(adaptive_eva, group_size=6, num_exact=6, block_size=6),
}
ALL = {**ANY_LENGTH, **KNOWN_LENGTH}


def data(lib, batch=3, n=N):
    return lib.arrays(*np.random.default_rng(batch + n).standard_normal((3, batch, HEADS, n, D)))


def exported(lib, function, axis):
    """A program of any size on this axis."""
    if lib.name == "jax":
        from jax import export, jit

        dims = ["3", str(HEADS), str(N), str(D)]
        dims[axis] = "size"
        like = lib.xp.zeros(0).dtype
        argument = __import__("jax").ShapeDtypeStruct(export.symbolic_shape(", ".join(dims)), like)
        return jit(export.export(jit(function))(argument, argument, argument).call)
    torch = lib.xp

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v)

    shape = {axis: torch.export.Dim("size")}
    return torch.export.export(Module(), tuple(data(lib)), dynamic_shapes=(shape,) * 3).module()


@pytest.fixture(params=[False, True], ids=["whole", "in parts"])
def _in_parts(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(block_sizes, "PLAIN_LOGITS", 3 * HEADS * N * 8)


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("name", beyond(ALL, ("softmax", "rfa", "lara", "eva causal"), "jax", "torch"))
def test_exported_for_any_batch(lib, name):
    program = exported(lib, ALL[name], 0)
    for batch in (2, 5):
        arrays = data(lib, batch)
        lib.close(program(*arrays), lib.numpy(ALL[name](*arrays)), rtol=1e-10)


@pytest.mark.only("torch", "jax")
@pytest.mark.usefixtures("_in_parts")
@pytest.mark.parametrize("name", ANY_LENGTH)
def test_exported_for_any_length(lib, name):
    program = exported(lib, ANY_LENGTH[name], 2)
    for n in (2, 7, 90):
        arrays = data(lib, n=n)
        lib.close(program(*arrays), lib.numpy(ANY_LENGTH[name](*arrays)), rtol=1e-10)


def masked(function, q, k, v):
    """Mask what a size that is symbolic makes: every third token, and the last one."""
    xp = namespace(q)
    place = xp.arange(k.shape[-2])
    return function(q, k, v, key_mask=(place % 3 != 0) & (place < k.shape[-2] - 1))


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("name", ["softmax", "rfa optimal"])
def test_exported_with_padding(lib, name, axis):
    """Queries are as many as keys in every call, so that the mask is theirs too."""
    function = {"softmax": softmax_attention, "rfa optimal": own_noise_and_mask}[name]
    program = exported(lib, partial(masked, function), axis)
    for size in (2, 7):
        arrays = data(lib, size) if axis == 0 else data(lib, n=size)
        out = lib.numpy(program(*arrays))
        lib.close(program(*arrays), lib.numpy(masked(function, *arrays)), rtol=1e-10)
        assert np.all(out[..., ::3, :] == 0)


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("name", KNOWN_LENGTH)
def test_a_length_that_must_be_known(lib, name):
    with pytest.raises(ValueError, match="^k: expected sizes that are known when the program is made"):
        exported(lib, KNOWN_LENGTH[name], 2)


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("function", [rfa, ra, lara, partial(rfa, draws="orthogonal")])
def test_an_int_seed_draws_for_a_known_batch(lib, function):
    with pytest.raises(ValueError, match="^rng: expected sizes that are known .*noise needs none"):
        exported(lib, partial(function, rng=0), 0)


@pytest.mark.only("jax")
@pytest.mark.parametrize("draws", ["iid", "orthogonal", "simplex", "antithetic"])
def test_a_key_draws_for_any_batch(lib, draws):
    function = partial(rfa, rng=lib.generator(0), draws=draws, num_samples=6)
    arrays = data(lib, 5)
    lib.close(exported(lib, function, 0)(*arrays), lib.numpy(function(*arrays)), rtol=1e-10)


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", ["softmax", "lara"])
def test_a_size_that_export_may_fix(lib, name):
    """`Dim.AUTO` asks for nothing: the program has what it needs as a constant."""
    torch = lib.xp

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ALL[name](q, k, v)

    auto = {2: torch.export.Dim.AUTO}
    arrays = data(lib)
    program = torch.export.export(Module(), tuple(arrays), dynamic_shapes=(auto,) * 3).module()
    lib.close(program(*arrays), lib.numpy(ALL[name](*arrays)))


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", beyond(ALL, ("softmax", "rfa", "lara"), "torch"))
def test_one_program_for_all_batches(lib, name):
    """And, where the length need not be known, for all lengths."""
    torch = lib.xp
    torch._dynamo.reset()
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    program = torch.compile(ALL[name], dynamic=True, fullgraph=True, backend=counter)
    for batch, n in ((3, N), (2, N), (5, N)) + (((4, 2 * N),) if name in ANY_LENGTH else ()):
        arrays = data(lib, batch, n)
        lib.close(program(*arrays), lib.numpy(ALL[name](*arrays)), rtol=1e-10)
    assert counter.frame_count == 1


@pytest.mark.only("torch")
@pytest.mark.thorough("torch")
def test_a_larger_block_gets_a_program_of_its_own(lib, monkeypatch):
    """Memory stays in bounds: a program is for four times as many logits as the next smaller one."""
    monkeypatch.setattr(block_sizes, "PLAIN_LOGITS", 3 * HEADS * 32 * 32)
    torch = lib.xp
    torch._dynamo.reset()
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    program = torch.compile(softmax_attention, dynamic=True, fullgraph=True, backend=counter)
    for n, programs in ((20, 1), (10, 1), (40, 2), (60, 2), (70, 3)):
        arrays = data(lib, n=n)
        lib.close(program(*arrays), lib.numpy(softmax_attention(*arrays)))
        assert counter.frame_count == programs


@pytest.mark.only("numpy")
def test_layers_share_the_constants_of_a_program(monkeypatch):
    """A place for each array, not for each call, and no place that another array of late has."""
    monkeypatch.setattr(static, "MOST_ARRAYS", 3)
    for name in ("_arrays", "_place_of"):
        monkeypatch.setattr(static, name, {})
    one, other, *more = (np.arange(n) for n in range(1, 6))
    held = [static._held((x, "a name")) for x in (one, other, one, other)]
    assert [x.size for x, _ in held] == [1, 2, 1, 2]
    assert held[0] == held[2] != held[1] == held[3]
    later = [static._held(x).place for x in (*more, one)]
    assert len(set(later[-3:])) == 3
    assert all(static._arrays[place][0] is x for place, x in zip(later[-3:], (*more, one)[-3:], strict=True))


WARNS = """
import torch, randattn
x = list(torch.randn(3, 2, 3, 24, 4))
for function in ({functions}):
    torch.compile(function, fullgraph=True, backend="eager")(*x)
"""


@pytest.mark.only("torch")
@pytest.mark.parametrize(
    "functions",
    [
        "randattn.softmax_attention, lambda *x: randattn.attend(*x).out, lambda *x: randattn.rfa(*x, rng=0)",
        pytest.param(
            "lambda *x: randattn.lara(*x, num_landmarks=5, rng=0), lambda *x: randattn.ra(*x, rng=0)",
            marks=pytest.mark.thorough("torch"),
        ),
        "randattn.adaptive_eva, lambda *x: randattn.adaptive_eva(*x, group_size=8)",
    ],
    ids=["softmax", "lara", "eva"],
)
def test_the_first_call_of_a_process_warns_of_nothing(functions, lib):
    code = WARNS.format(functions=functions + ",")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lru_cache" not in done.stderr
