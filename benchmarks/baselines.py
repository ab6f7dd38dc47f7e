"""The array libraries and their own exact attention, the baseline of many times."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import randattn
from randattn.cli.libraries import open_library as open_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from randattn.cli.libraries import ArrayLibrary

    Array = Any
    Function = Callable[..., Array]

NAMES = ("numpy", "torch", "jax", "cupy")


def _same(function: Function) -> Function:
    return function


@dataclass(frozen=True)
class Library:
    """One array library on one device.

    Attributes
    ----------
    own : ArrayLibrary
    exact : callable
        The library's own exact attention, of q, k and v as `exact_layout` gives them.
    exact_name : str
        Its name in tables.
    exact_layout : callable
        From (batch, heads, tokens, features) to the axes that `exact` wants.
    compile : dict
        For each mode in which functions can be called, the function that prepares them.
    """

    own: ArrayLibrary
    exact: Function = randattn.softmax_attention
    exact_name: str = "randattn.softmax_attention"
    exact_layout: Callable[[Array], Array] = _same
    compile: dict[str, Callable[[Function], Function]] = field(default_factory=lambda: {"eager": _same})

    @property
    def name(self) -> str:
        """The name of the library."""
        return self.own.name

    @property
    def device(self) -> str:
        """The name of a GPU, or "cpu"."""
        return self.own.device

    @property
    def xp(self) -> Any:
        """The namespace."""
        return self.own.xp

    @property
    def mode(self) -> str:
        """The mode of callers for whom time matters."""
        return "jit" if self.name == "jax" else "eager"

    @property
    def on_gpu(self) -> bool:
        """Tell whether the device is a GPU."""
        return self.device != "cpu"


def open_library(name: str, device: str = "cpu") -> Library:
    """Import a library and find its device, "cpu" or "cuda"."""
    own = open_adapter(name, device)
    if name == "torch":
        return _torch(own)
    # NumPy and CuPy have no exact attention of their own; a whole N x M matrix would be slower still.
    return _jax(own) if name == "jax" else Library(own)


def _torch(own: ArrayLibrary) -> Library:
    torch = own.xp

    def compiled(function: Function) -> Function:
        # A session has more lengths than the few that programs are kept for by default.
        config = importlib.import_module("torch._dynamo").config
        config.recompile_limit = config.accumulated_recompile_limit = 1024
        return torch.compile(function, fullgraph=True, dynamic=False)

    exact = torch.nn.functional.scaled_dot_product_attention
    return Library(own, exact, "torch SDPA", compile={"eager": _same, "compile": compiled})


def _jax(own: ArrayLibrary) -> Library:
    jax = importlib.import_module("jax")
    exact, exact_name = jax.nn.dot_product_attention, "jax.nn.dot_product_attention"
    if own.device != "cpu":
        # The fused kernel, where it is installed and runs: the fairer comparison.
        fused = functools.partial(exact, implementation="cudnn")
        tiny = jax.device_put(own.xp.ones((1, 64, 1, 64), own.xp.bfloat16), own.place)
        try:
            jax.block_until_ready(jax.jit(fused)(tiny, tiny, tiny))
            exact, exact_name = fused, "jax.nn.dot_product_attention, cuDNN"
        except (NotImplementedError, RuntimeError, ValueError):
            exact_name = "jax.nn.dot_product_attention, XLA"
    return Library(
        own,
        exact,
        exact_name,
        exact_layout=lambda x: jax.block_until_ready(own.xp.swapaxes(x, -2, -3)),
        compile={"jit": jax.jit, "eager": _same},
    )
