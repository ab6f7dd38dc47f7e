"""Print how far every library's results are from NumPy's, and fail over tolerance.

``python -m tests.programs.agreement`` compares PyTorch, JAX, array-api-strict, Dask and the stand-in for CuPy on
the CPU; or name libraries, with a device where they have several: ``python -m tests.programs.agreement cupy torch:cuda``.

A difference is the norm of ``result - reference`` over that of the reference, the worst of all
inputs of an estimator. In float64 and float32 the reference is NumPy's result in the same dtype,
with the same int seed; in float16 and bfloat16 it is the library's own in float32. JAX compiles
each call, as its users do.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

import randattn
from tests.helpers.libraries import LIBRARIES, Library, open_library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Arrays = dict[str, Any]

SEED = 20220628
FULL = ("float64", "float32")
# One rounding of the result is all that half precision may cost: the dtype's own epsilon.
TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "float16": 2**-10, "bfloat16": 2**-7}
# Rows that a library does not compute, or in another way: chunks of Dask's keys choose keys of their own.
NOT_COMPARED = {"dask": ("adaptive_eva", "adaptive_eva_step")}
ON_THE_CPU = ("numpy", "torch", "jax", "strict", "dask", "cupy-standin")


class Case(NamedTuple):
    """One call: a row of the table, the public function that it begins with, and its arguments."""

    row: str
    inputs: str
    options: tuple[tuple[str, Any], ...]

    @property
    def function(self) -> str:
        return self.row.split()[0]

    def but(self, **options: Any) -> Case:
        return self._replace(options=tuple({**dict(self.options), **options}.items()))

    def __str__(self) -> str:
        return f"{self.row}, {self.inputs}"


def make_inputs() -> dict[str, Arrays]:
    """Give the arrays to compare on, the same on every machine."""
    rng = np.random.Generator(np.random.Philox(SEED))
    d, e = 8, 5

    def qkv(q: tuple[int, ...], k: tuple[int, ...]) -> Arrays:
        return {
            "q": 1.5 * rng.standard_normal((*q, d)),
            "k": 1.5 * rng.standard_normal((*k, d)),
            "v": rng.standard_normal((*k, e)),
        }

    # Sequences of different lengths, one of them empty, with NaN for padding.
    masked = qkv((3, 2, 24), (3, 2, 24))
    masked["key_mask"] = (np.arange(24) < np.asarray([[24], [17], [0]]))[:, None, :]
    for name in ("k", "v"):
        masked[name] = np.where(masked["key_mask"][..., None], masked[name], np.nan)
    return {
        "plain": qkv((3, 2, 24), (3, 2, 24)),
        "masked": masked,
        "grouped": {**qkv((2, 4, 24), (2, 2, 24)), "key_mask": rng.random((2, 2, 24)) < 0.7},
        "cross": qkv((3, 2, 19), (3, 2, 26)),
        "shared": qkv((3, 2, 23), (23,)),
        "grid": qkv((6, 24), (6, 24)),
        "landmarks": {
            **qkv((3, 2, 25), (3, 2, 25)),
            "landmarks": (rng.standard_normal((3, 2, 6, d)), rng.standard_normal((2, 6, d))),
            "noise": rng.standard_normal((6, d)),
        },
        "draws": {
            **qkv((3, 2, 14), (3, 2, 18)),
            "noise": rng.standard_normal((2, 14, d)),
            "components": rng.random((3, 2, 2, 14)),
        },
        "biased": {
            **qkv((3, 2, 19), (3, 2, 26)),
            "bias": rng.standard_normal((2, 26)),
            "pair_bias": rng.standard_normal((19, 26)),
        },
        "windowed": {**qkv((3, 2, 23), (3, 2, 23)), "window_bias": rng.standard_normal((2, 4, 4))},
    }


def make_cases() -> list[Case]:
    """Give every estimator, in each of its variants, on inputs of every kind that it takes."""
    square = ("plain", "masked", "grouped")
    common = (*square, "cross")
    seed = {"rng": SEED}
    rfa = {"num_samples": 20, **seed}
    lara = {"num_landmarks": 5, **seed}
    eva = {"num_groups": 5, "window": 4, **seed}

    def on(inputs: tuple[str, ...], row: str, **options: Any) -> list[Case]:
        of_inputs = {"grouped": {"enable_gqa": True}, "shared": {"scale": 0.5}, "grid": {"grid": (4, 6)}}
        return [Case(row, name, ()).but(**of_inputs.get(name, {}), **options) for name in inputs]

    cases = [
        *on(("biased",), "attend"),
        *on(("cross",), "merge"),
        *on((*common, "shared"), "softmax_attention"),
        *on(square, "softmax_attention causal", is_causal=True),
        *on((*common, "shared"), "rfa positive", features="positive", **rfa),
        *on(common, "rfa trigonometric", features="trigonometric", **rfa),
        *on(common, "rfa orthogonal", draws="orthogonal", **rfa),
        *on(common, "rfa optimal", features="optimal", precondition=True, **rfa),
        *on(("plain",), "rfa simplex", draws="simplex", **rfa),
        *on(("plain",), "rfa antithetic", draws="antithetic", **rfa),
        *on((*common, "shared"), "ra", num_samples=2, **seed),
        *on(("draws",), "ra", num_samples=2),
        *on(("landmarks",), "lara landmarks"),
        *on(("landmarks",), "eva landmarks", window=4),
        *on(("windowed",), "eva window bias", **eva),
        *on((*common, "shared", "grid"), "lara optimal", weighting="optimal", **lara),
        *on(common, "lara balance", weighting="balance", **lara),
        *on(common, "lara biased", weighting="biased", **lara),
    ]
    window = {"window": 5, "is_causal": True}
    cases += on(square, "rfa causal", is_causal=True, **rfa)
    cases += on(square, "lara causal", **window, **lara)
    cases += on(square, "eva causal", group_size=5, **window, **seed)
    cases += on(square, "rfa_step", **rfa)
    cases += on(square, "eva_step", window=5, max_tokens=24, **seed)
    chosen = {"group_size": 6, "num_exact": 6, "block_size": 6}
    cases += on((*common, "shared"), "adaptive_eva", **chosen)
    cases += on(square, "adaptive_eva_step", max_tokens=24)
    cases += on(square, "adaptive_eva causal", is_causal=True, exact_heads=1, **chosen)
    antithetic = {"antithetic": True, "mix_keys": True, "normalize": "landmarks"}
    cases += on(common, "lara antithetic", **antithetic, **lara)
    for weight in ("size", "unit"):
        cases += on((*square, "grid"), f"eva {weight} disjoint", group_weight=weight, **eva)
        overlapping = {"group_weight": weight, "disjoint": False}
        cases += on((*square, "grid"), f"eva {weight} overlapping", **overlapping, **eva)
        cases += on(("cross",), f"eva {weight} no window", group_weight=weight, **{**eva, "window": 0})
        cases += on(
            ("plain", "shared"), f"eva {weight} tiles", group_weight=weight, group_size=7, window=4, **seed
        )
    return cases


def cases_of(library: str, dtype: str, cases: list[Case]) -> list[Case]:
    """Give fewer inputs to half precision, which is rounded in and out and the same in between."""
    cases = [case for case in cases if case.row not in NOT_COMPARED.get(library, ())]
    return cases if dtype in FULL else [case for case in cases if case.inputs not in ("grouped", "shared")]


def each(function: Callable[[np.ndarray], Any], arrays: Arrays) -> Arrays:
    """Apply a function to named arrays and pairs of arrays."""
    return {
        name: tuple(map(function, x)) if isinstance(x, tuple) else function(x) for name, x in arrays.items()
    }


def call(case: Case, arrays: Arrays) -> tuple[Any, ...]:
    """Call the case's function and give its results, one or several."""
    function = getattr(randattn, case.function)
    arrays, options = dict(arrays), dict(case.options)
    q, k, v = (arrays.pop(name) for name in "qkv")
    if case.function == "merge":
        parts = (randattn.attend(q, k[..., keys, :], v[..., keys, :]) for keys in (slice(9), slice(9, None)))
        result = function(*parts)
    elif case.function == "attend":
        result = function(q, k, v, arrays.pop("bias"), **arrays, **options)
    elif case.function.endswith("_step"):
        result = stepped(
            getattr(randattn, case.function.removesuffix("_step")), function, q, k, v, arrays, options
        )
    else:
        result = function(q, k, v, **arrays, **options)
    return tuple(result) if isinstance(result, tuple) else (result,)


