"""The runs of the papers' experiments as numbers with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from scipy.stats import t as student

from .figures import MEAN, PICTURES, tokens_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .runs import Done


@dataclass(frozen=True)
class Value:
    """A mean over seeds, and the half width of its 95% interval."""

    mean: float
    half: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        """Make a value of one number for each seed."""
        number = len(values)
        if number < 2:
            return cls(mean(values), math.inf, number)
        quantile = float(student.ppf(0.975, number - 1))
        return cls(mean(values), quantile * stdev(values) / math.sqrt(number), number)

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half:.1g}" if math.isfinite(self.half) else f"{self.mean:.3g}"


class Results:
    """The runs of all experiments, with the measured numbers by name."""

    def __init__(self, done: Sequence[Done]) -> None:
        self._done = done
        figures = [one for one in done if one.run.experiment == "figures"]
        self._settings = {name: value for one in figures for name, value in one.run.settings.items()}
        # A run of several estimators names the estimator of each point.
        self._points = [
            {"estimator": one.run.method, "seed": one.run.seed, **point}
            for one in figures
            for point in one.found["points"]
        ]

    def has(self, experiment: str) -> bool:
        """Tell whether an experiment was run."""
        return any(one.run.experiment == experiment for one in self._done)

    def trained(self, experiment: str, method: str, name: str, library: str = "torch") -> Value:
        """Return a number of trained models."""
        return Value.of(
            [
                one.found[name]
                for one in self._done
                if (one.run.experiment, one.run.method, one.run.library) == (experiment, method, library)
            ]
        )

    def curve(self, along: str, name: str, **at: Any) -> dict[int, Value]:
        """Return one number of the figures against samples or tokens."""
        found = self._by_seed(along, name, **at)
        return {where: Value.of(list(values.values())) for where, values in found.items()}

    def growth(self, method: str, inputs: str, first: int, last: int) -> list[float]:
        """Return the growth of the error between two lengths, for each seed."""
        found = self._by_seed("tokens", "error", **self._at_every_length(method, inputs))
        return [found[last][seed] / found[first][seed] for seed in sorted(found[first])]

    def _by_seed(self, along: str, name: str, **at: Any) -> dict[int, dict[int, float]]:
        found: dict[int, dict[int, float]] = {}
        for point in self._points:
            here = all(point.get(other) == value for other, value in at.items())
            if here and point.get(name) is not None:
                found.setdefault(point[along], {})[point["seed"]] = point[name]
        return dict(sorted(found.items()))

    def accuracy(self) -> Value:
        """Return the vision model's accuracy at the length of the errors against samples."""
        return self.curve("tokens", "accuracy", inputs=PICTURES)[self.tokens(PICTURES)]

    def setting(self, name: str) -> Any:
        """Return a setting of the figures."""
        return self._settings[name]

    def tokens(self, inputs: str) -> int:
        """Return the length of the errors against samples."""
        return tokens_of(inputs, self._settings)

    def against_samples(self, method: str, inputs: str) -> dict[int, Value]:
        """Return errors against samples at one length."""
        return self.curve("samples", "error", estimator=method, inputs=inputs, tokens=self.tokens(inputs))

    def trivial(self, inputs: str) -> Value:
        """Return the error of mean(V) at that length."""
        return self.against_length(MEAN, inputs)[self.tokens(inputs)]

    def against_length(self, method: str, inputs: str) -> dict[int, Value]:
        """Return errors against length, with a fixed number of samples: one for ra."""
        return self.curve("tokens", "error", **self._at_every_length(method, inputs))

    def _at_every_length(self, method: str, inputs: str) -> dict[str, Any]:
        count = 1 if method in ("ra", MEAN) else self.setting("samples_of_lengths")
        return {"estimator": method, "inputs": inputs, "samples": count}

    def cost(self, method: str, name: str) -> dict[int, Value]:
        """Return seconds or bytes against tokens."""
        return self.curve("tokens", name, estimator=method)
