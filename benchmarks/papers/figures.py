"""The papers' figures: error against samples and against length, time and memory against length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from randattn import eva, lara, ra, rfa, softmax_attention
from randattn.cli._files import read_sample

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
# What the papers draw, and what trained models attend to: the embedded sample.
GAUSSIAN, REAL = "standard normal", "trained models'"
REAL_TOKENS = 512

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
LARGE = SMALL | {
    "samples": [2, 4, 8, 16, 32, 64, 128, 256],
    "tokens": 2048,
    "lengths": [64, 256, 1024, 4096, 16_384],
    "timed": [256, 1024, 4096, 16_384, 65_536, 262_144],
    "timed_quadratic": 16_384,
}
# As many samples, landmarks, or groups and tokens of a window.
ESTIMATES: dict[str, Callable[..., Array]] = {
    "rfa": lambda q, k, v, count, **own: rfa(q, k, v, num_samples=count, **own),
    "ra": lambda q, k, v, count, **own: ra(q, k, v, num_samples=count, **own),
    "lara": lambda q, k, v, count, **own: lara(q, k, v, num_landmarks=count, **own),
    "eva": lambda q, k, v, count, **own: eva(q, k, v, num_groups=count, window=count, **own),
}
# Of the same features, landmarks, groups and window.
TIMED = (
    ("rfa", ""),
    ("lara", ""),
    ("eva", "window=64"),
    ("ra", ""),
)


def tokens_of(inputs: str, settings: dict[str, Any]) -> int:
    """How many tokens errors against samples are of."""
    return min(settings["tokens"], REAL_TOKENS) if inputs == REAL else int(settings["tokens"])


def runs(device: str, settings: dict[str, Any] | None = None) -> list[Run]:
    """Every estimator's errors, and all their costs together, three times."""
    settings = settings or (SMALL if device == "cpu" else LARGE)
    return [
        Run(NAME, "torch", method, seed, device, settings)
        for seed in range(SEEDS)
        for method in (*ESTIMATES, MEAN, COSTS)
    ]


def work(run: Run, say: Say) -> dict[str, Any]:
    """The points of one estimator's curves, or of all the costs'."""
    points = _costs(run, say) if run.method == COSTS else _errors(run, say)
    return {"points": list(points)}


def _errors(run: Run, say: Say) -> Iterator[dict[str, Any]]:
    settings = run.settings
    counts = settings["ra_samples"] if run.method == "ra" else settings["samples"]
    most = 1 if run.method == "ra" else settings["samples_of_lengths"]
    plan = [(kind, tokens_of(kind, settings), count) for kind in (GAUSSIAN, REAL) for count in counts]
    plan += [(kind, tokens, most) for kind in (GAUSSIAN, REAL) for tokens in settings["lengths"]]
    if run.method == MEAN:
        plan = [(kind, tokens, 1) for kind, tokens, _ in plan]
    plan = list(dict.fromkeys(plan))
    for number, (kind, tokens, count) in enumerate(plan):
        say(number, len(plan), f"{kind}, {tokens} tokens, {count} samples")
        found = _inputs(kind, run, tokens)
        if found is None:
            continue
        q, k, v, scale = found
        exact = softmax_attention(q, k, v, scale=scale)
        if run.method == MEAN:
            out = v.mean(-2, keepdim=True) + 0 * exact
        else:
            out = ESTIMATES[run.method](q, k, v, count, scale=scale, rng=run.seed)
        lost = ((out - exact) ** 2).sum((-1, -2)) / (exact**2).sum((-1, -2))
        error = float(lost.sqrt().mean())
        yield {"inputs": kind, "tokens": tokens, "samples": count, "error": float(f"{error:.4g}")}


def _inputs(kind: str, run: Run, tokens: int) -> Inputs | None:
    """Queries, keys, values and a scale in float64; None where there are not as many real ones."""
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
    from benchmarks.estimators import Workbench, case_of
    from benchmarks.harness import best, race
    from benchmarks.libraries import open_library
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
        times = race(calls, wait=library.wait, rounds=settings["rounds"], sets=1)
        for name, case in cases.items():
            found = memory_row(case)
            memory = None if found is None else found.bytes
            seconds = float(f"{best(times[name]):.4g}")
            yield {"estimator": name, "tokens": tokens, "seconds": seconds, "bytes": memory}