def stepped(
    estimator: Callable[..., Any], step: Callable[..., Any], q: Any, k: Any, v: Any, masks: Any, options: Any
) -> Any:
    """Give the results of a step of the later tokens, after a call on the first ones."""
    first, later = slice(None, 13), slice(13, None)
    before, after = ({name: x[..., part] for name, x in masks.items()} for part in (first, later))
    qkv = [x[..., first, :] for x in (q, k, v)]
    _, state = estimator(*qkv, is_causal=True, return_state=True, **before, **options)
    gqa = {"enable_gqa": options.get("enable_gqa", False)}
    return step(*(x[..., later, :] for x in (q, k, v)), state, **after, **gqa)[0]


def run(library: Library, case: Case, arrays: Arrays) -> tuple[Any, ...]:
    """Call a case as the library's users do."""
    return compiled_by_jax(case)(arrays) if library.name == "jax" else call(case, arrays)


@functools.cache
def compiled_by_jax(case: Case) -> Any:
    return importlib.import_module("jax").jit(functools.partial(call, case))


def difference(result: np.ndarray, reference: np.ndarray) -> float:
    """Give the relative norm of the difference; inf where shapes, or what is not finite, differ."""
    finite = np.isfinite(reference)
    if result.shape != reference.shape or not np.array_equal(result[~finite], reference[~finite]):
        return np.inf
    norm = np.linalg.norm(reference[finite])
    if not norm > 0 or np.isnan(result[finite]).any():
        return np.inf
    return float(np.linalg.norm(result[finite] - reference[finite]) / norm)


