"""Print how far every library's results are from NumPy's, and fail over tolerance.

Run it as ``python tests/agreement.py``, with NumPy, PyTorch, JAX, array-api-strict and Dask
installed, or name libraries, with a device: ``python tests/agreement.py cupy torch:cuda jax:cuda``.

A difference is the norm of ``result - reference`` over that of the reference, the worst of all
inputs of an estimator. In float64 and float32 the reference is NumPy's result, in the same dtype
and with the same int seed; in float16 and bfloat16 it is the library's own in float32.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat as compat
import numpy as np

import randattn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED = 20220628
# One rounding of the result is all that half precision may cost: the dtype's own epsilon.
TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "float16": 2**-10, "bfloat16": 2**-7}
FULL = ("float64", "float32")
MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "jax": "jax.numpy",
    "strict": "array_api_strict",
    "dask": "dask.array",
    "cupy": "cupy",
}
# NumPy is its own reference in full precision, so that only half is left to compare.
DTYPES = {
    "numpy": ("float16",),
    "torch": (*FULL, "float16", "bfloat16"),
    "jax": (*FULL, "float16", "bfloat16"),
    "strict": FULL,
    "dask": (*FULL, "float16"),
    "cupy": (*FULL, "float16"),
}
ON_THE_CPU = ("numpy", "torch", "jax", "strict", "dask")


class Library:
    """One library on one device: arrays to it and back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.library, _, self.device = name.partition(":")
        self.dtypes = DTYPES[self.library]
        module = importlib.import_module(MODULES[self.library])
        if self.library == "jax":
            jax = importlib.import_module("jax")
            jax.config.update("jax_enable_x64", True)
            jax.config.update("jax_default_matmul_precision", "float32")
            jax.config.update("jax_numpy_rank_promotion", "raise")
            jax.config.update("jax_default_device", jax.devices(self.device or None)[0])
        if self.library == "torch" and self.device:
            module.set_default_device(self.device)
        self.xp = compat.array_namespace(module.ones(1))

    def array(self, x: np.ndarray, dtype: str) -> Any:
        """Give `x` in the library, floating arrays in `dtype`."""
        if x.dtype == bool:
            return self.xp.asarray(x)
        # By way of float32, which every library takes from NumPy: the half dtypes are not all NumPy's.
        if dtype in FULL:
            return self.xp.asarray(x.astype(dtype))
        return self.xp.astype(self.xp.asarray(x.astype("float32")), getattr(self.xp, dtype))

    def numpy(self, x: Any) -> np.ndarray:
        """Bring a result back, in float64."""
        if compat.is_torch_array(x):
            x = x.cpu()
        elif compat.is_cupy_array(x):
            x = x.get()
        xp = compat.array_namespace(x)
        return np.asarray(xp.astype(x, xp.float64))


@dataclass
class Inputs:
    """Named arguments, NumPy arrays among them."""

    arrays: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)


class Case(NamedTuple):
    """One call: a row of the table, a public function, its inputs and options."""

    row: str
    function: str
    inputs: str
    options: dict[str, Any]


