"""The array libraries: bring arrays to each, compile, differentiate, wait, and exact attention."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import randattn

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = Any
    Function = Callable[..., Array]

NAMES = ("numpy", "torch", "jax", "cupy")


def _nothing(_: Any) -> None:
    return None


def _same(function: Function) -> Function:
    return function


@dataclass(frozen=True)
class Library:
    """One array library on one device.

    Attributes
    ----------
    name, device : str
        The device is "cpu", or the name of a GPU.
    xp : module
    asarray : callable
        Of a NumPy array and a dtype's name, an array on the device.
    exact : callable
        The library's own exact attention, of q, k and v as `exact_layout` gives them.
    exact_name : str
        What tables call it.
    exact_layout : callable
        From (batch, heads, tokens, features) to the axes that `exact` wants.
    wait : callable
        Waits for a result.
    compile : dict
        For each mode in which functions can be called, what makes them so.
    gradient : callable or None
        Of a function of three arrays and a cotangent, one that gives the three gradients, forward and
        backward.
    copy : callable or None
        Copy one array on the device, for its memory bandwidth.
    """

    name: str
    device: str
    xp: Any
    asarray: Callable[[np.ndarray, str], Array]
    exact: Function
    exact_name: str
    exact_layout: Callable[[Array], Array] = _same
    wait: Callable[[Array], object] = _nothing
    compile: dict[str, Callable[[Function], Function]] = field(default_factory=lambda: {"eager": _same})
    gradient: Callable[[Function, Array], Function] | None = None
    copy: Function | None = None

    @property
    def mode(self) -> str:
        """How functions of the library are called by those who care for time."""
        return "jit" if self.name == "jax" else "eager"

    @property
    def on_gpu(self) -> bool:
        """Whether the device is not the CPU."""
        return self.device != "cpu"


def open_library(name: str, device: str = "cpu") -> Library:
    """Import a library and find its device, "cpu" or "cuda"."""
    return _OPEN[name](device)


def _numpy(device: str) -> Library:
    if device != "cpu":
        raise ValueError(f"device: expected cpu for numpy, got {device}")
    return Library(
        "numpy",
        "cpu",
        np,
        lambda x, dtype: np.array(x, dtype=dtype),
        # NumPy has none of its own; a whole N x M matrix would be slower still.
        exact=randattn.softmax_attention,
        exact_name="randattn.softmax_attention",
    )


def _torch(device: str) -> Library:
    torch = importlib.import_module("torch")
    on_cuda = device == "cuda"

    def compiled(function: Function) -> Function:
        # A session has more lengths than the few that programs are kept for by default.
        config = importlib.import_module("torch._dynamo").config
        config.recompile_limit = config.accumulated_recompile_limit = 1024
        return torch.compile(function, fullgraph=True, dynamic=False)

    def gradient(function: Function, cotangent: Array) -> Function:
        def both(*arrays: Array) -> Array:
            leaves = [x.detach().requires_grad_() for x in arrays]
            return torch.autograd.grad(function(*leaves), leaves, cotangent)

        return both

    return Library(
        "torch",
        torch.cuda.get_device_name() if on_cuda else "cpu",
        torch,
        lambda x, dtype: torch.asarray(x).to(device=device, dtype=getattr(torch, dtype)),
        exact=torch.nn.functional.scaled_dot_product_attention,
        exact_name="torch SDPA",
        wait=(lambda _: torch.cuda.synchronize()) if on_cuda else _nothing,
        compile={"eager": _same, "compile": compiled},
        gradient=gradient,
        copy=torch.clone,
    )


def _jax(device: str) -> Library:
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Its pool would hide what is used, and keep other libraries from the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = importlib.import_module("jax")
    chosen = jax.devices(device)[0]
    jnp = jax.numpy

    exact, exact_name = jax.nn.dot_product_attention, "jax.nn.dot_product_attention"
    if chosen.platform != "cpu":
        # The fused kernel, where it is installed and runs: the fairer comparison.
        fused = functools.partial(exact, implementation="cudnn")
        tiny = jax.device_put(jnp.ones((1, 64, 1, 64), jnp.bfloat16), chosen)
        try:
            jax.block_until_ready(jax.jit(fused)(tiny, tiny, tiny))
            exact, exact_name = fused, "jax.nn.dot_product_attention, cuDNN"
        except (NotImplementedError, RuntimeError, ValueError):
            exact_name = "jax.nn.dot_product_attention, XLA"

    def gradient(function: Function, cotangent: Array) -> Function:
        def weighted(*arrays: Array) -> Array:
            return jnp.sum(function(*arrays) * cotangent)

        # The value too, which else would be left out of the program.
        return jax.value_and_grad(weighted, argnums=(0, 1, 2))

    return Library(
        "jax",
        "cpu" if chosen.platform == "cpu" else str(chosen.device_kind),
        jnp,
        lambda x, dtype: jax.device_put(jnp.asarray(x, dtype=dtype), chosen),
        exact=exact,
        exact_name=exact_name,
        exact_layout=lambda x: jax.block_until_ready(jnp.swapaxes(x, -2, -3)),
        wait=jax.block_until_ready,
        compile={"jit": jax.jit, "eager": _same},
        gradient=gradient,
        # Plain jnp.copy is a program of its own too.
        copy=jax.jit(jnp.copy),
    )


def _cupy(device: str) -> Library:
    del device  # It has but one kind.
    cupy = importlib.import_module("cupy")
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    return Library(
        "cupy",
        properties["name"].decode(),
        cupy,
        lambda x, dtype: cupy.asarray(x, dtype=dtype),
        exact=randattn.softmax_attention,
        exact_name="randattn.softmax_attention",
        wait=lambda _: cupy.cuda.get_current_stream().synchronize(),
        copy=cupy.copy,
    )


_OPEN = {"numpy": _numpy, "torch": _torch, "jax": _jax, "cupy": _cupy}
