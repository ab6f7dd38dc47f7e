"""The tables of the papers' experiments: the measurements, and the verdicts on the papers' claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .claims import CLAIMS
from .figures import INPUTS, MEAN
from .language import KINDS
from .results import Results

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .runs import Done

    Table = tuple[list[str], list[list[str]]]

EXPERIMENTS = tuple(CLAIMS)
_TRAINED = ("softmax", "rfa", "ra", "lara", "eva")


def claims(experiment: str, done: Sequence[Done]) -> Table:
    """Return a table of the claims, each with its verdict and the numbers behind it."""
    results, rows = Results(done), []
    for claim in CLAIMS[experiment]:
        verdict = claim.judge(results)
        rows.append([claim.text, verdict.word, verdict.evidence, str(claim.rule), claim.paper])
    return ["claim", "here", "measured", "confirmed where", "paper"], rows


def numbers(experiment: str, done: Sequence[Done]) -> Table:
    """Return a table of the measurements, mean ± half of the 95% interval over seeds."""
    results = Results(done)
    if experiment == "figures":
        return _errors(results)
    columns = {
        "digits": (("PyTorch", "torch", "accuracy"), ("JAX", "jax", "accuracy")),
        "translation": (("BLEU", "torch", "bleu"),),
        "language": tuple((f"bits per byte, {kind}", "torch", kind) for kind in KINDS),
    }[experiment]
    trained = [name for name in _TRAINED if any(one.run.method == name for one in done)]
    rows = [
        [method, *(str(results.trained(experiment, method, name, library)) for _, library, name in columns)]
        for method in trained
    ]
    return ["attention", *(label for label, *_ in columns)], rows


def _errors(results: Results) -> Table:
    rows: list[list[str]] = []
    for inputs in INPUTS:
        trivial = results.trivial(inputs)
        curves = {name: results.against_samples(name, inputs) for name in ("rfa", "ra", "lara", "eva")}
        counts = sorted(set[int]().union(*curves.values()))
        rows += [
            [
                inputs,
                str(count),
                *(str(curve[count]) if count in curve else "" for curve in curves.values()),
                f"{trivial.mean:.3g}",
            ]
            for count in counts
        ]
    return ["inputs", "samples", "rfa", "ra", "lara", "eva", MEAN], rows
