"""The papers' claims: each verdict is computed from the results measured here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .figures import INPUTS
from .results import Results, Value

if TYPE_CHECKING:
    from collections.abc import Callable

    Measure = Callable[[Results], "Measured"]

LARA_PAPER, EVA_PAPER = "LARA", "EVA"


class Measured(NamedTuple):
    """The number that a rule judges, and the sentence that reports it."""

    value: Value
    evidence: str


class Verdict(NamedTuple):
    """The verdict on a claim, "confirmed", "partly" or "not confirmed", and the numbers behind it."""

    word: str
    evidence: str


class Rule(Protocol):
    """A condition on a number; its string is the rule in words."""

    def word(self, value: Value) -> str:
        """Return the word of the verdict."""
        ...


def _word(is_confirmed: bool, is_in_part: bool) -> str:
    return "confirmed" if is_confirmed else "partly" if is_in_part else "not confirmed"


@dataclass(frozen=True)
class AtMost:
    """An upper bound of a ratio; of several ratios, the largest counts."""

    full: float
    part: float
    of: str

    def word(self, value: Value) -> str:
        """Judge by the mean."""
        return _word(value.mean <= self.full, value.mean <= self.part)

    def __str__(self) -> str:
        return f"at most {self.full:g} {self.of}; partly: {self.part:g}"


@dataclass(frozen=True)
class Ahead:
    """A margin above zero."""

    def word(self, value: Value) -> str:
        """Judge by the mean and the interval."""
        return _word(value.mean > value.half, value.mean > 0)

    def __str__(self) -> str:
        return "by more than the intervals; partly: by less"


@dataclass(frozen=True)
class Near:
    """A margin that may be below zero by a share."""

    share: float

    def word(self, value: Value) -> str:
        """Judge by the ends of the interval."""
        return _word(value.mean - value.half >= -self.share, value.mean + value.half >= -self.share)

    def __str__(self) -> str:
        return f"loses at most {self.share:.0%}, intervals included; not: more, intervals taken off"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and the rule that its measures are held to."""

    text: str
    paper: str
    rule: Rule
    measures: tuple[Measure, ...]

    def judge(self, results: Results) -> Verdict:
        """Return one verdict of all measures: their common word, or "partly"."""
        measured = [measure(results) for measure in self.measures]
        words = {self.rule.word(one.value) for one in measured}
        word = words.pop() if len(words) == 1 else "partly"
        return Verdict(word, "; ".join(one.evidence for one in measured))


def _over(results: Results, other: str, inputs: str) -> Measured:
    """Return LARA's error over another estimator's with as many samples."""
    own, others = (results.against_samples(name, inputs) for name in ("lara", other))
    ratios = {count: own[count].mean / others[count].mean for count in own if count in others}
    least, most, (first, *_, last) = min(ratios.values()), max(ratios.values()), ratios
    evidence = f"{least:.2f} to {most:.2f} of {other.upper()}'s error at {first} to {last} samples"
    return Measured(Value.of([most]), evidence)


def _below_32(results: Results, inputs: str) -> Measured:
    lara = results.against_samples("lara", inputs)
    count = max(count for count in lara if count < 32)
    trivial = results.trivial(inputs).mean
    # An answer of zero errs by one.
    ratio = Value.of([lara[count].mean / min(trivial, 1)])
    return Measured(ratio, f"error {lara[count]} at {count} samples, of mean(V) {trivial:.3g}")


def _growth(results: Results, inputs: str) -> Measured:
    """Return the distance below one of LARA's growth over RFA's."""
    # In a shorter sequence, every landmark is one or two keys.
    least = 2 * results.setting("samples_of_lengths")
    lengths = [tokens for tokens in results.against_length("lara", inputs) if tokens > least]
    first, last = lengths[0], lengths[-1]
    lara, rfa = (results.growth(name, inputs, first, last) for name in ("lara", "rfa"))
    # With one seed both have the same queries, keys and values.
    ratio = Value.of([one / other for one, other in zip(lara, rfa, strict=True)])
    growths = f"LARA {mean(lara):.2f} times, RFA {mean(rfa):.2f}; their ratio {ratio}"
    return Measured(Value(1 - ratio.mean, ratio.half, ratio.number), f"{first} to {last} tokens: {growths}")


