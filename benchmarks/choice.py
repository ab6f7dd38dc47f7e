"""The choice of an estimator in a picture: error against time, on the inputs of a language model."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from randattn import adaptive_eva, eva, lara, rfa
from randattn._estimators.registry import ESTIMATORS

from .language_model import LanguageModel, exact_attention, texts
from .plots import RC
from .plots_trained import log_scales
from .trained import HELD_OUT, mean_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LENGTHS = (2048, 8192)
MEAN = "mean(V)"
_MARKERS = dict(zip(LENGTHS, "os", strict=True))
_ROUNDS = 5  # rounds of calls in turn, whose medians count


class Choice(NamedTuple):
    """The relative error of an estimator, a mean over heads and layers, and its time over exact attention."""

    tokens: int
    estimator: str
    options: str
    error: float
    time: float


def calls(tokens: int) -> dict[tuple[str, str], Callable[..., torch.Tensor]]:
    """Return causal calls by the estimator and its options."""
    given: list[tuple[Any, dict[str, Any]]] = [
        # Without options a call of 2,048 tokens would be exact attention.
        (adaptive_eva, {} if tokens > 4096 else {"num_exact": tokens // 16}),
        (adaptive_eva, {"exact_heads": 0, **({} if tokens > 4096 else {"num_exact": tokens // 16})}),
        *((eva, {"window": size, "group_size": 16}) for size in (128, 512)),
        *((lara, {"num_landmarks": count, "window": 128}) for count in (64, 256)),
        *((rfa, {"num_samples": count, "rng": 0}) for count in (64, 256)),
    ]
    return {
        (function.__name__, ", ".join(f"{name}={value}" for name, value in options.items())): partial(
            function, is_causal=True, enable_gqa=True, **options
        )
        for function, options in given
    }


def measure(say: Callable[[str], None]) -> Iterator[Choice]:
    """Measure all calls on the inputs of three layers, by PyTorch."""
    model, layers = LanguageModel(), HELD_OUT[::2]
    text = texts()["language reference"]
    for tokens in LENGTHS:
        say(f"capture {tokens} tokens")
        inputs = model.capture(model.tokens(text, tokens), layers)
        found = calls(tokens)
        errors: dict[tuple[str, str], list[float]] = {key: [] for key in (*found, (MEAN, ""))}
        for qkv in inputs.values():
            exact = exact_attention(0, *qkv)
            for key, call in found.items():
                say(f"{tokens} tokens: {' '.join(key)}")
                errors[key].append(mean_error(call(*qkv).numpy(), exact.numpy()))
            errors[MEAN, ""].append(mean_error(_mean_so_far(*qkv).numpy(), exact.numpy()))
        times = _times(partial(exact_attention, 0), found, next(iter(inputs.values())))
        for key, each in errors.items():
            mean = sum(each) / len(each)
            yield Choice(tokens, *key, *(float(f"{x:.3g}") for x in (mean, times.get(key, 0.0))))


def _times(
    exact: Callable[..., Any], found: dict[tuple[str, str], Callable[..., Any]], qkv: tuple[Any, ...]
) -> dict[tuple[str, str], float]:
    """Return the median time of each call over that of exact attention, in turn."""
    everything = {("", ""): exact, **found}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in everything}
    for _ in range(_ROUNDS):
        for key, call in everything.items():
            start = time.perf_counter()
            call(*qkv)
            times[key].append(time.perf_counter() - start)
    medians = {key: sorted(each)[_ROUNDS // 2] for key, each in times.items()}
    return {key: medians[key] / medians["", ""] for key in found}


def _mean_so_far(q: torch.Tensor, _: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values up to each query: the trivial answer."""
    so_far = torch.arange(1, v.shape[-2] + 1, dtype=v.dtype)[:, None]
    return (v.cumsum(-2) / so_far).repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def draw(rows: list[Choice], folder: Path) -> Path:
    """Draw error against time over exact attention; the best corner is at the lower left."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(8.6, 5), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row.estimator for row in rows if row.estimator != MEAN):
            colour = ESTIMATORS[name].colour
            axes.plot([], [], "o", color=colour, label=name)
            for tokens, marker in _MARKERS.items():
                own = sorted((row.time, row.error) for row in rows if row[:2] == (tokens, name))
                axes.plot(*zip(*own, strict=True), f"{marker}-", color=colour, markersize=7, linewidth=1)
        for tokens, marker in _MARKERS.items():
            axes.plot([], [], marker, color="#6E6E6E", label=f"{tokens:,} tokens")
        trivial = min(row.error for row in rows if row.estimator == MEAN)
        axes.axhline(trivial, color="#6E6E6E", linewidth=1.2, linestyle=":", label=MEAN)
        log_scales(axes, (0.2, 0.5, 1, 2))
        errors = (0.02, 0.05, 0.1, 0.2, 0.5, 1)
        axes.set_yticks(errors, list(map(str, errors)))
        axes.set_yticks([], minor=True)
        axes.set_xlabel("time over PyTorch's exact kernel (dashed: as fast)")
        axes.set_ylabel("relative error")
        axes.set_title("Attention of a language model trained with softmax")
        axes.legend(loc="lower left", fontsize=9)
        path = folder / "choice.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
