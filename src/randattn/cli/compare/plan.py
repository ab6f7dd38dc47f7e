"""Plan the measurements of `compare`: each estimator of the registry with some numbers of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from randattn._estimators.registry import Estimator, by_label
from randattn.cli.errors import Refused
from randattn.cli.files import Arrays


def options_of(row: Estimator, samples: int | None, seed: int, inputs: Arrays) -> dict[str, Any]:
    """Return the options of a call on the inputs with a number of samples and a seed."""
    options: dict[str, Any] = {} if row.count is None else {row.count: samples}
    n, m = inputs.q.shape[-2], inputs.k.shape[-2]
    if inputs.is_causal:
        options = dict(row.causal(samples, n)) if row.causal is not None and samples else options
        options["is_causal"] = True
    elif n != m:
        options |= row.across
    if row.draws != "never":
        options["rng"] = seed
    return options


def usable(estimators: Sequence[str], inputs: Arrays) -> list[str]:
    """Return the estimators that can be called on the inputs: for causal ones, those with a causal form."""
    found = [label for label in estimators if by_label()[label].is_causal or not inputs.is_causal]
    if not found:
        raise Refused(f"{inputs.name}: is causal, and {', '.join(estimators)} has no causal form")
    return found


class Config(NamedTuple):
    """An estimator with a number of samples."""

    estimator: str
    samples: int | None

    def __str__(self) -> str:
        return self.estimator if self.samples is None else f"{self.estimator} {self.samples}"

    @property
    def is_random(self) -> bool:
        """Tell whether the result depends on the seed."""
        return by_label()[self.estimator].draws != "never"

    def bind(self, inputs: Arrays, seed: int) -> Callable[..., Any]:
        """Return the estimator as a function of q, k and v, and of the key mask if there is one."""
        row = by_label()[self.estimator]
        keywords = {"scale": inputs.scale, **options_of(row, self.samples, seed, inputs)}
        names = tuple(inputs.mask)
        return lambda q, k, v, *mask: row.function(q, k, v, **dict(zip(names, mask, strict=True)), **keywords)


EXACT = Config("softmax", None)


@dataclass(frozen=True)
class Plan:
    """The extent of the measurements.

    Attributes
    ----------
    linear, quadratic : tuples of int
        Numbers of samples of most estimators, and of an estimator whose default is one.
    seeds : int
        Number of seeds over which errors are averaged by default.
    rounds : int
        Number of times that each call is timed, unless that takes three times `seconds`.
    seconds : float
        Least time in seconds for which all calls together are timed.
    quadratic_curves : bool
        True if time is measured against length also for estimators that are neither linear nor exact.
    lengths : tuple of int
        Numbers of tokens.
    slowest : float
        Seconds: a call that takes longer at one length is left out of the next.
    deadline : float
        Seconds after the start by which the measurements against length end.
    """

    linear: tuple[int, ...]
    quadratic: tuple[int, ...]
    seeds: int
    rounds: int
    seconds: float
    quadratic_curves: bool
    lengths: tuple[int, ...]
    slowest: float
    deadline: float

    def configs(self, estimators: Iterable[str], tokens: int) -> list[Config]:
        """Return each estimator with each number of samples that `tokens` keys allow."""
        configs = []
        for label in estimators:
            row = by_label()[label]
            counts: Iterable[int | None] = self.quadratic if row.default == 1 else self.linear
            if row.count is None:
                counts = [None]
            elif row.counts_tokens:
                # Counts above the number of keys fall together: a set has each once.
                counts = sorted({min(count, tokens) for count in self.linear})
            configs += [Config(label, count) for count in counts]
        return configs

    def curves(self, estimators: Iterable[str]) -> list[Config]:
        """Return the estimators whose time is measured against length, each with its default count."""
        rows = [(label, by_label()[label]) for label in estimators]
        return [
            Config(label, row.default)
            for label, row in rows
            if self.quadratic_curves or row.is_linear or row.is_exact
        ]


# The plan without --quick, whose deadline keeps the command below three minutes. JAX takes about 10 seconds
# to compile `adaptive_eva` for each length: few lengths, far apart, leave time for the longest.
FULL = Plan(
    linear=(16, 64, 256),
    quadratic=(1, 4),
    seeds=3,
    rounds=7,
    seconds=3.0,
    quadratic_curves=True,
    lengths=(256, 1024, 4096, 16384),
    slowest=0.5,
    deadline=140.0,
)
# The plan of --quick, for seconds in place of minutes. JAX takes seconds to compile `adaptive_eva` for each
# number of samples: one number leaves time for the lengths.
QUICK = Plan(
    linear=(64,),
    quadratic=(1,),
    seeds=1,
    rounds=3,
    seconds=0.3,
    quadratic_curves=False,
    lengths=(1024, 4096),
    slowest=0.05,
    deadline=25.0,
)
