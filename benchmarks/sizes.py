"""The sizes that sessions measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of one session on one device; no tokens, no row.

    Attributes
    ----------
    dtype : str
    modes : tuple of str
        Modes in which the estimators are called; the first is that of the baselines too.
    products : tuple of int
        Tokens at which the estimators are timed over the matrix products alone.
    causal : tuple of int
        Tokens at which causal calls are timed over the same calls without is_causal.
    exact : tuple of int
        Tokens at which the estimators are timed over the library's exact attention.
    exact_backward : tuple of int
        The same for forward and backward.
    growth : tuple of int
        Tokens of the curves, one for every estimator, for the products and for exact attention.
    growth_heads : int
    growth_exact : int
        Most tokens of exact attention's curve.
    memory : tuple of int
        Tokens at which peak memory is measured, for the linear estimators.
    memory_backward : tuple of int
    memory_quadratic : tuple of int
        The same for ra and softmax_attention.
    overhead : int
        Tokens of the smallest inputs.
    number : int
        Calls in a row, whose mean is one time.
    small_number : int
        The same on the smallest inputs.
    processes : int
        Fresh processes that import the package; 0 measures no import.
    peers, peers_backward : int
        Tokens at which other packages are timed.
    peers_exact : int
        Tokens at which JAX's exact attention is timed.
    streaming : tuple of int
        Tokens after which a step is timed.
    """

    dtype: str = "float32"
    modes: tuple[str, ...] = ("eager",)
    products: tuple[int, ...] = (16384,)
    causal: tuple[int, ...] = (8192,)
    exact: tuple[int, ...] = ()
    exact_backward: tuple[int, ...] = ()
    growth: tuple[int, ...] = (1024, 2048, 8192, 32768, 131072)
    growth_heads: int = 4
    growth_exact: int = 8192
    memory: tuple[int, ...] = (131072,)
    memory_backward: tuple[int, ...] = ()
    memory_quadratic: tuple[int, ...] = (8192,)
    overhead: int = 64
    number: int = 1
    small_number: int = 50
    processes: int = 0
    peers: int = 16384
    peers_backward: int = 8192
    peers_exact: int = 4096
    streaming: tuple[int, ...] = (1, 100, 1000, 10_000, 100_000, 1_000_000)


_ON_THE_CPU = {
    "numpy": Sizes(causal=(4096,), exact=(4096,), processes=5),
    "torch": Sizes(exact=(16384,), exact_backward=(8192,), memory_backward=(32768,)),
    # JAX's exact attention holds the whole N x M matrix, several times in the gradient.
    "jax": Sizes(
        modes=("jit",), exact=(4096,), exact_backward=(4096,), growth_exact=4096, memory_backward=(32768,)
    ),
}

_LENGTHS = (1024, 4096, 16384, 65536, 262144)
_GPU = {
    "growth": _LENGTHS,
    "growth_heads": 8,
    "growth_exact": 262144,
    "exact_backward": (4096, 16384, 65536),
    "memory_backward": (65536,),
    "products": (16384, 65536),
    # One call is shorter than the wait for it.
    "number": 5,
}
_ON_THE_GPU = {
    "torch": Sizes(dtype="bfloat16", modes=("eager", "compile"), exact=_LENGTHS, **_GPU),
    # For more tokens, JAX's exact attention would hold hundreds of gigabytes where it is not fused.
    "jax": Sizes(
        dtype="bfloat16",
        modes=("jit",),
        exact=(1024, 4096, 16384),
        **{**_GPU, "growth_exact": 16384, "exact_backward": (4096,)},
    ),
    "cupy": Sizes(
        exact=(4096,), **{**_GPU, "growth_exact": 16384, "exact_backward": (), "memory_backward": ()}
    ),
}

_QUICK = {
    "products": (256,),
    "causal": (256,),
    "growth": (128, 512),
    "growth_heads": 2,
    "growth_exact": 512,
    "memory": (2048,),
    "memory_quadratic": (512,),
    "overhead": 64,
    "small_number": 3,
    "peers": 256,
    "peers_backward": 256,
    "peers_exact": 256,
    "streaming": (1, 100, 1000),
}


def sizes_for(library: str, *, on_gpu: bool = False, quick: bool = False) -> Sizes:
    """Return the sizes of a session: its own, or a quick one that says nothing about speed."""
    sizes = (_ON_THE_GPU if on_gpu else _ON_THE_CPU)[library]
    if not quick:
        return sizes
    small = {
        "exact": (256,),
        "exact_backward": (256,) if sizes.exact_backward else (),
        "memory_backward": (2048,) if sizes.memory_backward else (),
        "processes": min(1, sizes.processes),
    }
    return Sizes(dtype=sizes.dtype, modes=sizes.modes, number=sizes.number, **_QUICK, **small)
