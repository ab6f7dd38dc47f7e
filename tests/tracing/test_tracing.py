"""Pure functions: under jit, vmap, grad, torch.compile, on the meta device. Eager calls here."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import randattn
from randattn._estimators import final_average
from tests.helpers import calls
from tests.helpers.forms import ESTIMATORS, beyond
from tests.helpers.libraries import jax_gradient

N, D, E = 12, 4, 3
# Without the suite's jit on JAX.
EAGER = {
    name: partial(randattn.softmax_attention)
    if name == "softmax"
    else partial(getattr(randattn, estimator.func.__name__), **estimator.keywords)
    for name, estimator in ESTIMATORS.items()
}

# One form of each estimator.
MAIN = ("softmax", "rfa positive", "ra", "lara optimal", "eva", "adaptive_eva")


def inputs(seed=0, lead=(2,)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, N, size)) for size in (D, D, E)]


MASK = np.arange(N) % 5 != 3


def functional(lib):
    """The library's own transformations: compile, vmap and gradient of a scalar function."""
    if lib.name == "torch":
        torch = lib.xp
        # Without a C compiler too; what fullgraph demands does not depend on the back end.
        compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
        return compiled, torch.func.vmap, torch.func.grad
    import jax

    return jax.jit, jax.vmap, jax_gradient


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("name", beyond(EAGER, MAIN, "jax", "torch"))
def test_compiled(lib, name):
    """Masked and not; and again at another length, where torch would make sizes symbolic."""
    compiled, _, _ = functional(lib)
    if lib.name == "torch":
        lib.xp._dynamo.reset()
    arrays, mask = lib.arrays(*inputs()), lib.asarray(MASK)
    one = compiled(EAGER[name])
    lib.close(one(*arrays), lib.numpy(EAGER[name](*arrays)))
    masked = compiled(lambda q, k, v, mask: EAGER[name](q, k, v, key_mask=mask))
    lib.close(masked(*arrays, mask), lib.numpy(EAGER[name](*arrays, key_mask=mask)))
    if lib.name == "torch":
        shorter = [x[:, :10] for x in arrays]
        lib.close(one(*shorter), lib.numpy(EAGER[name](*shorter)))


@pytest.mark.only("torch")
def test_a_seed_can_be_an_argument_of_a_compiled_function(lib):
    arrays = lib.arrays(*inputs())
    lib.xp._dynamo.reset()
    draw = lib.xp.compile(
        lambda q, k, v, seed: randattn.rfa(q, k, v, rng=seed), fullgraph=True, backend="aot_eager"
    )
    for seed in (0, 1, 2, 5):
        lib.close(draw(*arrays, seed), lib.numpy(randattn.rfa(*arrays, rng=seed)))


@pytest.mark.only("jax")
@pytest.mark.parametrize("legacy", [True, False])
def test_traced_keys(lib, legacy):
    """A JAX key is an argument like any other, also under vmap."""
    import jax

    arrays = lib.arrays(*inputs(lead=()))
    make = jax.random.PRNGKey if legacy else jax.random.key
    keys = [make(seed) for seed in range(3)]
    for function in (randattn.rfa, randattn.ra, randattn.lara, partial(randattn.eva, num_groups=3, window=4)):
        draw = jax.jit(lambda key, function=function: function(*arrays, rng=key))
        each = [lib.numpy(draw(key)) for key in keys]
        assert np.max(np.abs(each[0] - each[1])) > 1e-6
        lib.close(jax.vmap(draw)(lib.xp.stack(keys)), np.stack(each))


@pytest.mark.only("jax")
def test_a_traced_integer_is_no_seed(lib):
    import jax

    with pytest.raises(TypeError, match="rng: .*tracer is no seed"):
        jax.jit(lambda seed: randattn.rfa(*lib.arrays(*inputs()), rng=seed))(3)


@pytest.mark.only("torch")
def test_one_program_serves_many_lengths(lib):
    """Softmax and RFA keep sizes symbolic; a compiler stops after eight programs for one function."""
    lib.xp._dynamo.reset()
    compiled = lib.xp.compile(lambda q, k, v, w: (randattn.softmax_attention(q, k, v), randattn.rfa(q, k, v, noise=w)),
        fullgraph=True, backend="aot_eager")  # fmt: skip
    for n in range(4, 16):
        q, k, v, w = lib.arrays(*np.random.default_rng(n).standard_normal((4, n % 3 + 1, n, D)))
        exact, estimate = compiled(q, k, v, w)
        lib.close(exact, lib.numpy(randattn.softmax_attention(q, k, v)))
        lib.close(estimate, lib.numpy(randattn.rfa(q, k, v, noise=w)))