def compare(library: Library, dtype: str, case: Case, arrays: Arrays, numpy: Library) -> float:
    """Give the worst difference of a call's results; raise where they are not of the inputs' kind."""

    def in_dtype(x: np.ndarray) -> Any:
        return library.asarray(x, None if x.dtype == bool else dtype)

    def in_single(x: np.ndarray) -> Any:
        return library.asarray(x if x.dtype == bool else library.numpy(in_dtype(x)))

    given = each(in_dtype, arrays)
    results = run(library, case, given)
    for result, kind in zip(results, (dtype, dtype if dtype in FULL else "float32"), strict=False):
        if array_namespace(result) is not array_namespace(given["q"]):
            raise TypeError(f"expected an array of {library.name}, got {type(result)}")
        if result.dtype != getattr(library.xp, kind):
            raise TypeError(f"expected {kind}, got {result.dtype}")
        if device(result) != device(given["q"]):
            raise TypeError(f"expected {device(given['q'])}, got {device(result)}")
    if dtype in FULL:
        references = call(case, each(lambda x: numpy.asarray(x, None if x.dtype == bool else dtype), arrays))
    else:
        references = tuple(map(library.numpy, run(library, case, each(in_single, arrays))))
    return max(
        difference(*(x.astype(np.float64) for x in (library.numpy(result), reference)))
        for result, reference in zip(results, references, strict=True)
    )


def find_faults(cases: list[Case], inputs: dict[str, Arrays]) -> Iterator[str]:
    """Yield what makes the comparison worthless: nothing compared, nothing random, nothing noticed."""
    public = {name for name in randattn.__all__ if inspect.isfunction(getattr(randattn, name))} - {
        "diagnose",
        "multiply_adds",
    }
    for name in sorted(public - {case.function for case in cases}):
        yield f"{name} is public, and no case compares it"
    for case in cases:
        references = call(case, inputs[case.inputs])
        for reference in references:
            if np.isnan(reference).any():
                yield f"{case}: NaN in the reference"
            for dtype, tolerance in TOLERANCES.items():
                if not difference(reference * (1 + 2 * tolerance), reference) > tolerance:
                    yield f"{case}: an error of twice the tolerance of {dtype} passes"
        if "rng" in dict(case.options):
            (other,) = call(case.but(rng=SEED + 1), inputs[case.inputs])
            if not difference(other, references[0]) > 1e-3:
                yield f"{case}: another seed gives the same result"


