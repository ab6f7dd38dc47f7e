"""The measurements: errors, agreement and times, for every library, estimator and number of samples."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from randattn import softmax_attention

from ._backends import open_backend
from ._errors import Refused
from ._plan import ESTIMATORS, EXACT, Config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ._backends import Backend
    from ._files import Inputs
    from ._plan import Plan

    Array = Any
    Call = Callable[[], Array]
    Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """One library, estimator and number of samples. What is not a finite number is None."""

    backend: str
    estimator: str
    samples: int | None
    relative_error: float | None
    seconds: float
    speedup: float
    max_abs_diff: float | None


@dataclass(frozen=True)
class Length:
    """The time of one call at one number of tokens."""

    backend: str
    estimator: str
    samples: int | None
    length: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """All that is measured, and the machine's load before (the average of a minute, where it is known)."""

    rows: list[Row]
    mean_v_error: float
    lengths: list[Length]
    input: str
    shapes: dict[str, list[int]]
    seeds: int
    load_per_core: float | None
    libraries: dict[str, dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class _Steps:
    total: int
    advance: Advance
    done: int = 0

    def begin(self, what: str) -> None:
        self.advance(self.done, self.total, what)
        self.done += 1


# What overflows is refused or reported; NumPy's warnings would stand between.
@np.errstate(all="ignore")
def measure(
    inputs: Inputs,
    backends: Sequence[Backend],
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
    inputs : Inputs
        What is attended to.
    backends, estimators : sequences
        What is compared.
    plan : Plan
        How much is measured.
    seeds : int
        The errors are averaged over the seeds 0, 1, ...
    start : float
        When the command was started, by `time.perf_counter`.
    advance : callable
        Called with the number of steps done, that of all steps, and the step in hand.

    Returns
    -------
    Report
    """
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None
    exact, mean_v_error = truth(inputs)
    configs = plan.configs(estimators, inputs.k.shape[-2])
    numbers = {config: range(1 if config == EXACT else seeds) for config in configs}
    runs = sum(map(len, numbers.values()))
    steps = _Steps(len(backends) * (runs + 1 + len(plan.lengths)), advance)

    accuracy = {
        config: _accuracy(inputs, backends, config, seeds=numbers[config], exact=exact, steps=steps)
        for config in configs
    }
    rows = []
    for backend in backends:
        steps.begin(f"{backend.name}: time")
        race = {config: accuracy[config][backend.name].call for config in configs}
        if EXACT not in race:
            race[EXACT] = _call(inputs, backend, EXACT, seed=0)
            race[EXACT]()
        seconds = _race(race, plan.rounds, plan.seconds)
        for config in configs:
            of_it = accuracy[config][backend.name]
            rows.append(
                Row(
                    backend.name,
                    *config,
                    relative_error=of_it.error,
                    seconds=seconds[config],
                    speedup=seconds[EXACT] / seconds[config],
                    max_abs_diff=of_it.difference,
                )
            )
    lengths = list(_lengths(inputs, backends, estimators, plan=plan, start=start, steps=steps))
    advance(steps.total, steps.total, "")
    return Report(
        rows,
        mean_v_error,
        lengths,
        inputs.name,
        {"q": list(inputs.q.shape), "k": list(inputs.k.shape), "v": list(inputs.v.shape)},
        seeds,
        load,
        {backend.name: {"version": backend.version, "device": backend.device} for backend in backends},
    )


def truth(inputs: Inputs) -> tuple[np.ndarray, float]:
    """Exact attention in float64, and the error of the trivial answer mean(V)."""
    arrays = (inputs.q, inputs.k, inputs.v)
    with np.errstate(all="ignore"):
        is_finite = np.isfinite(softmax_attention(*arrays, scale=inputs.scale)).all()
    if not is_finite:
        raise Refused(f"{inputs.name}: exact attention overflows in float32")
    q, k, v = (x.astype(np.float64) for x in arrays)
    exact = softmax_attention(q, k, v, scale=inputs.scale)
    if not _layer_norms(exact).all():
        raise Refused(f"{inputs.name}: exact attention is zero in a layer, and no error is relative to that")
    return exact, _relative_error(np.mean(v, axis=-2, keepdims=True), exact)


def _layer_norms(x: np.ndarray) -> np.ndarray:
    """The norm of each layer. A layer has three axes: heads, tokens and features."""
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
    inputs: Inputs,
    backends: Sequence[Backend],
    config: Config,
    *,
    seeds: range,
    exact: np.ndarray,
    steps: _Steps,
) -> dict[str, _Accuracy]:
    """For each library the mean error and the largest difference from NumPy with the same seed."""
    reference = open_backend("numpy")
    wanted = [_call(inputs, reference, config, seed)() for seed in seeds]
    accuracy = {}
    for backend in backends:
        calls, errors, differences = [], [], []
        for seed, want in zip(seeds, wanted, strict=True):
            steps.begin(f"{backend.name}: error of {config}")
            calls.append(_call(inputs, backend, config, seed))
            got = backend.to_numpy(calls[-1]())
            errors.append(_relative_error(got.astype(np.float64), exact))
            differences.append(np.max(np.abs(got - want)))
        accuracy[backend.name] = _Accuracy(_finite(np.mean(errors)), _finite(np.max(differences)), calls[0])
    return accuracy


def _finite(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None


def _call(inputs: Inputs, backend: Backend, config: Config, seed: int) -> Call:
    """The estimator on these inputs, to be called again and again; it waits for the device."""
    # Without as many queries as keys no window belongs to a query.
    windowed = inputs.q.shape[-2] == inputs.k.shape[-2]
    function = backend.compile(config.bind(inputs.scale, seed, windowed=windowed))
    arrays = [backend.asarray(x) for x in (inputs.q, inputs.k, inputs.v)]

    def call() -> Array:
        out = function(*arrays)
        backend.wait(out)
        return out

    return call


def _race(calls: Mapping[Config, Call], rounds: int, seconds: float) -> dict[Config, float]:
    """The median time of each call, all called in turn: what slows the machine slows them all."""
    times: dict[Config, list[float]] = {config: [] for config in calls}
    begun = time.perf_counter()
    done, elapsed = 0, 0.0
    while elapsed < seconds or (done < rounds and elapsed < 3 * seconds):
        for config, call in calls.items():
            start = time.perf_counter()
            call()
            times[config].append(time.perf_counter() - start)
        done, elapsed = done + 1, time.perf_counter() - begun
    return {config: median(each) for config, each in times.items()}


def _lengths(
    inputs: Inputs,
    backends: Sequence[Backend],
    estimators: Sequence[str],
    *,
    plan: Plan,
    start: float,
    steps: _Steps,
) -> Iterator[Length]:
    """Time one head of the inputs, repeated to each length, as far as the plan's time goes."""
    curves = [Config(name, ESTIMATORS[name].on_curve) for name in estimators if name in plan.curves]
    entrants = {backend.name: curves for backend in backends}
    cost = dict.fromkeys(entrants, 0.0)
    for length in plan.lengths:
        one_head = inputs.one_head(length)
        for backend in backends:
            begun = time.perf_counter()
            steps.begin(f"{backend.name}: {length} tokens")
            # Longer takes a little longer: what is quadratic drops out, and to compile takes as before.
            if not entrants[backend.name] or begun - start + 1.2 * cost[backend.name] > plan.deadline:
                continue
            calls = {config: _call(one_head, backend, config, seed=0) for config in entrants[backend.name]}
            for call in calls.values():
                call()
            seconds = _race(calls, rounds=3, seconds=plan.seconds / 8)
            for config in calls:
                yield Length(backend.name, *config, length, seconds[config])
            entrants[backend.name] = [config for config in calls if seconds[config] <= plan.slowest]
            cost[backend.name] = time.perf_counter() - begun
