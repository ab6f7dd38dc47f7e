"""Errors of the estimators against exact attention and their costs, on inputs of trained models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from randattn import adaptive_eva, eva, lara, multiply_adds, ra, rfa, softmax_attention
from randattn.cli.files import read_sample

from . import model as models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SEEDS = 3
MEAN, TRUE_TOP, EXACT = "mean(V)", "true top keys", "exact"
SAMPLE, MODEL = "sample", "model"


@dataclass(frozen=True)
class Entry:
    """An estimator with its options, as a point of a curve."""

    curve: str
    estimator: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    is_random: bool = True


@dataclass(frozen=True)
class Point:
    """A measurement of an entry.

    Attributes
    ----------
    inputs : {"sample", "model"}
    curve, options : str
    share : float or None
        Multiply-adds over exact attention's; None for a reference that is no estimator.
    error : float
        ``|out - exact| / |exact|`` of a layer, mean over layers, texts and seeds.
    deviation : float
        Standard deviation over seeds; 0 for an estimator without draws.
    similarity, least_similarity : float or None
        Cosine of the model's embeddings with its own, mean over texts and seeds, and the least.
    """

    inputs: str
    curve: str
    options: str
    share: float | None
    error: float
    deviation: float
    similarity: float | None = None
    least_similarity: float | None = None


def entries() -> Iterator[Entry]:
    """Yield the compared estimators with their options, cheap ones first."""
    for count in (16, 32, 64, 128, 256):
        yield Entry("rfa", rfa, {"num_samples": count})
    yield Entry("ra", ra, {"num_samples": 1})
    for count in (16, 32, 64, 128):
        yield Entry("lara", lara, {"num_landmarks": count})
    published = {"group_weight": "unit", "disjoint": False, "window": 32}
    for count in (8, 16, 32, 64):
        yield Entry("eva as published", eva, {"num_groups": count, **published})
    for count in (8, 16, 32, 64):
        yield Entry("eva", eva, {"num_groups": count, "window": 32})
    for group_size, num_exact, block_size in (
        (32, 24, 8),
        (32, 48, 8),
        (32, 64, 8),
        (32, 96, 8),
        (32, 128, 8),
        (32, 128, 4),
        (32, 192, 8),
        (32, 192, 4),
    ):
        chosen = {"group_size": group_size, "num_exact": num_exact, "block_size": block_size}
        yield Entry("adaptive_eva", adaptive_eva, chosen, is_random=False)


def measure(*, with_model: bool, say: Callable[[str], None]) -> Iterator[Point]:
    """Measure every entry on the sample, then with the model."""
    sample = read_sample()
    arrays = [np.asarray(x, dtype=np.float64) for x in (sample.q, sample.k, sample.v)]
    yield from _of_inputs(SAMPLE, [tuple(arrays)], sample.scale, say)
    if not with_model:
        return
    model, texts = models.read_model(), models.read_texts()
    captured: list[tuple[np.ndarray, ...]] = []
    own = {}

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        layers.append((q, k, v))
        return np.asarray(softmax_attention(q, k, v))

    for name, tokens in texts.items():
        layers: list[tuple[np.ndarray, ...]] = []
        own[name] = model.embedding(tokens, attention)
        captured.append(tuple(np.stack(one) for one in zip(*layers, strict=True)))
    yield from _of_inputs(MODEL, captured, None, say, model=model, texts=texts, own=own)


def _of_inputs(
    name: str,
    inputs: list[tuple[np.ndarray, ...]],
    scale: float | None,
    say: Callable[[str], None],
    **whole: Any,
) -> Iterator[Point]:
    exact = [np.asarray(softmax_attention(*x, scale=scale)) for x in inputs]
    for curve, options, function in _references(scale):
        say(f"{name}: {curve} {options}")
        errors = [_error(function(*x), one) for x, one in zip(inputs, exact, strict=True)]
        like = _similarities(lambda q, k, v, _, f=function: f(q, k, v), 1, **whole) if whole else (None, None)
        yield Point(name, curve, options, None, float(np.mean(errors)), 0.0, *like)
    (_, n, d), e = inputs[0][0].shape[-3:], inputs[0][2].shape[-1]
    for entry in entries():
        options = ", ".join(f"{key}={value}" for key, value in entry.options.items())
        say(f"{name}: {entry.curve} {options}")

        def call(q: Any, k: Any, v: Any, seed: int, entry: Entry = entry) -> np.ndarray:
            draws = {"rng": seed} if entry.is_random else {}
            return np.asarray(entry.estimator(q, k, v, scale=scale, **draws, **entry.options))

        seeds = SEEDS if entry.is_random else 1
        by_seed = [
            np.mean([_error(call(*x, seed), one) for x, one in zip(inputs, exact, strict=True)])
            for seed in range(seeds)
        ]
        share = multiply_adds(entry.estimator, n, n, d, e, **entry.options) / (n * n * (d + e))
        like = _similarities(call, seeds, **whole) if whole else (None, None)
        yield Point(name, entry.curve, options, share, float(np.mean(by_seed)), float(np.std(by_seed)), *like)


def _references(scale: float | None) -> Iterator[tuple[str, str, Callable[..., np.ndarray]]]:
    def mean(q: np.ndarray, _: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.broadcast_to(v.mean(axis=-2, keepdims=True), (*q.shape[:-1], v.shape[-1]))

    yield MEAN, "", mean
    for share in (0.0625, 0.125, 0.25, 0.5):

        def top(q: np.ndarray, k: np.ndarray, v: np.ndarray, share: float = share) -> np.ndarray:
            logits = q @ np.swapaxes(k, -1, -2) * (scale or q.shape[-1] ** -0.5)
            number = round(share * k.shape[-2])
            least = np.partition(logits, -number, axis=-1)[..., -number, None]
            logits = np.where(logits >= least, logits, -np.inf)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)

        yield TRUE_TOP, f"{share:g} of the keys", top


def _error(out: np.ndarray, exact: np.ndarray) -> float:
    """Return the relative error of a layer (axis 0), averaged over layers."""
    axes = tuple(range(1, exact.ndim))
    lost = np.sqrt(((out - exact) ** 2).sum(axis=axes)) / np.sqrt((exact**2).sum(axis=axes))
    return float(lost.mean())


def _similarities(
    call: Callable[..., np.ndarray], seeds: int, *, model: models.Model, texts: Any, own: Any
) -> tuple[float, float]:
    """Return the mean and the least similarity over texts and seeds."""
    found = [
        float(model.embedding(tokens, lambda q, k, v, seed=seed: call(q, k, v, seed)) @ own[name])
        for name, tokens in texts.items()
        for seed in range(seeds)
    ]
    return float(np.mean(found)), min(found)


def table(points: list[Point]) -> Table:
    """Return a table of the points, ordered by input."""
    found = Table("inputs", "estimator", "options", "of exact's multiply-adds", "error", "similarity (least)")
    for point in points:
        share = "" if point.share is None else f"{point.share:.3f}"
        spread = f" ± {point.deviation:.3f}" if point.deviation else ""
        like = "" if point.similarity is None else f"{point.similarity:.4f} ({point.least_similarity:.4f})"
        found.add_row(point.inputs, point.curve, point.options, share, f"{point.error:.3f}{spread}", like)
    return found


def write(path: Path, about: dict[str, Any], points: list[Point]) -> None:
    """Write the file that is committed."""
    rows = [{key: _short(value) for key, value in asdict(point).items()} for point in points]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "points": rows}, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[Point]:
    """Read a file that `write` wrote."""
    return [Point(**row) for row in json.loads(path.read_text(encoding="utf-8"))["points"]]


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
