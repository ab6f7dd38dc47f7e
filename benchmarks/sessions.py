"""The sessions of one library, table by table."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import randattn

from . import by_hand
from .cases import CAUSAL, LINEAR, Workbench, case_of, keywords
from .harness import race
from .memory import memory_row
from .rows import BY_HAND, PRODUCTS, QUARTER, ROOT, Case, Row, time_row

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from .baselines import Library
    from .harness import Medians
    from .sizes import Sizes

    Say = Callable[[str], None]

_EXACT = "exact attention"


def measure(library: Library, sizes: Sizes, say: Say) -> Iterator[Row]:
    """Measure all rows of a session."""
    yield from products(library, sizes, say)
    for tokens in sizes.exact:
        yield from over_exact(library, sizes, tokens, "forward", say)
    for tokens in sizes.exact_backward:
        yield from over_exact(library, sizes, tokens, "forward+backward", say)
    yield from growth(library, sizes, say)
    yield from overhead(library, sizes, say)
    yield from memory(library, sizes, say)
    if sizes.processes:
        yield from import_time(sizes, say)


def products(library: Library, sizes: Sizes, say: Say, only: Collection[Case] | None = None) -> Iterator[Row]:
    """Measure time over the four matrix products alone, which every linear estimator needs.

    `only` names the cases to measure; None is all of them.
    """
    for tokens in sizes.products:
        baseline = _baseline(library, sizes, PRODUCTS, tokens)
        cases = [case for case in _linear(library, sizes, tokens) if only is None or case in only]
        if not cases:
            continue
        say(f"{tokens} tokens over the {PRODUCTS}")
        medians = _race(library, sizes, [baseline, *cases])
        share = _bandwidth_share(library)
        for case in cases:
            yield time_row(
                "products", case, medians[case], PRODUCTS, medians[baseline], **share(case, medians)
            )


def causal(library: Library, sizes: Sizes, say: Say) -> Iterator[Row]:
    """Measure causal calls, over the same calls where every query sees every key."""
    for tokens in sizes.causal:
        say(f"{tokens} tokens, causal")
        pairs = [
            [
                case_of(
                    library,
                    estimator,
                    tokens,
                    f"{options}{more}".strip(),
                    dtype=sizes.dtype,
                    mode=library.mode,
                )
                for more in (" is_causal=True", "")
            ]
            for estimator, options in CAUSAL
        ]
        medians = _race(library, sizes, [case for pair in pairs for case in pair])
        for case, plain in pairs:
            yield time_row("causal", case, medians[case], "not causal", medians[plain])


def over_exact(library: Library, sizes: Sizes, tokens: int, passes: str, say: Say) -> Iterator[Row]:
    """Measure time over the library's own exact attention."""
    say(f"{tokens} tokens over {library.exact_name}, {passes}")
    baseline = _baseline(library, sizes, library.exact_name, tokens, passes=passes, features=None)
    cases = [replace(case, passes=passes) for case in _linear(library, sizes, tokens)]
    medians = _race(library, sizes, [baseline, *cases])
    for case in cases:
        yield time_row("exact", case, medians[case], library.exact_name, medians[baseline])


