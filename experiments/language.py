"""Language modelling: a causal model of the bytes of Python's own documentation and sources."""

from __future__ import annotations

import math
import pkgutil
import sysconfig
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .runs import Mechanism, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .runs import Say

NAME = "language"
SEEDS = 3

# For a text of 256 bytes: 64 features; a window of 32 and 16 groups of 16.
MECHANISMS = {
    "softmax": Mechanism("softmax_attention"),
    "rfa": Mechanism("rfa", {"num_samples": 64}),
    "eva": Mechanism(
        "eva", {"window": 32, "group_size": 16}, {"learned_landmarks": True, "relative_bias": True}
    ),
}
SMALL: dict[str, Any] = {
    "features": 96,
    "heads": 4,
    "depth": 2,
    "tokens": 256,
    "batch": 16,
    "steps": 400,
    "tested": 96,
    "rate": 4e-3,
    "weight_decay": 0.01,
    "warm_up": 50,
}
LARGE = SMALL | {
    "features": 384,
    "heads": 6,
    "depth": 8,
    "tokens": 1024,
    "batch": 32,
    "steps": 10_000,
    "tested": 512,
    "rate": 1e-3,
    "warm_up": 500,
}
# One document in this number is tested on.
_TESTED = 20
_LONG = 50
KINDS = ("documentation", "sources")


def runs(device: str, settings: dict[str, Any] | None = None) -> list[Run]:
    """Return the runs: every mechanism from three seeds."""
    settings = (settings or (SMALL if device == "cpu" else LARGE)) | {"text": fingerprint()}
    return [
        Run(NAME, "torch", method, seed, device, settings | {"mechanism": asdict(mechanism)})
        for seed in range(SEEDS)
        for method, mechanism in MECHANISMS.items()
    ]


def documents(kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield names and texts: the topics of `help()`, or the modules of the standard library."""
    if kind == "documentation":
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield name, topics[name].encode()
    else:
        folder = Path(sysconfig.get_path("stdlib"))
        names = sorted(found.name for found in pkgutil.iter_modules([str(folder)]))
        for name in names:
            path = folder / f"{name}.py"
            # A file that the build of Python wrote names the machine of the build.
            if path.is_file() and not name.startswith("_sysconfigdata"):
                yield name, path.read_bytes()


def read_text() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Read the bytes of the documents to train on, all in a row, and those of each kind to test on.

    A document that shares a long line with a tested one is left out of the training.
    """
    trained: list[bytes] = []
    tested: dict[str, list[bytes]] = {}
    for kind in KINDS:
        tested[kind] = []
        for name, text in documents(kind):
            is_tested = zlib.crc32(name.encode()) % _TESTED == 0
            (tested[kind] if is_tested else trained).append(text)
    # Documents repeat one another.
    known = {line for texts in tested.values() for text in texts for line in long_lines(text)}
    trained = [text for text in trained if not known.intersection(long_lines(text))]

    def joined(texts: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"\n".join(texts), dtype=np.uint8)

    return joined(trained), {kind: joined(texts) for kind, texts in tested.items()}


def long_lines(text: bytes) -> set[bytes]:
    """Return the lines of a text that are too long to be in two documents by chance."""
    return {line for line in map(bytes.strip, text.splitlines()) if len(line) >= _LONG}


def fingerprint() -> str:
    """Return a checksum that tells one Python's texts from another's."""
    text, tested = read_text()
    return f"{len(text)} bytes, {zlib.crc32(b''.join([text.tobytes(), *map(bytes, tested.values())])):08x}"


def windows(text: np.ndarray, length: int, number: int) -> np.ndarray:
    """Return stretches of ``length + 1`` bytes, evenly spread over a text: (at most `number`, length + 1)."""
    starts = np.arange(0, len(text) - length, length)
    starts = starts[np.linspace(0, len(starts) - 1, min(number, len(starts))).astype(int)]
    return text[starts[:, None] + np.arange(length + 1)]


def work(run: Run, say: Say) -> dict[str, Any]:
    """Train, and return the bits per byte of each kind of text."""
    import torch
    from torch.nn import functional

    from .models_torch import Language, Trainer

    settings, rng = run.settings, np.random.default_rng(run.seed)
    torch.manual_seed(run.seed)
    text, tested = read_text()
    model = Language(settings, MECHANISMS[run.method]).to(run.device)
    trainer = Trainer(model, settings, settings["steps"])
    length = settings["tokens"]

    def nats(rows: np.ndarray) -> torch.Tensor:
        tokens = torch.as_tensor(rows.astype(np.int64), device=run.device)
        return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    model.train()
    for step in range(settings["steps"]):
        starts = rng.integers(len(text) - length, size=settings["batch"])
        loss = nats(text[starts[:, None] + np.arange(length + 1)])
        trainer.step(loss)
        if step % 10 == 9:
            say(step + 1, settings["steps"], f"{float(loss.detach()) / math.log(2):.2f} bits")
    model.eval()
    bits = {}
    with torch.no_grad():
        for kind in KINDS:
            rows = windows(tested[kind], length, settings["tested"])
            parts = np.array_split(rows, math.ceil(len(rows) / settings["batch"]))
            total = sum(nats(part).item() * len(part) for part in parts)
            bits[kind] = round(total / len(rows) / math.log(2), 6)
    return bits
