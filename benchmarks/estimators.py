"""What is called: the estimators, the four matrix products, exact attention, on arrays that all share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import randattn

from .rows import PRODUCTS, Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from .libraries import Library

    Array = Any

LINEAR: tuple[tuple[str, str], ...] = (
    ("rfa", ""),
    ("lara", "weighting=balance"),
    ("lara", "weighting=optimal"),
    ("eva", "window=64"),
)


# Each over the same without `is_causal`.
CAUSAL: tuple[tuple[str, str], ...] = (
    ("rfa", ""),
    ("lara", "weighting=balance"),
    ("lara", "weighting=optimal normalize=landmarks"),
    ("eva", "window=64 group_size=64"),
    ("softmax_attention", ""),
)

# Keys that are chosen, over exact attention.
TOP: tuple[tuple[str, str], ...] = (
    ("eva", "groups=tree exact=top"),
    ("eva", "groups=tree exact=top num_blocks=64"),
    ("eva", "groups=tree exact=top num_exact=4"),
)


def case_of(library: Library, estimator: str, tokens: int, options: str = "", **more: Any) -> Case:
    """A case of a library, in the way in which it is called."""
    more.setdefault("mode", library.mode)
    return Case(library.name, library.device, estimator, tokens, options, **more)


def keywords(options: str) -> dict[str, Any]:
    """``"weighting=balance window=64"`` as keywords."""
    pairs = (option.split("=") for option in options.split())
    return {name: {"True": True}.get(value) or _number(value) for name, value in pairs}


def _number(value: str) -> int | str:
    return int(value) if value.isdecimal() else value


@dataclass(frozen=True)
class Inputs:
    """Standard normal queries, keys, values and draws, the same for every library, as its arrays.

    Of entries of 1, logits are standard normal too; no function here is faster on other values.
    """

    library: Library
    tokens: int
    heads: int
    head_dim: int
    features: int
    dtype: str

    def _normal(self, which: int, rows: int) -> Array:
        # A generator each: one array at a time is all of NumPy's memory that is needed.
        rng = np.random.default_rng(which)
        drawn = rng.standard_normal((1, self.heads, rows, self.head_dim), dtype=np.float32)
        return self.library.asarray(drawn, self.dtype)

    @cached_property
    def qkv(self) -> tuple[Array, Array, Array]:
        """Three arrays (1, heads, tokens, head_dim)."""
        return self._normal(0, self.tokens), self._normal(1, self.tokens), self._normal(2, self.tokens)

    @cached_property
    def exact_qkv(self) -> tuple[Array, ...]:
        """The same, laid out for the library's exact attention."""
        return tuple(map(self.library.exact_layout, self.qkv))

    @cached_property
    def noise(self) -> Array:
        """The draws (1, heads, features, head_dim)."""
        return self._normal(3, self.features)

    @cached_property
    def f(self) -> Array:
        """What stands in for the averages of the values (1, heads, features, head_dim)."""
        return self._normal(4, self.features)

    @cached_property
    def cotangent(self) -> Array:
        """The output's gradient, (1, heads, tokens, head_dim)."""
        return self._normal(5, self.tokens)


class Workbench:
    """The calls of a library's cases; cases of one shape share their inputs."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._inputs: dict[tuple[Any, ...], Inputs] = {}

    def inputs(self, case: Case) -> Inputs:
        """The inputs of a case."""
        shape = (case.tokens, case.heads, case.head_dim, case.features or 64, case.dtype)
        if shape not in self._inputs:
            self._inputs[shape] = Inputs(self.library, *shape)
        return self._inputs[shape]

    def function(self, case: Case) -> Callable[[Array, Array, Array], Any]:
        """What is timed, as a function of q, k and v, compiled where the case says so."""
        library, inputs = self.library, self.inputs(case)
        function: Callable[..., Any] = self._plain(case)
        if case.passes == "forward+backward":
            if library.gradient is None:
                raise ValueError(f"{library.name} has no gradients")
            cotangent = inputs.cotangent
            if case.estimator == library.exact_name:
                cotangent = library.exact_layout(cotangent)
            if case.mode == "compile":
                # Compiled is what is differentiated: autograd runs outside of it.
                return library.gradient(library.compile[case.mode](function), cotangent)
            function = library.gradient(function, cotangent)
        return library.compile[case.mode](function)

    def arrays(self, case: Case) -> tuple[Array, ...]:
        """What that function is called on."""
        inputs = self.inputs(case)
        return inputs.exact_qkv if case.estimator == self.library.exact_name else inputs.qkv

    def call(self, case: Case) -> Callable[[], Any]:
        """The function on its arrays."""
        function, arrays = self.function(case), self.arrays(case)
        return lambda: function(*arrays)

    def _plain(self, case: Case) -> Callable[..., Array]:
        library, inputs = self.library, self.inputs(case)
        if case.estimator == library.exact_name:
            return library.exact
        if case.estimator == PRODUCTS:
            w, f, swap = inputs.noise, inputs.f, library.xp.swapaxes
            return lambda q, k, v: ((w @ swap(k, -1, -2)) @ v, (q @ swap(w, -1, -2)) @ f)
        estimator, options = getattr(randattn, case.estimator), keywords(case.options)
        if case.estimator == "ra":
            options["rng"] = 0
        elif options.get("group_size"):
            options["rng"] = 0  # A draw for each group, and these are as many as the tokens allow.
        elif case.estimator != "softmax_attention" and "exact" not in options:
            options["noise"] = inputs.noise
        return lambda q, k, v: estimator(q, k, v, **options)
