"""What the papers claim, held to what was measured here: each verdict is computed from the results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from scipy.stats import t as student

from .figures import COSTS, GAUSSIAN, MEAN, REAL, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .runs import Done

    Judge = Callable[["Results"], "Verdict"]

LARA_PAPER = "Linear Complexity Randomized Self-attention Mechanism"
EVA_PAPER = "Efficient Attention via Control Variates"


@dataclass(frozen=True)
class Value:
    """A mean over seeds, and the half width of its 95% interval."""

    mean: float
    half: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        """Of one value for each seed."""
        number = len(values)
        if number < 2:
            return cls(mean(values), math.inf, number)
        quantile = float(student.ppf(0.975, number - 1))
        return cls(mean(values), quantile * stdev(values) / math.sqrt(number), number)

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half:.1g}" if math.isfinite(self.half) else f"{self.mean:.3g}"


@dataclass(frozen=True)
class Verdict:
    """How a claim fares: "confirmed", "partly" or "not confirmed", and by which numbers."""

    word: str
    evidence: str


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper and how it is judged: by `judge`, which `rule` says in words."""

    text: str
    paper: str
    rule: str
    judge: Judge


class Results:
    """The runs of all experiments, asked for by what was measured."""

    def __init__(self, done: Sequence[Done]) -> None:
        self._done = done

    def has(self, experiment: str) -> bool:
        """Whether an experiment was run."""
        return any(one.run.experiment == experiment for one in self._done)

    def trained(self, experiment: str, method: str, name: str, library: str = "torch") -> Value:
        """A number of trained models."""
        return Value.of(
            [
                one.found[name]
                for one in self._done
                if (one.run.experiment, one.run.method, one.run.library) == (experiment, method, library)
            ]
        )

    def points(self, method: str, **at: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """A figure's points with their seeds, of one estimator, or of the costs."""
        for one in self._done:
            if one.run.experiment == "figures" and one.run.method == method:
                for point in one.found["points"]:
                    if all(point[name] == value for name, value in at.items()):
                        yield one.run.seed, point

    def curve(self, method: str, along: str, name: str, **at: Any) -> dict[int, Value]:
        """One number against samples or tokens."""
        found: dict[int, list[float]] = {}
        for _, point in self.points(method, **at):
            if point[name] is not None:
                found.setdefault(point[along], []).append(point[name])
        return {where: Value.of(values) for where, values in sorted(found.items())}

    def setting(self, name: str) -> Any:
        """Of the figures."""
        return next(one.run.settings[name] for one in self._done if one.run.experiment == "figures")

    def tokens(self, inputs: str) -> int:
        """The length that errors against samples are of."""
        settings = next(one.run.settings for one in self._done if one.run.experiment == "figures")
        return tokens_of(inputs, settings)

    def against_samples(self, method: str, inputs: str) -> dict[int, Value]:
        """Errors at one length."""
        return self.curve(method, "samples", "error", inputs=inputs, tokens=self.tokens(inputs))

    def trivial(self, inputs: str) -> Value:
        """The error of mean(V) at that length."""
        return self.against_length(MEAN, inputs)[self.tokens(inputs)]

    def against_length(self, method: str, inputs: str) -> dict[int, Value]:
        """Errors of as many samples at every length: of one sample for ra."""
        count = 1 if method in ("ra", MEAN) else self.setting("samples_of_lengths")
        return self.curve(method, "tokens", "error", inputs=inputs, samples=count)

    def cost(self, method: str, name: str) -> dict[int, Value]:
        """Seconds or bytes against tokens."""
        return self.curve(COSTS, "tokens", name, estimator=method)


def _by_limits(worst: float, full: float, part: float, evidence: str) -> Verdict:
    word = "confirmed" if worst <= full else "partly" if worst <= part else "not confirmed"
    return Verdict(word, evidence)


def _both(first: Verdict, second: Verdict) -> Verdict:
    """Of two kinds of inputs, or two libraries."""
    words = {first.word, second.word}
    word = words.pop() if len(words) == 1 else "partly"
    return Verdict(word, f"{first.evidence}; {second.evidence}")


def _far_below_rfa(results: Results) -> Verdict:
    def of(inputs: str) -> Verdict:
        lara, rfa = (results.against_samples(name, inputs) for name in ("lara", "rfa"))
        ratios = {count: lara[count].mean / rfa[count].mean for count in lara if count in rfa}
        least, most = min(ratios.values()), max(ratios.values())
        return _by_limits(most, 0.5, 0.95, f"{inputs} inputs: {least:.2f} to {most:.2f} of RFA's error")

    return _both(of(GAUSSIAN), of(REAL))


def _near_ra(results: Results) -> Verdict:
    def of(inputs: str) -> Verdict:
        lara, ra = (results.against_samples(name, inputs) for name in ("lara", "ra"))
        shared = [count for count in lara if count in ra]
        ratios = [lara[count].mean / ra[count].mean for count in shared]
        evidence = (
            f"{inputs} inputs: {min(ratios):.2f} to {max(ratios):.2f} of RA's error "
            f"at {shared[0]} to {shared[-1]} samples"
        )
        return _by_limits(max(ratios), 1.25, 2.0, evidence)

    return _both(of(GAUSSIAN), of(REAL))


def _good_below_32(results: Results) -> Verdict:
    def of(inputs: str) -> Verdict:
        lara = results.against_samples("lara", inputs)
        count = max(count for count in lara if count < 32)
        trivial = results.trivial(inputs)
        evidence = f"{inputs} inputs: error {lara[count]} at {count} samples, of mean(V) {trivial.mean:.3g}"
        return _by_limits(lara[count].mean / trivial.mean, 0.5, 0.95, evidence)

    return _both(of(GAUSSIAN), of(REAL))


def _scales_with_length(results: Results) -> Verdict:
    def of(inputs: str) -> Verdict:
        grown = []
        for name in ("lara", "rfa"):
            curve = results.against_length(name, inputs)
            # Shorter than this, every landmark is a key.
            lengths = [tokens for tokens in curve if tokens > 2 * results.setting("samples_of_lengths")]
            grown.append(curve[lengths[-1]].mean / curve[lengths[0]].mean)
        lara, rfa = grown
        evidence = (
            f"{inputs} inputs, {lengths[0]} to {lengths[-1]} tokens: LARA {lara:.2f} times, RFA {rfa:.2f}"
        )
        return _by_limits(lara / rfa, 0.95, 1.05, evidence)

    return _both(of(GAUSSIAN), of(REAL))


def _small_factor(name: str, unit: str) -> Judge:
    def judge(results: Results) -> Verdict:
        lara, rfa = (results.cost(method, name) for method in ("lara", "rfa"))
        ratios = {tokens: lara[tokens].mean / rfa[tokens].mean for tokens in lara}
        evidence = ", ".join(f"{ratio:.2f} at {tokens}" for tokens, ratio in ratios.items())
        return _by_limits(max(ratios.values()), 2.5, 4, f"LARA's {unit} over RFA's: {evidence} tokens")

    return judge


def _above(
    experiment: str, name: str, better: str, worse: str, *, less: bool = False, library: str = "torch"
) -> Judge:
    """One trained model before another: by more than both intervals, or by less."""

    def judge(results: Results) -> Verdict:
        one, other = (results.trained(experiment, method, name, library) for method in (better, worse))
        margin = (other.mean - one.mean) if less else (one.mean - other.mean)
        sure = math.hypot(one.half, other.half)
        word = "confirmed" if margin > sure else "not confirmed" if margin <= 0 else "partly"
        return Verdict(word, f"{better} {one}, {worse} {other}")

    return judge


def _close(
    experiment: str, name: str, method: str, share: float, *, less: bool = False, library: str = "torch"
) -> Judge:
    """A trained model that loses at most a share to the one of softmax, both intervals included."""

    def judge(results: Results) -> Verdict:
        own, exact = (results.trained(experiment, one, name, library) for one in (method, "softmax"))
        lost = (own.mean - exact.mean) if less else (exact.mean - own.mean)
        sure = math.hypot(own.half, exact.half)
        most = share * exact.mean
        word = "confirmed" if lost + sure <= most else "not confirmed" if lost - sure > most else "partly"
        return Verdict(word, f"{method} {own}, softmax {exact}")

    return judge


def _in_both(judge: Callable[..., Judge], *args: Any) -> Judge:
    """By PyTorch's and by JAX's models."""

    def both(results: Results) -> Verdict:
        first, second = (judge(*args, library=library)(results) for library in ("torch", "jax"))
        return _both(
            Verdict(first.word, f"PyTorch: {first.evidence}"), Verdict(second.word, f"JAX: {second.evidence}")
        )

    return both


_SURE = "by more than both intervals; partly: by less"


def _near(share: float) -> str:
    return f"loses at most {share:.0%}, intervals included; not: more, intervals taken off"


def _figure(full: float, part: float, what: str) -> str:
    return f"{what} at most {full:g} at every point; partly: {part:g}, or on one kind of inputs"


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "figures": (
        Claim(
            "LARA's error is far below RFA's at as many samples",
            LARA_PAPER,
            _figure(0.5, 0.95, "of RFA's error"),
            _far_below_rfa,
        ),
        Claim("LARA is near RA, which costs S N M", LARA_PAPER, _figure(1.25, 2, "of RA's error"), _near_ra),
        Claim(
            "LARA is good already below 32 samples",
            LARA_PAPER,
            _figure(0.5, 0.95, "of mean(V)'s error"),
            _good_below_32,
        ),
        Claim(
            "LARA's error grows less with the length than RFA's",
            LARA_PAPER,
            _figure(0.95, 1.05, "its growth over RFA's"),
            _scales_with_length,
        ),
        Claim(
            "LARA runs within a small factor of RFA's time",
            LARA_PAPER,
            _figure(2.5, 4, "of RFA's time"),
            _small_factor("seconds", "time"),
        ),
        Claim(
            "and of its memory",
            LARA_PAPER,
            _figure(2.5, 4, "of RFA's memory"),
            _small_factor("bytes", "memory"),
        ),
    ),
    "digits": (
        Claim(
            "LARA classifies better than RFA",
            LARA_PAPER,
            _SURE,
            _in_both(_above, "digits", "accuracy", "lara", "rfa"),
        ),
        Claim(
            "RA classifies as well as softmax",
            LARA_PAPER,
            _near(0.02),
            _in_both(_close, "digits", "accuracy", "ra", 0.02),
        ),
        Claim(
            "EVA classifies better than LARA",
            EVA_PAPER,
            _SURE,
            _in_both(_above, "digits", "accuracy", "eva", "lara"),
        ),
        Claim(
            "EVA classifies as well as softmax",
            EVA_PAPER,
            _near(0.02),
            _in_both(_close, "digits", "accuracy", "eva", 0.02),
        ),
    ),
    "translation": (
        Claim(
            "LARA translates better than RFA",
            LARA_PAPER,
            _SURE,
            _above("translation", "bleu", "lara", "rfa"),
        ),
        Claim(
            "RA translates as well as softmax",
            LARA_PAPER,
            _near(0.05),
            _close("translation", "bleu", "ra", 0.05),
        ),
        Claim(
            "EVA translates better than LARA",
            EVA_PAPER,
            _SURE,
            _above("translation", "bleu", "eva", "lara"),
        ),
        Claim(
            "EVA translates as well as softmax",
            EVA_PAPER,
            _near(0.05),
            _close("translation", "bleu", "eva", 0.05),
        ),
    ),
    "language": (
        Claim(
            "EVA needs fewer bits than RFA",
            EVA_PAPER,
            _SURE,
            _above("language", "sources", "eva", "rfa", less=True),
        ),
        Claim(
            "EVA needs as few bits as softmax",
            EVA_PAPER,
            _near(0.02),
            _close("language", "sources", "eva", 0.02, less=True),
        ),
    ),
}
