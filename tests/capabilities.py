"""What each estimator can do on each library: the tests hold it, and the documentation prints it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from randattn import eva, lara, ra, rfa, softmax_attention

LIBRARIES = ("numpy", "torch", "jax", "cupy", "strict", "dask")
NAMES = {
    "numpy": "NumPy",
    "torch": "PyTorch",
    "jax": "JAX",
    "cupy": "CuPy",
    "strict": "array-api-strict",
    "dask": "Dask",
}


class Capability(NamedTuple):
    """What is asked of an estimator, where libraries have it, and which estimators have not.

    Attributes
    ----------
    title : str
    libraries : tuple of str
    without : frozenset of str
        Of `CALLS`.
    """

    title: str
    libraries: tuple[str, ...]
    without: frozenset[str] = frozenset()


CALLS: dict[str, Any] = {
    "softmax_attention": softmax_attention,
    "rfa": partial(rfa, num_samples=8, rng=0),
    "rfa, trigonometric": partial(rfa, num_samples=8, features="trigonometric", rng=0),
    "ra": partial(ra, rng=0),
    "lara": partial(lara, num_landmarks=4, rng=0),
    "eva": partial(eva, window=4),
    'eva, exact="top"': partial(eva, groups="tree", exact="top", num_groups=4, num_exact=1),
}
_NOT_CAUSAL = frozenset({"rfa, trigonometric", "ra", 'eva, exact="top"'})
CAPABILITIES = {
    "masked": Capability("padding", LIBRARIES),
    "grouped": Capability("grouped heads", LIBRARIES),
    "causal": Capability("causal", LIBRARIES, _NOT_CAUSAL),
    "half": Capability("half precision", ("numpy", "torch", "jax", "cupy")),
    "compiled": Capability("jit, torch.compile", ("torch", "jax")),
    "gradient": Capability("gradients", ("torch", "jax")),
}
