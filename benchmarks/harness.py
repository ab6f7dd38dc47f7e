"""Times that can be compared on a noisy machine: interleaved rounds, medians, ratios of medians.

Other work on the machine slows all calls of a round alike, so that the ratio of two medians is right even
where each median is too large.
"""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Name = TypeVar("Name")
    Medians = tuple[float, ...]

ROUNDS = 5
SETS = 2
# The most that a set's baseline may be over the better set's.
_DISTURBED = 1.1


def _nothing(_: Any) -> None:
    return None


def race(
    calls: Mapping[Name, Callable[[], Any]],
    *,
    wait: Callable[[Any], object] = _nothing,
    rounds: int = ROUNDS,
    sets: int = SETS,
    number: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Medians]:
    """Time calls in turn, A B C ... A B C ..., after one call of each to warm up.

    Parameters
    ----------
    calls : mapping of callables
        The timed calls, by name.
    wait : callable
        Waits until the device has computed a result.
    rounds : int
        Times in a median.
    sets : int
        Number of medians.
    number : int
        Calls in a row, whose mean is one time: more than one where a call is near the clock's own
        cost. The device is waited for after the last of them.
    clock : callable
        Seconds.

    Returns
    -------
    dict
        For each name the median seconds of each set.
    """
    for call in calls.values():
        wait(call())
    medians: dict[Name, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    try:
        for _ in range(sets):
            # Collected here, and not in the middle of a call.
            gc.collect()
            gc.disable()
            times: dict[Name, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(_seconds(call, wait, number, clock))
            for name, each in times.items():
                medians[name].append(median(each))
    finally:
        if collecting:
            gc.enable()
    return {name: tuple(each) for name, each in medians.items()}


def _seconds(
    call: Callable[[], Any], wait: Callable[[Any], object], number: int, clock: Callable[[], float]
) -> float:
    start = clock()
    for _ in range(number):
        out = call()
    wait(out)
    # The result is freed after the clock has stopped.
    return (clock() - start) / number


def best(medians: Medians) -> float:
    """Return the smaller of the medians, in seconds."""
    return min(medians)


def best_ratio(medians: Medians, baseline: Medians) -> float:
    """Return the better of the sets' ratios of medians, each of times that were taken in turn.

    A set whose baseline was disturbed does not count: a slow baseline would make the ratio too small, and the
    better ratio would be the wrong one.
    """
    pairs = zip(medians, baseline, strict=True)
    return min(a / b for a, b in pairs if b <= _DISTURBED * best(baseline))