def print_table(
    rows: list[str], libraries: dict[str, Library], worst: dict[tuple[str, str, str], float]
) -> None:
    width = max(map(len, rows), default=0)
    print("The largest difference from NumPy's result (float64, float32),")
    print("or from the library's own in float32 (float16, bfloat16).\n")
    print(f"{'':{width + 14}}" + "".join(f"{dtype:>10}" for dtype in TOLERANCES))
    print(f"{'tolerance':{width + 14}}" + "".join(f"{tolerance:>10.0e}" for tolerance in TOLERANCES.values()))
    for name in libraries:
        print()
        for row in rows:
            texts = []
            for dtype, tolerance in TOLERANCES.items():
                found = worst.get((name, row, dtype))
                texts.append(
                    "-" if found is None else f"{found:.1e}" if found <= tolerance else f"!{found:.1e}"
                )
            print(f"{name:14}{row:{width}}" + "".join(f"{text:>10}" for text in texts))


def dtypes_of(library: Library, *, quick: bool) -> list[str]:
    """Give the dtypes to compare; `quick`: where a program is made for each, one of full and one of half precision."""
    # NumPy is its own reference in full precision: only half is left to compare.
    full = () if library.name == "numpy" else FULL
    if quick and library.name == "jax":
        return [*full[:1], *library.half[-1:]]
    return [*full, *library.half]


def main(names: list[str], *, quick: bool = False) -> int:
    """Compare, print the table, and return 1 where a difference is over tolerance."""
    inputs, cases = make_inputs(), make_cases()
    faults = list(find_faults(cases, inputs))
    numpy = open_library("numpy", None)
    libraries = {name: open_library(*(name.split(":") if ":" in name else (name, None))) for name in names}

    made, failures = 0, []
    worst: dict[tuple[str, str, str], float] = {}
    for name, library in libraries.items():
        for dtype in dtypes_of(library, quick=quick):
            for case in cases_of(name, dtype, cases):
                why = ""
                try:
                    found = compare(library, dtype, case, inputs[case.inputs], numpy)
                except Exception as error:  # noqa: BLE001 (whatever it is, the comparison failed)
                    found, why = np.inf, f" ({type(error).__name__}: {error})"
                made += 1
                cell = (name, case.row, dtype)
                worst[cell] = max(worst.get(cell, 0.0), found)
                if not found <= TOLERANCES[dtype]:
                    failures.append(f"{name}, {case}, {dtype}: {found:.1e}{why}")
            missing = {case.row for case in cases_of(name, dtype, cases)} - {
                row for of, row, kind in worst if (of, kind) == (name, dtype)
            }
            faults += [f"{name}, {row}, {dtype}: not compared" for row in sorted(missing)]

    print_table(list(dict.fromkeys(case.row for case in cases)), libraries, worst)
    if not made:
        faults.append("nothing was compared")
    print(f"\n{made} comparisons, of {len(cases)} calls on {len(libraries)} libraries.")
    for line in (*faults, *failures[:20]):
        print(f"FAILED {line}")
    if len(failures) > 20:
        print(f"... and {len(failures) - 20} more")
    print(f"{made - len(failures)} passed, {len(failures) + len(faults)} failed")
    return 1 if faults or failures else 0


if __name__ == "__main__":
    named = [name for name in sys.argv[1:] if name != "--quick"] or list(ON_THE_CPU)
    unknown = [name for name in named if name.partition(":")[0] not in LIBRARIES]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: expected some of {', '.join(LIBRARIES)}")
    sys.exit(main(named, quick="--quick" in sys.argv))
