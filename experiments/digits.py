"""Image classification: a small vision transformer on scikit-learn's digits, a token a pixel."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .runs import Mechanism, Run

if TYPE_CHECKING:
    from .runs import Say

NAME = "digits"
LIBRARIES = ("torch", "jax")
SEEDS = 3

# Eight samples, landmarks or groups for 64 pixels; a window is a row of the picture.
_LEARNED = {"learned_landmarks": True}
MECHANISMS = {
    "softmax": Mechanism("softmax_attention"),
    "rfa": Mechanism("rfa", {"num_samples": 8}),
    "ra": Mechanism("ra", {"num_samples": 1}),
    "lara": Mechanism("lara", {"num_landmarks": 8}, _LEARNED),
    "eva": Mechanism("eva", {"num_groups": 8, "window": 8}, {**_LEARNED, "relative_bias": True}),
}
SMALL: dict[str, Any] = {
    "features": 48,
    "heads": 4,
    "depth": 2,
    "tokens": 64,
    "classes": 10,
    "batch": 64,
    "epochs": 20,
    "rate": 4e-3,
    "weight_decay": 0.05,
    "warm_up": 40,
}
LARGE = SMALL | {"features": 192, "depth": 6, "epochs": 100, "rate": 1e-3}


def runs(device: str, settings: dict[str, Any] | None = None) -> list[Run]:
    """Return the runs: every mechanism in both libraries from three seeds."""
    settings = settings or (SMALL if device == "cpu" else LARGE)
    return [
        Run(NAME, library, method, seed, device, settings | {"mechanism": asdict(MECHANISMS[method])})
        for seed in range(SEEDS)
        for library in LIBRARIES
        for method in MECHANISMS
    ]


def work(run: Run, say: Say) -> dict[str, Any]:
    """Train, and return the share of the test's pictures that is classified right."""
    if run.library == "torch":
        from .digits_torch import train
    else:
        from .digits_jax import train
    return train(run, MECHANISMS[run.method], say)


def read_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Read pixels (B, 64) of mean 0 and deviation 1, and classes: those to train on, 360 to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    pixels = ((pixels - pixels.mean()) / pixels.std()).astype(np.float32)
    split = train_test_split(
        pixels, classes.astype(np.int32), test_size=360, random_state=0, stratify=classes
    )
    return (split[0], split[2]), (split[1], split[3])


def batches(number: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return an epoch's pictures in their order, batch by batch, without the last ones that fill no batch."""
    order = rng.permutation(number)
    return [order[at : at + size] for at in range(0, number - size + 1, size)]
