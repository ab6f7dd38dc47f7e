"""Random draws: from the caller's `rng` or `noise` to standard normal (and uniform) arrays.

NumPy's Philox makes the draws of an int seed in float64, and they are moved to the device, so that a seed
gives the same draws on every library. A library's own generator draws on its own device.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from typing import Any, Literal, cast

import array_api_compat as compat

from .checks import broadcast_shapes, check_broadcast
from .describe import shown, type_name
from .inputs import Inputs
from .library import Array, Namespace, check_known, is_array, known_library
from .tracing import plain, static

Kind = Literal["iid", "orthogonal", "simplex", "antithetic", "qmc", "uniform"]

_EXPECTED = (
    "expected an int seed, or a generator of the arrays' own library (numpy.random.Generator, "
    "torch.Generator, cupy.random.Generator or a JAX key)"
)


def normal_draws(
    x: Inputs,
    shape: tuple[int, ...],
    *,
    rng: Any,
    noise: Array | None,
    axes: str,
    kind: str = "iid",
    lead: tuple[int, ...] = (),
) -> Array | None:
    """Return standard normal draws (..., *shape) from `rng`, or the caller's `noise`; None with neither.

    `axes` names the axes of `shape` in errors. The draws have every leading axis of the result, also axes
    that only further arrays have (`lead`): no two heads or sequences share a draw. With a kind other than
    "iid" each row is standard normal too, but rows depend on each other (`_arranged`).
    """
    if noise is not None:
        if rng is not None:
            raise ValueError("noise: expected either rng or noise, got both")
        return _given("noise", noise, x, shape, axes, has_features=True)
    if rng is None:
        return None
    return _drawn(rng, x, cast("Kind", kind), (*broadcast_shapes(x.lead, lead), *shape))


def uniform_draws(
    x: Inputs, shape: tuple[int, ...], *, rng: Any, components: Array | None, axes: str
) -> Array:
    """Return uniform draws (..., *shape) in [0, 1), or the caller's `components`.

    The uniform draws of an `rng` are independent of its normal draws.
    """
    if components is not None:
        return _given("components", components, x, shape, axes, has_features=False)
    return _drawn(rng, x, "uniform", (*x.lead, *shape))


def spawned(rng: Any, count: int, x: Inputs) -> list[Any]:
    """Return `count` sources of independent draws: int seeds, or JAX keys."""
    if _is_seed(rng):
        import numpy as np

        return [int(seed) for seed in np.random.SeedSequence(rng).generate_state(count)]
    if compat.is_jax_namespace(x.xp):
        return list(sys.modules["jax"].random.split(_checked_key(rng), count))
    if compat.is_torch_namespace(x.xp):
        torch = sys.modules["torch"]
        if not isinstance(rng, torch.Generator):
            raise _wrong(rng)
        seeds = torch.randint(2**31, (count,), generator=rng, device=rng.device)
    elif hasattr(rng, "integers"):
        seeds = rng.integers(2**31, size=count)
    else:
        raise _wrong(rng)
    return cast("list[Any]", seeds.tolist())


def no_draws(estimator: str) -> ValueError:
    """Return the error for an estimator that has no form without draws."""
    return ValueError(f"rng: {estimator} needs draws: expected rng or noise, got neither")


def _given(
    name: str, draws: Array, x: Inputs, shape: tuple[int, ...], axes: str, *, has_features: bool
) -> Array:
    got = tuple(draws.shape) if is_array(draws) else ()
    draws = x.match(name, draws, len(shape))
    ours = tuple(draws.shape[draws.ndim - len(shape) :])
    try:
        fits = broadcast_shapes(ours, shape) == shape
    except ValueError:
        fits = False
    # A draw shared by all features is a mistake, not a broadcast.
    fits = fits and len(got) >= len(shape) and (not has_features or ours[-1] == shape[-1])
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape (..., {axes}) = (..., {wanted}), got {got}")
    check_broadcast(q=(x.q, 2), k=(x.k, 2), v=(x.v, 2), **{name: (draws, len(shape))})
    return x.xp.broadcast_to(draws, (*draws.shape[: draws.ndim - len(shape)], *shape))


def _drawn(rng: Any, x: Inputs, kind: Kind, shape: tuple[int, ...]) -> Array:
    xp = x.xp
    if _is_seed(rng):
        check_known("rng", "an int seed's draws for each head and sequence (noise needs none)", *shape)
        host = _philox(operator.index(rng), kind, plain(shape))
        return xp.astype(known_library(x.q).beside(host, x.q), x.q.dtype, copy=False)
    needed = _needed(kind, shape)
    if kind == "qmc" and (compat.is_torch_namespace(xp) or compat.is_jax_namespace(xp)):
        raise TypeError(f"rng: draws='qmc' expects an int seed, got {type(rng).__name__}")
    if compat.is_torch_namespace(xp):
        draws = _torch(rng, x, kind, needed)
    elif compat.is_jax_namespace(xp):
        draws = _jax(rng, x, kind, needed)
    elif compat.is_cupy_namespace(xp) and kind != "qmc":
        draws = _numpy_like(rng, sys.modules["cupy"], kind, needed)
    else:
        # NumPy itself, and libraries without a generator of their own (array-api-strict, Dask).
        return xp.asarray(_host(rng, kind, shape), dtype=x.q.dtype, device=x.device)
    return _arranged(xp, xp.astype(draws, x.q.dtype, copy=False), kind, shape)


def _is_seed(rng: Any) -> bool:
    if not isinstance(rng, numbers.Integral) or isinstance(rng, bool):
        return False
    if rng < 0:
        raise ValueError(f"rng: expected a seed of at least 0, got {shown(rng)}")
    return True


@static
def _philox(seed: int, kind: Kind, shape: tuple[int, ...]) -> Any:
    import numpy as np

    bits = np.random.Philox(seed)
    # `jumped` skips 2**128 numbers of the stream, which the normal draws of the same seed never reach.
    return _host(np.random.Generator(bits.jumped() if kind == "uniform" else bits), kind, shape)


def _host(rng: Any, kind: Kind, shape: tuple[int, ...]) -> Any:
    import numpy as np

    if kind == "qmc":
        return _sobol(rng, shape)
    return _arranged(np, _numpy_like(rng, np, kind, _needed(kind, shape)), kind, shape)


def _sobol(rng: Any, shape: tuple[int, ...]) -> Any:
    """Return scrambled Sobol points at the normal quantiles; each head has its own scrambling."""
    import numpy as np

    try:
        from scipy.special import ndtri
        from scipy.stats.qmc import Sobol
    except ImportError as error:
        raise ImportError("draws='qmc' needs SciPy: pip install randattn[qmc]") from error
    if not isinstance(rng, np.random.Generator):
        raise _wrong(rng)
    *lead, count, features = shape
    heads = math.prod(lead)
    # Sobol points are balanced in powers of two: the next power of two is made, and the first `count` kept.
    points = [Sobol(features, rng=rng).random_base2((count - 1).bit_length()) for _ in range(heads)]
    # The quantile of 0 is -inf, and a point may be 0: all points move towards 1/2 by a part of 1e-10.
    inside = 0.5 + (1 - 1e-10) * (np.stack(points)[:, :count] - 0.5)
    return ndtri(inside).reshape(shape)


def _needed(kind: Kind, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the independent draws from which `_arranged` makes draws of `shape`."""
    *lead, count, features = shape
    if kind == "antithetic":
        return (*lead, -(-count // 2), features)
    if kind == "simplex":
        return (*lead, -(-count // features) * features, features)
    return shape


def _arranged(xp: Namespace, draws: Array, kind: Kind, shape: tuple[int, ...]) -> Array:
    """Return rows that depend on each other, each still standard normal.

    "antithetic": each row comes with its negative. "orthogonal": the rows of each D x D block are orthogonal.
    "simplex": the rows of each block point to the corners of a regular simplex, as far apart as D directions
    can be (arXiv 2301.13856).
    """
    if kind == "antithetic":
        return xp.concat([draws, -draws], axis=-2)[..., : shape[-2], :]
    if kind in ("orthogonal", "simplex"):
        return _orthogonal(xp, draws, simplex=kind == "simplex")[..., : shape[-2], :]
    return draws


def _numpy_like(rng: Any, library: Any, kind: Kind, shape: tuple[int, ...]) -> Any:
    if not isinstance(rng, library.random.Generator):
        raise _wrong(rng)
    return rng.random(shape) if kind == "uniform" else rng.standard_normal(shape)


def _torch(rng: Any, x: Inputs, kind: Kind, shape: tuple[int, ...]) -> Array:
    torch = sys.modules["torch"]
    if not isinstance(rng, torch.Generator):
        raise _wrong(rng)
    if x.device.type not in (rng.device.type, "meta"):
        raise ValueError(f"rng: expected a generator on the device of q, {x.device}, got one on {rng.device}")
    draw = torch.rand if kind == "uniform" else torch.randn
    return draw(shape, generator=rng, dtype=x.q.dtype, device=x.device)


def _checked_key(rng: Any) -> Array:
    jax = sys.modules["jax"]
    typed = isinstance(rng, jax.Array) and jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key)
    legacy = isinstance(rng, jax.Array) and rng.dtype == jax.numpy.uint32 and rng.shape == (2,)
    if not (typed and rng.shape == ()) and not legacy:
        raise _wrong(rng)
    return rng


def _jax(rng: Any, x: Inputs, kind: Kind, shape: tuple[int, ...]) -> Array:
    jax = sys.modules["jax"]
    # A key used twice gives the same bits: normal and uniform draws have a key each.
    normal, uniform = jax.random.split(_checked_key(rng))
    if kind == "uniform":
        return jax.random.uniform(uniform, shape, dtype=x.q.dtype)
    return jax.random.normal(normal, shape, dtype=x.q.dtype)


def _orthogonal(xp: Namespace, draws: Array, *, simplex: bool = False) -> Array:
    """Make the rows of each D x D block orthogonal and keep their lengths.

    Gram-Schmidt depends on the directions of rows alone, and the length of a normal row is independent of its
    direction: each row stays standard normal (Choromanski et al. 2021, section 3).
    """
    features = draws.shape[-1]
    blocks = []
    for start in range(0, draws.shape[-2], features):
        block = draws[..., start : start + features, :]
        basis, triangle = xp.linalg.qr(xp.matrix_transpose(block))
        diagonal = xp.linalg.diagonal(triangle)
        # QR leaves the signs of the columns open, and a library's choice is not uniform. With a positive
        # diagonal of R the basis is that of Gram-Schmidt, which is uniform.
        signs = xp.where(diagonal < 0, -xp.ones_like(diagonal), xp.ones_like(diagonal))
        lengths = xp.linalg.vector_norm(block, axis=-1)
        rows = xp.matrix_transpose(basis) * signs[..., None]
        if simplex and features > 1:
            # Orthonormal rows less their mean have the length sqrt((D - 1) / D): the factor makes it 1.
            rows = (rows - xp.mean(rows, axis=-2, keepdims=True)) * (features / (features - 1)) ** 0.5
        blocks.append(rows * lengths[..., None])
    return xp.concat(blocks, axis=-2) if len(blocks) > 1 else blocks[0]


def _wrong(rng: Any) -> TypeError:
    hint = "; an array or tracer is no seed, and a batch of keys no key" if is_array(rng) else ""
    return TypeError(f"rng: {_EXPECTED}, got {type_name(rng)}{hint}")