def growth(library: Library, sizes: Sizes, say: Say) -> Iterator[Row]:
    """Measure time against tokens, and its growth from a quarter of them.

    On a CPU all lengths are timed in turn, so that the ratios between them are right. A GPU is less noisy,
    and its memory is too small for all lengths.
    """
    lengths = []
    for tokens in sizes.growth:
        cases = [_baseline(library, sizes, PRODUCTS, tokens), *_linear(library, sizes, tokens)]
        if tokens <= sizes.growth_exact:
            cases.append(_baseline(library, sizes, library.exact_name, tokens, features=None))
        lengths.append([replace(case, heads=sizes.growth_heads) for case in cases])
    if not library.on_gpu:
        lengths = [[case for cases in lengths for case in cases]]
    medians: dict[Case, Medians] = {}
    for cases in lengths:
        say(f"growth: {', '.join(str(n) for n in dict.fromkeys(case.tokens for case in cases))} tokens")
        medians |= _race(library, sizes, cases)
    share = _bandwidth_share(library)
    for case, each in medians.items():
        quarter = medians.get(replace(case, tokens=case.tokens // 4))
        yield time_row("growth", case, each, QUARTER if quarter else None, quarter, **share(case, medians))


def overhead(library: Library, sizes: Sizes, say: Say) -> Iterator[Row]:
    """Measure time on the smallest inputs over the same formulas written by hand."""
    say(f"{sizes.overhead} tokens over the formulas {BY_HAND}")
    ops = by_hand.operations(library)
    bench = Workbench(library)
    for mode in library.compile:
        if mode == "compile":
            continue
        for label, formula in by_hand.FORMULAS.items():
            estimator, _, options = label.partition(" ")
            case = case_of(library, estimator, sizes.overhead, options, features=16, mode=mode)
            inputs = bench.inputs(case)
            hand = library.compile[mode](lambda *x, formula=formula: formula(ops, *x))
            ours = library.compile[mode](_with_noise(case))
            arrays = (*inputs.qkv, inputs.noise)
            calls: dict[Any, Callable[[], Any]] = {
                case: lambda ours=ours, arrays=arrays: ours(*arrays),
                BY_HAND: lambda hand=hand, arrays=arrays: hand(*arrays),
            }
            medians = race(calls, wait=library.own.wait, number=sizes.small_number)
            yield time_row("overhead", case, medians[case], BY_HAND, medians[BY_HAND])


def _with_noise(case: Case) -> Callable[..., Any]:
    estimator, options = getattr(randattn, case.estimator), keywords(case.options)
    return lambda q, k, v, noise: estimator(q, k, v, noise=noise, **options)


def memory(library: Library, sizes: Sizes, say: Say) -> Iterator[Row]:
    """Measure peak memory beyond the inputs."""
    cases = [
        replace(case, heads=sizes.growth_heads) for n in sizes.memory for case in _linear(library, sizes, n)
    ]
    cases += [
        replace(case, heads=sizes.growth_heads, passes="forward+backward")
        for n in sizes.memory_backward
        for case in _linear(library, sizes, n)
    ]
    cases += [
        case_of(library, estimator, n, dtype=sizes.dtype, features=None)
        for n in sizes.memory_quadratic
        for estimator in ("ra", "softmax_attention")
    ]
    for case in cases:
        if case.mode == "compile":
            continue
        say(f"memory of {case.label}, {case.tokens} tokens, {case.passes}")
        row = memory_row(case)
        if row is not None:
            yield row


def import_time(sizes: Sizes, say: Say) -> Iterator[Row]:
    """Measure the seconds of `import randattn` after NumPy is imported, in fresh processes."""
    say("import randattn")
    code = "import time, numpy; t = time.perf_counter(); import randattn; print(time.perf_counter() - t)"
    command = (sys.executable, "-c", code)

    def once() -> float:
        return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    once()  # Compiles the files.
    sets = [tuple(once() for _ in range(sizes.processes)) for _ in range(2)]
    case = Case("numpy", "cpu", "import", tokens=0, heads=0, features=None, head_dim=0)
    yield time_row("import", case, tuple(map(median, sets)), note="beyond NumPy's own import")


def _linear(library: Library, sizes: Sizes, tokens: int) -> list[Case]:
    return [
        case_of(library, estimator, tokens, options, dtype=sizes.dtype, mode=mode)
        for mode in sizes.modes
        for estimator, options in LINEAR
    ]


def _baseline(library: Library, sizes: Sizes, name: str, tokens: int, **more: Any) -> Case:
    return case_of(library, name, tokens, dtype=sizes.dtype, mode=sizes.modes[0], **more)


def _race(library: Library, sizes: Sizes, cases: Iterable[Case]) -> dict[Case, Medians]:
    bench = Workbench(library)
    calls = {case: bench.call(case) for case in cases}
    return race(calls, wait=library.own.wait, number=sizes.number)


def _bandwidth_share(library: Library) -> Callable[[Case, dict[Case, Medians]], dict[str, float]]:
    """Return a function: the share of a GPU's bandwidth for reading q, k, v and writing the output."""
    if not library.on_gpu:
        return lambda *_: {}
    bandwidth = measured_bandwidth(library)

    def share(case: Case, medians: dict[Case, Medians]) -> dict[str, float]:
        values = 4 * case.tokens * case.heads * case.head_dim
        moved = values * (2 if case.dtype.endswith("16") else 4)
        return {"bandwidth_share": moved / min(medians[case]) / bandwidth}

    return share


def measured_bandwidth(library: Library, values: int = 1 << 28) -> float:
    """Measure the bytes a second, read and written, of a copy on the device."""
    array = library.xp.ones(values, dtype=library.xp.float32)
    if library.name == "torch":
        array = array.to("cuda")
    copy = library.own.copy
    medians = race({"copy": lambda: copy(array)}, wait=library.own.wait, number=10)
    return 2 * math.prod(array.shape) * 4 / min(medians["copy"])
