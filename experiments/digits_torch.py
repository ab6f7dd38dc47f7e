"""The digits' training, in PyTorch, and the inputs of a trained model's attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from randattn.integrations._layer import split_heads

from .digits import batches, read_digits
from .models_torch import Classifier, Trainer
from .runs import Mechanism

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .runs import Run, Say

    Half = tuple[torch.Tensor, torch.Tensor]


def train(run: Run, mechanism: Mechanism, say: Say) -> dict[str, float]:
    """Train one model."""
    rng = np.random.default_rng(run.seed)
    torch.manual_seed(run.seed)
    model = Classifier(run.settings, mechanism).to(run.device)
    return _fit(model, run.settings, *_halves(run.device), rng, say)


def attended(
    settings: dict[str, Any], stages: Iterable[tuple[int, int]], images: int, run: Run, say: Say
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor], float]]:
    """Yield the inputs of a model's exact attention, at the end of each stage of its training.

    Each stage goes on with larger pictures and interpolated places, as is usual for vision transformers.
    `stages` are sides of the pictures and epochs. A result is the side, queries, keys and values (layers,
    images, heads, side², features) of the test's first images, and the model's accuracy.
    """
    rng = np.random.default_rng(run.seed)
    torch.manual_seed(run.seed)
    model = Classifier(settings, Mechanism("softmax_attention")).to(run.device)
    for side, epochs in stages:
        train, test = ((_resized(pixels, side), classes) for pixels, classes in _halves(run.device))
        resize(model, side)
        found = _fit(model, settings | {"epochs": epochs}, train, test, rng, say)
        yield side, projected(model, test[0][:images]), found["accuracy"]


def resize(model: Classifier, side: int) -> None:
    """Interpolate a model's places (pixels, features) to pictures of `side` by `side` pixels."""
    model.stack.places = nn.Parameter(_resized(model.stack.places.detach().T, side).T.contiguous())


def projected(model: Classifier, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values (layers, images, heads, tokens, features) in float64."""
    seen: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    hooks = [
        getattr(block.attention, name).register_forward_hook(lambda *call, to=each: to.append(call[-1]))
        for block in model.stack.blocks
        for name, each in seen.items()
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    heads = model.stack.blocks[0].attention.num_heads
    q, k, v = (split_heads(torch.stack(each), heads).double() for each in seen.values())
    return q, k, v


def _halves(device: str) -> tuple[Half, Half]:
    train, test = (tuple(torch.as_tensor(x, device=device) for x in half) for half in read_digits())
    return train, test


def _resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize square pictures (B, pixels)."""
    images = pixels.unflatten(-1, (math.isqrt(pixels.shape[-1]), -1))[:, None]
    return functional.interpolate(images, (side, side), mode="bilinear").flatten(1)


def _fit(
    model: Classifier, settings: dict[str, Any], train: Half, test: Half, rng: np.random.Generator, say: Say
) -> dict[str, float]:
    """Train a model; return its accuracy and its last loss."""
    pixels, classes = train
    epochs, size = settings["epochs"], settings["batch"]
    trainer = Trainer(model, settings, epochs * (len(pixels) // size))
    # As many as memory holds: small pictures are all in one call, which is one draw of rfa and ra.
    at_once, accuracy = max(1, 2**15 // pixels.shape[-1]), 0.0
    for epoch in range(epochs):
        model.train()
        for index in batches(len(pixels), size, rng):
            loss = functional.cross_entropy(model(pixels[index]), classes[index].long())
            trainer.step(loss)
        model.eval()
        with torch.no_grad():
            guesses = torch.cat([model(some).argmax(-1) for some in test[0].split(at_once)])
        accuracy = float((guesses == test[1]).double().mean())
        say(epoch + 1, epochs, f"accuracy {accuracy:.3f}")
    return {"accuracy": round(accuracy, 6), "loss": round(float(loss.detach()), 6)}
