"""The papers' figures: error against samples and against length, time and memory against length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from randattn import eva, lara, ra, rfa, softmax_attention
from randattn.cli.files import read_sample

from . import digits
from .runs import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .runs import Say

    Array = Any
    Inputs = tuple[Array, Array, Array, float]

NAME = "figures"
SEEDS = 3
MEAN = "mean(V)"
COSTS = "time and memory"
# A kind that the papers train, at several resolutions (of digits that are enlarged: none has more detail
# than the first); the embedded sample; and inputs without any structure.
PICTURES, TEXT, GAUSSIAN = "vision model's", "text model's", "standard normal"
INPUTS = (PICTURES, TEXT, GAUSSIAN)
TEXT_TOKENS = 512

SMALL: dict[str, Any] = {
    "heads": 8,
    "features": 64,
    "samples": [2, 4, 8, 16, 32, 64, 128],
    "ra_samples": [1, 2, 4, 8, 16, 32],
    "tokens": 512,
    "lengths": [64, 128, 256, 512, 1024, 2048],
    "samples_of_lengths": 32,
    "timed": [256, 1024, 4096, 16_384],
    "timed_quadratic": 4096,
    "rounds": 3,
}


def _model(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without epochs, which belong to the stages."""
    return {name: value for name, value in settings.items() if name != "epochs"}


# Sides of the pictures and epochs, number of pictures, and the transformer.
_VISION: dict[str, Any] = {
    "stages": [[8, 30], [14, 10], [24, 6]],
    "pictures": 8,
    "model": _model(digits.SMALL) | {"features": 128, "heads": 2, "rate": 2e-3},
}
LARGE = SMALL | {
    "samples": [2, 4, 8, 16, 32, 64, 128, 256],
    "tokens": 2048,
    "lengths": [64, 256, 1024, 4096, 16_384],
    "timed": [256, 1024, 4096, 16_384, 65_536, 262_144],
    "timed_quadratic": 16_384,
}
_LARGE_VISION = {
    "stages": [[8, 100], [14, 50], [24, 50], [32, 50]],
    "pictures": 8,
    "model": _model(digits.LARGE) | {"heads": 3},
}
# One count for all: samples, landmarks, or groups and tokens of a window.
ESTIMATES: dict[str, Callable[..., Array]] = {
    "rfa": lambda q, k, v, count, **own: rfa(q, k, v, num_samples=count, **own),
    "ra": lambda q, k, v, count, **own: ra(q, k, v, num_samples=count, **own),
    "lara": lambda q, k, v, count, **own: lara(q, k, v, num_landmarks=count, **own),
    "eva": lambda q, k, v, count, **own: eva(q, k, v, num_groups=count, window=count, **own),
}
# All with the same number of features, landmarks, groups, and tokens of a window.
TIMED = (
    ("rfa", ""),
    ("lara", ""),
    ("eva", "window=64"),
    ("ra", ""),
)


def tokens_of(inputs: str, settings: dict[str, Any]) -> int:
    """Return the number of tokens of the errors against samples."""
    if inputs == PICTURES:
        return int(settings["stages"][-1][0] ** 2)
    return min(settings["tokens"], TEXT_TOKENS) if inputs == TEXT else int(settings["tokens"])


