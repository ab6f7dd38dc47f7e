"""What there is to measure, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn import eva, lara, ra, rfa, softmax_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# EVA's own default: so many tokens around a query are attended to exactly.
WINDOW = 64


class Estimator(NamedTuple):
    """A function of the library, and its keyword that its samples are counted by.

    Attributes
    ----------
    function : callable
    keyword : str or None
        None where there are no samples.
    on_curve : int or None
        How many there are where time is measured against length.
    counts_tokens : bool
        Landmarks and groups of tokens: never more than there are keys.
    """

    function: Callable[..., Any]
    keyword: str | None
    on_curve: int | None
    counts_tokens: bool = False


ESTIMATORS = {
    "softmax": Estimator(softmax_attention, None, None),
    "rfa": Estimator(rfa, "num_samples", 64),
    "ra": Estimator(ra, "num_samples", 1),
    "lara": Estimator(lara, "num_landmarks", 64, counts_tokens=True),
    "eva": Estimator(eva, "num_groups", 64, counts_tokens=True),
}


class Config(NamedTuple):
    """An estimator with a number of samples."""

    estimator: str
    samples: int | None

    def __str__(self) -> str:
        return self.estimator if self.samples is None else f"{self.estimator} {self.samples}"

    def bind(self, scale: float, seed: int, *, windowed: bool) -> Callable[..., Any]:
        """The library's function of q, k and v alone."""
        function, keyword, *_ = ESTIMATORS[self.estimator]
        keywords: dict[str, Any] = {"scale": scale}
        if keyword is not None:
            keywords |= {keyword: self.samples, "rng": seed}
        if self.estimator == "eva":
            keywords["window"] = WINDOW if windowed else 0
        return lambda q, k, v: function(q, k, v, **keywords)


EXACT = Config("softmax", None)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes
    ----------
    linear, quadratic : tuples of int
        The numbers of samples of the estimators of linear cost, and of RA.
    seeds : int
        How many seeds errors are averaged over where the caller does not say.
    rounds : int
        How often each call is timed, if that does not take three times `seconds`.
    seconds : float
        How long calls are timed at least, together.
    curves : tuple of str
        The estimators whose time is measured against length,
    lengths : tuple of int
        and the numbers of tokens.
    slowest : float
        What takes more seconds at one length is left out of the next.
    deadline : float
        Seconds after the start that the lengths are to end within.
    """

    linear: tuple[int, ...]
    quadratic: tuple[int, ...]
    seeds: int
    rounds: int
    seconds: float
    curves: tuple[str, ...]
    lengths: tuple[int, ...]
    slowest: float
    deadline: float

    def configs(self, estimators: Iterable[str], tokens: int) -> list[Config]:
        """Each estimator with each number of samples that `tokens` keys allow."""
        configs = []
        for name in estimators:
            estimator = ESTIMATORS[name]
            counts: Iterable[int | None] = self.quadratic if name == "ra" else self.linear
            if estimator.keyword is None:
                counts = [None]
            elif estimator.counts_tokens:
                counts = sorted({min(count, tokens) for count in self.linear})
            configs += [Config(name, count) for count in counts]
        return configs


FULL = Plan(
    linear=(16, 64, 256),
    quadratic=(1, 4),
    seeds=3,
    rounds=7,
    seconds=3.0,
    curves=("softmax", "rfa", "ra", "lara", "eva"),
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16384),
    slowest=0.5,
    deadline=110.0,
)
QUICK = Plan(
    linear=(16, 64),
    quadratic=(1,),
    seeds=1,
    rounds=3,
    seconds=0.3,
    curves=("softmax", "rfa", "lara", "eva"),
    lengths=(1024, 4096),
    slowest=0.05,
    deadline=12.0,
)