def _cost(results: Results, name: str, unit: str) -> Measured:
    lara, rfa = (results.cost(method, name) for method in ("lara", "rfa"))
    ratios = {tokens: lara[tokens].mean / rfa[tokens].mean for tokens in lara}
    evidence = ", ".join(f"{ratio:.2f} at {tokens}" for tokens, ratio in ratios.items())
    return Measured(Value.of([max(ratios.values())]), f"LARA's {unit} over RFA's: {evidence} tokens")


class _Score(NamedTuple):
    """A number of trained models, its library, and the sign of an improvement."""

    library: str
    title: str
    name: str
    sign: int = 1


_SCORES = {
    "digits": (_Score("torch", "PyTorch: ", "accuracy"), _Score("jax", "JAX: ", "accuracy")),
    "translation": (_Score("torch", "", "bleu"),),
    "language": (_Score("torch", "", "sources", -1),),
}


def _margin(results: Results, experiment: str, score: _Score, method: str, other: str) -> Measured:
    """Return the improvement on another model, as a share of its number."""
    one, two = (results.trained(experiment, name, score.name, score.library) for name in (method, other))
    margin, half = score.sign * (one.mean - two.mean), math.hypot(one.half, two.half)
    value = Value(margin / two.mean, half / two.mean, one.number)
    return Measured(value, f"{score.title}{method} {one}, {other} {two}")


def _on(inputs: str) -> tuple[Claim, ...]:
    """Return the claims about errors, for one kind of inputs."""

    def claim(text: str, rule: Rule, measure: Callable[..., Measured], **own: str) -> Claim:
        return Claim(f"{text} ({inputs} inputs)", LARA_PAPER, rule, (partial(measure, inputs=inputs, **own),))

    return (
        claim(
            "LARA's error is far below RFA's at as many samples",
            AtMost(0.5, 0.95, "of RFA's error at every number"),
            _over,
            other="rfa",
        ),
        claim(
            "LARA is near RA, which costs S N M",
            AtMost(1.25, 2, "of RA's error at every number"),
            _over,
            other="ra",
        ),
        claim(
            "LARA is good already below 32 samples",
            AtMost(0.5, 0.95, "of mean(V)'s error, or of one where that is more"),
            _below_32,
        ),
        claim("LARA's error grows less with the length than RFA's", Ahead(), _growth),
    )


def _costs(text: str, name: str, unit: str) -> Claim:
    rule = AtMost(2.5, 4, f"of RFA's {unit} at every length")
    return Claim(text, LARA_PAPER, rule, (partial(_cost, name=name, unit=unit),))


def _trained(experiment: str, text: str, paper: str, rule: Rule, method: str, other: str) -> Claim:
    measures = (
        partial(_margin, experiment=experiment, score=score, method=method, other=other)
        for score in _SCORES[experiment]
    )
    return Claim(text, paper, rule, tuple(measures))


def _of_models(experiment: str, verb: str, share: float) -> tuple[Claim, ...]:
    """Return both papers' claims about models that are trained with each attention."""
    claim = partial(_trained, experiment)
    return (
        claim(f"LARA {verb} better than RFA", LARA_PAPER, Ahead(), "lara", "rfa"),
        claim(f"RA {verb} as well as softmax", LARA_PAPER, Near(share), "ra", "softmax"),
        claim(f"EVA {verb} better than LARA", EVA_PAPER, Ahead(), "eva", "lara"),
        claim(f"EVA {verb} as well as softmax", EVA_PAPER, Near(share), "eva", "softmax"),
    )


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "figures": (
        *(claim for inputs in INPUTS for claim in _on(inputs)),
        _costs("LARA runs within a small factor of RFA's time", "seconds", "time"),
        _costs("and of its memory", "bytes", "memory"),
    ),
    "digits": _of_models("digits", "classifies", 0.02),
    "translation": _of_models("translation", "translates", 0.05),
    "language": (
        _trained("language", "EVA needs fewer bits than RFA", EVA_PAPER, Ahead(), "eva", "rfa"),
        _trained("language", "EVA needs as few bits as softmax", EVA_PAPER, Near(0.02), "eva", "softmax"),
    ),
}