def runs(
    device: str, settings: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> list[Run]:
    """Return the runs: every estimator's errors, and all their costs together, three times."""
    settings = settings or (SMALL if device == "cpu" else LARGE)
    vision = vision or (_VISION if device == "cpu" else _LARGE_VISION)
    return [
        Run(NAME, "torch", method, seed, device, settings | (vision if method == PICTURES else {}))
        for seed in range(SEEDS)
        for method in (*ESTIMATES, MEAN, PICTURES, COSTS)
    ]


def work(run: Run, say: Say) -> dict[str, Any]:
    """Measure the points of one estimator's curves, of all curves on pictures, or of all costs."""
    points = {PICTURES: _on_pictures, COSTS: _costs}.get(run.method, _errors)
    return {"points": list(points(run, say))}


def _errors(run: Run, say: Say) -> Iterator[dict[str, Any]]:
    settings = run.settings
    plan = [
        (kind, tokens, count)
        for kind in (GAUSSIAN, TEXT)
        for tokens in dict.fromkeys((tokens_of(kind, settings), *settings["lengths"]))
        for count in _counts(run.method, settings, kind, tokens)
    ]
    for number, (kind, tokens, count) in enumerate(plan):
        say(number, len(plan), f"{kind}, {tokens} tokens, {count} samples")
        inputs = _inputs(kind, run, tokens)
        if inputs is not None:
            error = _error(run, run.method, count, inputs, _exact(inputs))
            yield {"inputs": kind, "tokens": tokens, "samples": count, "error": error}


def _on_pictures(run: Run, say: Say) -> Iterator[dict[str, Any]]:
    from .digits_torch import attended

    settings = run.settings
    stages = attended(settings["model"], settings["stages"], settings["pictures"], run, say)
    for side, qkv, accuracy in stages:
        inputs = (*qkv, qkv[0].shape[-1] ** -0.5)
        exact = _exact(inputs)
        yield {"estimator": "softmax", "inputs": PICTURES, "tokens": side**2, "accuracy": accuracy}
        for number, method in enumerate((*ESTIMATES, MEAN)):
            say(number, len(ESTIMATES) + 1, f"{side} by {side} pixels, {method}")
            # Landmarks, groups and windows are parts of the picture.
            own = {"grid": (side, side)} if method in ("lara", "eva") else {}
            for count in _counts(method, settings, PICTURES, side**2):
                error = _error(run, method, count, inputs, exact, **own)
                at = {"estimator": method, "inputs": PICTURES, "tokens": side**2}
                yield at | {"samples": count, "error": error}


def _counts(method: str, settings: dict[str, Any], inputs: str, tokens: int) -> list[int]:
    """Return numbers of samples: all of them at the length of the comparison, one at every other length."""
    if method == MEAN:
        return [1]
    one = 1 if method == "ra" else settings["samples_of_lengths"]
    every = settings["ra_samples" if method == "ra" else "samples"]
    return list(dict.fromkeys((*every, one))) if tokens == tokens_of(inputs, settings) else [one]


def _exact(inputs: Inputs) -> Array:
    q, k, v, scale = inputs
    return softmax_attention(q, k, v, scale=scale)


def _error(run: Run, method: str, count: int, inputs: Inputs, exact: Array, **own: Any) -> float:
    """Return the error relative to exact attention, the mean over all heads of all layers and pictures."""
    q, k, v, scale = inputs
    if method == MEAN:
        out = v.mean(-2, keepdim=True) + 0 * exact
    else:
        out = ESTIMATES[method](q, k, v, count, scale=scale, rng=run.seed, **own)
    lost = ((out - exact) ** 2).sum((-1, -2)) / (exact**2).sum((-1, -2))
    return float(f"{float(lost.sqrt().mean()):.4g}")


def _inputs(kind: str, run: Run, tokens: int) -> Inputs | None:
    """Return queries, keys, values and a scale in float64; None where the sample has too few tokens."""
    import torch

    if kind == GAUSSIAN:
        settings, rng = run.settings, np.random.default_rng((run.seed, tokens))
        arrays = rng.standard_normal((3, settings["heads"], tokens, settings["features"]))
        q, k, v = torch.as_tensor(arrays, device=run.device)
        return q, k, v, settings["features"] ** -0.5
    sample = read_sample()
    if tokens > sample.k.shape[-2]:
        return None
    q, k, v = (
        torch.as_tensor(x[..., :tokens, :], dtype=torch.float64, device=run.device)
        for x in (sample.q, sample.k, sample.v)
    )
    return q, k, v, sample.scale


def _costs(run: Run, say: Say) -> Iterator[dict[str, Any]]:
    from benchmarks.baselines import open_library
    from benchmarks.cases import Workbench, case_of
    from benchmarks.harness import best, race
    from benchmarks.memory import memory_row

    settings, library = run.settings, open_library("torch", run.device)
    sizes = {"heads": settings["heads"], "head_dim": settings["features"], "features": 64}
    for number, tokens in enumerate(settings["timed"]):
        say(number, len(settings["timed"]), f"{tokens} tokens")
        exact, timed = library.exact_name, (*TIMED, (library.exact_name, ""))
        cases = {
            "softmax" if name == exact else name: case_of(library, name, tokens, options, **sizes)
            for name, options in timed
            if tokens <= settings["timed_quadratic"] or name not in ("ra", exact)
        }
        bench = Workbench(library)
        calls = {name: bench.call(case) for name, case in cases.items()}
        times = race(calls, wait=library.own.wait, rounds=settings["rounds"], sets=1)
        for name, case in cases.items():
            found = memory_row(case)
            memory = None if found is None else found.bytes
            seconds = float(f"{best(times[name]):.4g}")
            yield {"estimator": name, "tokens": tokens, "seconds": seconds, "bytes": memory}