def make_inputs() -> dict[str, Inputs]:
    """Give the arrays that the estimators are compared on, the same on every machine."""
    rng = np.random.Generator(np.random.Philox(SEED))
    d, e = 8, 5

    def qkv(q: tuple[int, ...], k: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {
            "q": 1.5 * rng.standard_normal((*q, d)),
            "k": 1.5 * rng.standard_normal((*k, d)),
            "v": rng.standard_normal((*k, e)),
        }

    masked = qkv((3, 2, 24), (3, 2, 24))
    lengths = np.asarray([24, 17, 0])
    key_mask = (np.arange(24) < lengths[:, None])[:, None, :]
    for name in ("k", "v"):
        masked[name] = np.where(key_mask[..., None], masked[name], np.nan)
    grouped = qkv((2, 4, 24), (2, 2, 24))
    mask_of_heads = rng.random((2, 2, 24)) < 0.7
    cross = qkv((2, 3, 19), (2, 3, 26))
    landmarks = qkv((2, 3, 6), (2, 3, 6))
    noise = rng.standard_normal((6, d))
    return {
        "plain": Inputs(qkv((2, 3, 24), (2, 3, 24))),
        "masked": Inputs({**masked, "key_mask": key_mask}),
        "grouped": Inputs({**grouped, "key_mask": mask_of_heads}, {"enable_gqa": True}),
        "cross": Inputs(cross),
        "shared": Inputs(qkv((2, 3, 23), (23,)), {"scale": 0.5}),
        "grid": Inputs(qkv((2, 24), (2, 24)), {"grid": (4, 6)}),
        "landmarks": Inputs(
            {**qkv((2, 3, 25), (2, 3, 25)), "q_marks": landmarks["q"], "k_marks": landmarks["k"], "noise": noise}
        ),
        "ra draws": Inputs(
            {
                **qkv((2, 3, 14), (2, 3, 18)),
                "noise": rng.standard_normal((2, 14, d)),
                "components": rng.random((2, 3, 2, 14)),
            }
        ),
        "biased": Inputs(
            {**qkv((2, 3, 19), (2, 3, 26)), "bias": rng.standard_normal((3, 26)), "pairs": rng.standard_normal((19, 26))}
        ),
        "parts": Inputs({**qkv((2, 3, 19), (2, 3, 26))}),
    }


def make_cases() -> list[Case]:
    """Give every estimator, in each of its variants, on each of the inputs that it takes."""
    common = ("plain", "masked", "grouped", "cross", "shared")
    square = ("plain", "masked", "grouped", "shared")
    seed = {"rng": SEED}
    rfa = {"num_samples": 20, **seed}
    lara = {"num_landmarks": 5, **seed}
    eva = {"num_groups": 5, **seed}

    def on(inputs: tuple[str, ...], row: str, **options: Any) -> list[Case]:
        return [Case(row, row.split()[0], name, options) for name in inputs]

    cases = [
        *on(common, "softmax_attention"),
        *on(square, "softmax_attention causal", is_causal=True),
        *on(common, "rfa positive", features="positive", **rfa),
        *on(common, "rfa trigonometric", features="trigonometric", **rfa),
        *on(common, "rfa orthogonal", draws="orthogonal", **rfa),
        *on(common, "ra", num_samples=2, **seed),
        *on(("ra draws",), "ra given draws"),
        *on(("landmarks",), "lara given landmarks"),
        *on(("landmarks",), "eva given landmarks", window=4),
        *on(("biased",), "attend"),
        *on(("parts",), "merge"),
    ]
    for weighting in ("optimal", "balance", "biased"):
        cases += on((*common, "grid"), f"lara {weighting}", weighting=weighting, **lara)
        cases += on(
            (*common, "grid"),
            f"lara {weighting} antithetic",
            weighting=weighting,
            antithetic=True,
            mix_keys=True,
            normalize="landmarks",
            **lara,
        )
    for weight in ("size", "unit"):
        for disjoint in (True, False):
            row = f"eva {weight} {'disjoint' if disjoint else 'overlapping'}"
            options = {"group_weight": weight, "disjoint": disjoint, "window": 4}
            cases += on((*square, "grid"), row, **options, **eva)
            cases += on(square, row, **options, group_size=7, **seed)
            cases += on(("cross",), row, **{**options, "window": 0}, **eva)
    return cases


def call(case: Case, inputs: dict[str, Inputs], to_array: Callable[[np.ndarray], Any]) -> tuple[Any, ...]:
    """Call the case's function and give its results, one or several."""
    function = getattr(randattn, case.function)
    given = inputs[case.inputs]
    arrays = {name: to_array(x) for name, x in given.arrays.items()}
    options = {**given.options, **case.options}
    q, k, v = (arrays.pop(name) for name in "qkv")
    if case.inputs == "landmarks":
        options["landmarks"] = (arrays.pop("q_marks"), arrays.pop("k_marks"))
    if case.function == "merge":
        near, far = (randattn.attend(q, k[..., keys, :], v[..., keys, :]) for keys in (slice(9), slice(9, None)))
        result = function(near, far)
    elif case.function == "attend":
        result = function(q, k, v, arrays["bias"], pair_bias=arrays["pairs"])
    else:
        result = function(q, k, v, **arrays, **options)
    return tuple(result) if isinstance(result, tuple) else (result,)


def difference(result: np.ndarray, reference: np.ndarray) -> float:
    """Give the relative norm of the difference; inf where shapes or what is not finite differ."""
    finite = np.isfinite(reference)
    if result.shape != reference.shape or not np.array_equal(result[~finite], reference[~finite]):
        return np.inf
    norm = np.linalg.norm(reference[finite])
    return float(np.linalg.norm(result[finite] - reference[finite]) / norm) if norm > 0 else np.inf


def compare(
    library: Library, dtype: str, case: Case, inputs: dict[str, Inputs], references: list[np.ndarray] | None
) -> float:
    """Give the worst difference of a call's results; raise where they are not what they should be."""
    results = call(case, inputs, lambda x: library.array(x, dtype))
    wanted = [dtype, dtype if dtype in FULL else "float32"][: len(results)]
    example = library.xp.ones(1)
    for result, name in zip(results, wanted, strict=True):
        if type(result) is not type(example):
            raise TypeError(f"expected {type(example)}, got {type(result)}")
        if result.dtype != getattr(library.xp, name):
            raise TypeError(f"expected {name}, got {result.dtype}")
    if references is None:
        half = getattr(library.xp, dtype)

        def rounded(x: np.ndarray) -> Any:
            y = library.array(x, "float32")
            return y if x.dtype == bool else library.xp.astype(library.xp.astype(y, half), library.xp.float32)

        references = [library.numpy(x) for x in call(case, inputs, rounded)]
    return max(
        difference(library.numpy(result), reference)
        for result, reference in zip(results, references, strict=True)
    )


def check_references(cases: list[Case], inputs: dict[str, Inputs], numpy: Library) -> Iterator[str]:
    """Yield what makes a reference worthless: nothing compared, nothing random, nothing noticed."""
    public = {name for name in randattn.__all__ if inspect.isfunction(getattr(randattn, name))}
    for name in sorted(public - {case.function for case in cases}):
        yield f"{name} is public, and no case compares it"
    for case in cases:
        of_seed = [numpy.numpy(x) for x in call(case, inputs, lambda x: x)]
        for reference in of_seed:
            if np.isnan(reference).any():
                yield f"{case.row}, {case.inputs}: NaN in the reference"
            for dtype, tolerance in TOLERANCES.items():
                if not difference(reference * (1 + 2 * tolerance), reference) > tolerance:
                    yield f"{case.row}, {case.inputs}: an error of twice the tolerance of {dtype} passes"
        if "rng" in case.options:
            other = case._replace(options={**case.options, "rng": SEED + 1})
            (of_other,) = (numpy.numpy(x) for x in call(other, inputs, lambda x: x))
            if not difference(of_other, of_seed[0]) > 1e-3:
                yield f"{case.row}, {case.inputs}: another seed gives the same result"


def main(names: list[str]) -> int:
    """Compare, print the table, and return 1 where a difference is over tolerance."""
    inputs, cases = make_inputs(), make_cases()
    numpy = Library("numpy")
    faults = list(check_references(cases, inputs, numpy))
    references = {
        (case, dtype): [numpy.numpy(x) for x in call(cases[case], inputs, lambda x: numpy.array(x, dtype))]
        for case in range(len(cases))
        for dtype in FULL
    }

    worst: dict[tuple[str, str, str], float] = {}
    failures, made, expected = [], 0, 0
    libraries = [Library(name) for name in names]
    for library in libraries:
        expected += len(cases) * len(library.dtypes)
        for dtype in library.dtypes:
            for number, case in enumerate(cases):
                why = ""
                try:
                    found = compare(library, dtype, case, inputs, references.get((number, dtype)))
                except Exception as error:  # noqa: BLE001 (whatever it is, it is a failed comparison)
                    found, why = np.inf, f" {type(error).__name__}: {error}"
                made += 1
                cell = (library.name, case.row, dtype)
                worst[cell] = max(worst.get(cell, 0.0), found)
                if not found <= TOLERANCES[dtype]:
                    failures.append(f"{library.name}, {case.row}, {case.inputs}, {dtype}: {found:.1e}{why}")

    rows = list(dict.fromkeys(case.row for case in cases))
    width = max(map(len, rows))
    print("The largest difference from NumPy's result (float64, float32),")
    print("or from the library's own in float32 (float16, bfloat16).\n")
    print(f"{'':{width + 10}}" + "".join(f"{dtype:>10}" for dtype in TOLERANCES))
    print(f"{'tolerance':{width + 10}}" + "".join(f"{tolerance:>10.0e}" for tolerance in TOLERANCES.values()))
    for library in libraries:
        print()
        for row in rows:
            cells = [worst.get((library.name, row, dtype)) for dtype in TOLERANCES]
            marks = ["" if x is None or x <= t else "!" for x, t in zip(cells, TOLERANCES.values(), strict=True)]
            texts = ["-" if x is None else f"{mark}{x:.1e}" for x, mark in zip(cells, marks, strict=True)]
            print(f"{library.name:10}{row:{width}}" + "".join(f"{text:>10}" for text in texts))

    if made != expected or made == 0:
        faults.append(f"{made} comparisons made, {expected} expected")
    print(f"\n{made} comparisons of {len(cases)} calls: {len(libraries)} libraries, seed {SEED}.")
    for line in (*faults, *failures):
        print(f"FAILED {line}")
    print(f"{made - len(failures)} passed, {len(failures) + len(faults)} failed")
    return 1 if faults or failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ON_THE_CPU)))
