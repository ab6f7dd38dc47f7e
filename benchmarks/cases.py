"""The calls that are timed: estimators, the four matrix products, exact attention, on shared arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import randattn
from randattn._estimators.registry import ESTIMATORS

from .rows import PRODUCTS, Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from .baselines import Library

    Array = Any

LINEAR: tuple[tuple[str, str], ...] = (
    ("rfa", ""),
    ("lara", "weighting=balance"),
    ("lara", "weighting=optimal"),
    ("eva", "window=64"),
)


# The baseline of each is the same call without `is_causal`.
CAUSAL: tuple[tuple[str, str], ...] = (
    ("rfa", ""),
    ("lara", "weighting=balance"),
    ("lara", "weighting=optimal normalize=landmarks"),
    ("eva", "window=64 group_size=64"),
    ("softmax_attention", ""),
)


def case_of(library: Library, estimator: str, tokens: int, options: str = "", **more: Any) -> Case:
    """Return a case of a library, in the library's own mode."""
    more.setdefault("mode", library.mode)
    return Case(library.name, library.device, estimator, tokens, options, **more)


def keywords(options: str) -> dict[str, Any]:
    """Return ``"weighting=balance window=64"`` as keywords."""
    pairs = (option.split("=") for option in options.split())
    return {name: {"True": True}.get(value) or _number(value) for name, value in pairs}


def _number(value: str) -> int | str:
    return int(value) if value.isdecimal() else value


@dataclass(frozen=True)
class Operands:
    """Standard normal queries, keys, values and draws, the same for every library, as its arrays.

    The logits have a standard deviation of one; no function here is faster on other values.
    """

    library: Library
    tokens: int
    heads: int
    head_dim: int
    features: int
    dtype: str

    def _normal(self, which: int, rows: int) -> Array:
        # One generator for each array, so that NumPy holds one array at a time.
        rng = np.random.default_rng(which)
        drawn = rng.standard_normal((1, self.heads, rows, self.head_dim), dtype=np.float32)
        return self.library.own.asarray(drawn, self.dtype)

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
        """A stand-in for the averages of the values (1, heads, features, head_dim)."""
        return self._normal(4, self.features)

    @cached_property
    def cotangent(self) -> Array:
        """The output's gradient, (1, heads, tokens, head_dim)."""
        return self._normal(5, self.tokens)


class Workbench:
    """The calls of a library's cases; cases of one shape share their inputs."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._inputs: dict[tuple[Any, ...], Operands] = {}

    def inputs(self, case: Case) -> Operands:
        """Return the inputs of a case."""
        shape = (case.tokens, case.heads, case.head_dim, case.features or 64, case.dtype)
        if shape not in self._inputs:
            self._inputs[shape] = Operands(self.library, *shape)
        return self._inputs[shape]

    def function(self, case: Case) -> Callable[[Array, Array, Array], Any]:
        """Return the timed function of q, k and v, compiled where the case says so."""
        library, inputs = self.library, self.inputs(case)
        function: Callable[..., Any] = self._plain(case)
        if case.passes == "forward+backward":
            cotangent = inputs.cotangent
            if case.estimator == library.exact_name:
                cotangent = library.exact_layout(cotangent)
            # PyTorch differentiates the compiled function: autograd runs outside of it.
            compiled = library.compile[case.mode](function) if case.mode == "compile" else function
            gradient = library.own.gradient(compiled, cotangent)
            if gradient is None:
                raise ValueError(f"{library.name} has no gradients")
            if case.mode == "compile":
                return gradient
            function = gradient
        return library.compile[case.mode](function)

    def arrays(self, case: Case) -> tuple[Array, ...]:
        """Return the arguments of that function."""
        inputs = self.inputs(case)
        return inputs.exact_qkv if case.estimator == self.library.exact_name else inputs.qkv

    def call(self, case: Case) -> Callable[[], Any]:
        """Return a call of the function on its arrays, without arguments."""
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
        row = ESTIMATORS[case.estimator]
        if row.draws != "never":
            # RA has a draw for each query; groups by their size are as many as the tokens allow.
            by_seed = "noise" not in row.options or not row.is_linear or options.get("group_size")
            options |= {"rng": 0} if by_seed else {"noise": inputs.noise}
        return lambda q, k, v: estimator(q, k, v, **options)
