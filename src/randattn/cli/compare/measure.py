"""Measure errors, agreement and times for every library, estimator and number of samples."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from randattn import softmax_attention
from randattn._core.library import Array
from randattn.cli.errors import Refused
from randattn.cli.files import Arrays
from randattn.cli.libraries import ArrayLibrary, open_library

from .plan import EXACT, Config, Plan, usable

# The spread of times over rounds above which a measurement is repeated; an idle machine stays below a tenth.
_WIDE = 0.3
Call = Callable[[], Array]
Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """The figures of one library, estimator and number of samples; None for a figure that is not finite."""

    backend: str
    estimator: str
    samples: int | None
    relative_error: float | None
    seconds: float
    speedup: float
    max_abs_diff: float | None


@dataclass(frozen=True)
class Length:
    """The time of one call with one number of tokens."""

    backend: str
    estimator: str
    samples: int | None
    length: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """All measurements, and the machine's load before them: the average of a minute, None if unknown.

    `disturbed` names the measurements whose times stayed spread widely, when they were repeated.
    """

    rows: list[Row]
    mean_v_error: float
    lengths: list[Length]
    input: str
    shapes: dict[str, list[int]]
    seeds: int
    load_per_core: float | None
    disturbed: list[str]
    libraries: dict[str, dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass
class _Progress:
    total: int
    advance: Advance
    done: int = 0

    def begin(self, what: str) -> None:
        self.advance(self.done, self.total, what)
        self.done += 1


# Overflow is refused or reported as a figure: NumPy's warnings would mix with the table.
@np.errstate(all="ignore")
def measure(
    inputs: Arrays,
    libraries: Sequence[ArrayLibrary],
    estimators: Sequence[str],
    *,
    plan: Plan,
    seeds: int,
    start: float,
    advance: Advance,
) -> Report:
    """Measure errors, agreement and times, then time against length.

    Parameters
    ----------
    inputs : Arrays
        The queries, keys and values.
    libraries, estimators : sequences
        The libraries and the estimators to compare.
    plan : Plan
        The extent of the measurements.
    seeds : int
        Number of seeds 0, 1, ... over which errors are averaged.
    start : float
        Time of the command's start, by `time.perf_counter`.
    advance : callable
        Function that is called with the number of steps done, the number of all steps, and the next step.

    Returns
    -------
    Report
        All measurements.
    """
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None
    exact, mean_v_error = truth(inputs)
    estimators = usable(estimators, inputs)
    configs = plan.configs(estimators, inputs.k.shape[-2])
    # Without draws, all seeds give one result: the others would be calls, and programs of JAX, for nothing.
    numbers = {config: range(seeds if config.is_random else 1) for config in configs}
    runs = sum(map(len, numbers.values()))
    steps = _Progress(len(libraries) * (runs + 1 + len(plan.lengths)), advance)

    accuracy = {
        config: _accuracy(inputs, libraries, config, seeds=numbers[config], exact=exact, steps=steps)
        for config in configs
    }
    rows, disturbed = [], []
    for library in libraries:
        steps.begin(f"{library.name}: time")
        race = {config: accuracy[config][library.name].call for config in configs}
        if EXACT not in race:
            # Speedups need the time of exact attention; the first call compiles it outside the race.
            race[EXACT] = _call(inputs, library, EXACT, seed=0)
            race[EXACT]()
        seconds, is_disturbed = _race(race, plan.rounds, plan.seconds)
        disturbed += [library.name] * is_disturbed
        for config in configs:
            error, difference, _ = accuracy[config][library.name]
            speedup = seconds[EXACT] / seconds[config]
            rows.append(Row(library.name, *config, error, seconds[config], speedup, difference))
    lengths = list(
        _lengths(inputs, libraries, estimators, plan=plan, start=start, steps=steps, disturbed=disturbed)
    )
    advance(steps.total, steps.total, "")
    return Report(
        rows,
        mean_v_error,
        lengths,
        inputs.name,
        {"q": list(inputs.q.shape), "k": list(inputs.k.shape), "v": list(inputs.v.shape)},
        seeds,
        load,
        disturbed,
        {library.name: {"version": library.version, "device": library.device} for library in libraries},
    )


def truth(inputs: Arrays) -> tuple[np.ndarray, float]:
    """Return exact attention in float64, and the relative error of the trivial answer mean(V)."""
    # Estimators are measured in float32: inputs that overflow there have no error that means anything.
    arrays = (inputs.q, inputs.k, inputs.v)
    options: dict[str, Any] = {"scale": inputs.scale, "is_causal": inputs.is_causal, **inputs.mask}
    with np.errstate(all="ignore"):
        is_finite = np.isfinite(softmax_attention(*arrays, **options)).all()
    if not is_finite:
        raise Refused(f"{inputs.name}: exact attention overflows in float32")
    q, k, v = (x.astype(np.float64) for x in arrays)
    exact = softmax_attention(q, k, v, **options)
    if not _layer_norms(exact).all():
        raise Refused(f"{inputs.name}: exact attention is zero in a layer, where no relative error exists")
    # Attention with equal logits: the mean of the keys that a query may see, and zeros for padded queries.
    mean = softmax_attention(np.zeros_like(q), k, v, **options)
    return exact, _relative_error(mean, exact)


def _layer_norms(x: np.ndarray) -> np.ndarray:
    """Return the norm of each layer, the last three axes: heads, tokens and features."""
    layer = x.shape[-3:]
    norms: np.ndarray = np.linalg.norm(x.reshape(-1, int(np.prod(layer))), axis=-1)
    return norms


def _relative_error(out: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean(_layer_norms(out - exact) / _layer_norms(exact)))


class _Accuracy(NamedTuple):
    error: float | None
    difference: float | None  # from NumPy
    call: Call  # with the first seed, for its time


def _accuracy(
    inputs: Arrays,
    libraries: Sequence[ArrayLibrary],
    config: Config,
    *,
    seeds: range,
    exact: np.ndarray,
    steps: _Progress,
) -> dict[str, _Accuracy]:
    """Return, for each library, the mean error and the largest difference from NumPy with the same seeds."""
    reference = open_library("numpy")
    wanted = [_call(inputs, reference, config, seed)() for seed in seeds]
    accuracy = {}
    for library in libraries:
        calls, errors, differences = [], [], []
        for seed, want in zip(seeds, wanted, strict=True):
            steps.begin(f"{library.name}: error of {config}")
            calls.append(_call(inputs, library, config, seed))
            got = library.to_numpy(calls[-1]())
            errors.append(_relative_error(got.astype(np.float64), exact))
            differences.append(np.max(np.abs(got - want)))
        accuracy[library.name] = _Accuracy(_finite(np.mean(errors)), _finite(np.max(differences)), calls[0])
    return accuracy


def _finite(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None


def _call(inputs: Arrays, library: ArrayLibrary, config: Config, seed: int) -> Call:
    """Return a function that calls the estimator on these inputs and waits for the device."""
    function = library.compiled(config.bind(inputs, seed))
    arrays = [library.asarray(x) for x in (inputs.q, inputs.k, inputs.v, *inputs.mask.values())]

    def call() -> Array:
        out = function(*arrays)
        library.wait(out)
        return out

    return call


def _race(calls: Mapping[Config, Call], rounds: int, seconds: float) -> tuple[dict[Config, float], bool]:
    """Return the median time of each call in seconds, and whether the machine was disturbed.

    A race whose times are spread widely over its rounds is run once more, and the one with the smaller spread
    counts. The machine was disturbed if that is a wide spread too.
    """
    times, spread = _rounds(calls, rounds, seconds)
    if spread > _WIDE:
        times, spread = min((times, spread), _rounds(calls, rounds, seconds), key=lambda found: found[1])
    return {config: median(each) for config, each in times.items()}, spread > _WIDE


def _rounds(
    calls: Mapping[Config, Call], rounds: int, seconds: float
) -> tuple[dict[Config, list[float]], float]:
    """Return the times of each call, and their spread: the distance of the quartiles over the median time."""
    # All calls take turns: a machine that is slow for a while slows them all, and leaves their ratios.
    times: dict[Config, list[float]] = {config: [] for config in calls}
    begun = time.perf_counter()
    done, elapsed = 0, 0.0
    while elapsed < seconds or (done < rounds and elapsed < 3 * seconds):
        for config, call in calls.items():
            start = time.perf_counter()
            call()
            times[config].append(time.perf_counter() - start)
        done, elapsed = done + 1, time.perf_counter() - begun
    quartiles = (np.quantile(each, (0.25, 0.5, 0.75)) for each in times.values())
    return times, float(np.median([(high - low) / middle for low, middle, high in quartiles]))


def _lengths(
    inputs: Arrays,
    libraries: Sequence[ArrayLibrary],
    estimators: Sequence[str],
    *,
    plan: Plan,
    start: float,
    steps: _Progress,
    disturbed: list[str],
) -> Iterator[Length]:
    """Time one head of the inputs, repeated to each length, as far as the plan's time goes."""
    entrants = {library.name: plan.curves(estimators) for library in libraries}
    cost = dict.fromkeys(entrants, 0.0)
    for length in plan.lengths:
        one_head = inputs.one_head(length)
        for library in libraries:
            begun = time.perf_counter()
            steps.begin(f"{library.name}: {length} tokens")
            # The next length is expected to take 1.2 times as long as the last one: slow calls have dropped
            # out, and compiling takes as long as before.
            if not entrants[library.name] or begun - start + 1.2 * cost[library.name] > plan.deadline:
                continue
            calls = {config: _call(one_head, library, config, seed=0) for config in entrants[library.name]}
            # The first call compiles, and is not timed.
            for call in calls.values():
                call()
            seconds, is_disturbed = _race(calls, rounds=3, seconds=plan.seconds / 8)
            disturbed += [f"{library.name} at {length:,} tokens"] * is_disturbed
            for config in calls:
                yield Length(library.name, *config, length, seconds[config])
            entrants[library.name] = [config for config in calls if seconds[config] <= plan.slowest]
            cost[library.name] = time.perf_counter() - begun