@pytest.mark.only("jax")
@pytest.mark.parametrize("name", ["rfa positive", "lara optimal", "eva unit"])
def test_what_is_created_follows_the_inputs(lib, name):
    """Nothing commits a result to a device that the inputs did not: those made without one did not."""
    arrays = map(lib.xp.asarray, inputs())
    out = EAGER[name](*arrays, key_mask=lib.xp.asarray(MASK))
    assert not out.committed


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("name", beyond(EAGER, MAIN[:5], "jax"))
def test_vmap(lib, name):
    """Each element of the batch as if it were alone (an int seed draws the same for each)."""
    _, vmap, _ = functional(lib)
    arrays = lib.arrays(*inputs(lead=(3,)))
    function = getattr(calls, EAGER[name].func.__name__)
    alone = partial(function, **EAGER[name].keywords)
    each = [lib.numpy(alone(*(x[i] for x in arrays))) for i in range(3)]
    lib.close(vmap(EAGER[name])(*arrays), np.stack(each))
    lib.close(vmap(EAGER[name], (0, None, None))(arrays[0], *(x[1] for x in arrays[1:]))[1], each[1])


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.thorough("jax")), True])
@pytest.mark.parametrize("name", EAGER)
def test_gradients_are_those_of_finite_differences(lib, name, masked):
    """Along a random direction in q, k and v at once."""
    _, _, grad = functional(lib)
    data = inputs(lead=())
    rng = np.random.default_rng(1)
    options = {"key_mask": lib.asarray(MASK)} if masked else {}
    weights = lib.asarray(rng.standard_normal((N, E)))
    directions = [rng.standard_normal(x.shape) for x in data]

    def loss(q, k, v):
        return lib.xp.sum(weights * EAGER[name](q, k, v, **options))

    gradients = grad(loss, argnums=(0, 1, 2))(*lib.arrays(*data))
    slope = sum(np.sum(lib.numpy(g) * d) for g, d in zip(gradients, directions, strict=True))
    step = 1e-6
    ends = [
        float(loss(*lib.arrays(*(x + sign * step * d for x, d in zip(data, directions, strict=True)))))
        for sign in (1, -1)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6)
    if masked:
        for gradient in gradients[1:]:
            assert np.all(lib.numpy(gradient)[~MASK] == 0)


@pytest.mark.only("torch", "jax")
@pytest.mark.thorough("jax")
@pytest.mark.parametrize("name", EAGER)
def test_gradients_of_a_row_without_keys_are_zeros(lib, name):
    """And not NaN, also where the padded keys are."""
    _, _, grad = functional(lib)
    q, k, v = inputs()
    mask = np.stack([np.ones(N, dtype=bool), np.zeros(N, dtype=bool)])
    nan = np.where(mask[..., None], 0.0, np.nan)
    keep = lib.asarray(mask)

    def loss(q, k, v):
        return lib.xp.sum(EAGER[name](q, k, v, key_mask=keep) ** 2)

    for gradient in grad(loss, argnums=(0, 1, 2))(*lib.arrays(q, k + nan, v + nan)):
        values = lib.numpy(gradient)
        assert np.all(np.isfinite(values))
        assert np.all(values[1] == 0)
        assert np.any(values[0] != 0)


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", EAGER)
def test_meta_device(lib, name):
    """Shapes without data: nothing looks at a value, so nothing waits for a GPU either."""
    arrays = [x.to("meta") for x in lib.arrays(*inputs(), dtype="float32")]
    mask = lib.asarray(MASK).to("meta")
    for options in ({}, {"key_mask": mask}):
        out = EAGER[name](*arrays, **options)
        assert (out.device.type, tuple(out.shape), out.dtype) == ("meta", (2, N, E), lib.xp.float32)


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", EAGER)
def test_backward_through_autograd(lib, name):
    """The other way to gradients in torch: the same as torch.func's."""
    arrays = lib.arrays(*inputs(lead=()))
    expected = lib.xp.func.grad(lambda *a: EAGER[name](*a).sin().sum(), argnums=(0, 1, 2))(*arrays)
    leaves = [x.clone().requires_grad_() for x in arrays]
    EAGER[name](*leaves).sin().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        lib.close(leaf.grad, lib.numpy(gradient))


@pytest.mark.only("dask")
@pytest.mark.parametrize("name", EAGER)
def test_dask_stays_lazy(lib, name):
    """Nothing is computed before it is asked for."""
    import dask

    def compute(*_, **__):
        raise AssertionError("computed")

    with dask.config.set(scheduler=compute):
        out = EAGER[name](*lib.arrays(*inputs()), key_mask=lib.asarray(MASK))
    assert out.shape == (2, N, E)


@pytest.mark.only("numpy", "torch", "jax", "cupy", "strict")
@pytest.mark.parametrize("name", ["softmax", "rfa positive", "eva", "adaptive_eva"])
def test_a_look_leaves_nothing_behind(lib, name):
    """A library may keep the program of a call that `diagnose` makes: the next call has no more columns."""
    arrays = lib.arrays(*np.random.default_rng(7).standard_normal((3, 2, 13, 4)))
    with final_average.watched():
        looked_at = EAGER[name](*arrays)
    out = EAGER[name](*arrays)
    assert looked_at.shape[-1] == out.shape[-1] + 3
    lib.close(looked_at[..., :4], lib.numpy(out), rtol=1e-10)
