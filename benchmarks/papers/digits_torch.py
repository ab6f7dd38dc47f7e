"""The digits' training, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from .digits import batches, read_digits
from .models_torch import Classifier, Trainer

if TYPE_CHECKING:
    from .runs import Mechanism, Run, Say


def train(run: Run, mechanism: Mechanism, say: Say) -> dict[str, float]:
    """Train one model."""
    settings, rng = run.settings, np.random.default_rng(run.seed)
    torch.manual_seed(run.seed)
    (pixels, classes), test = (
        tuple(torch.as_tensor(x, device=run.device) for x in half) for half in read_digits()
    )
    model = Classifier(settings, mechanism).to(run.device)
    epochs, size = settings["epochs"], settings["batch"]
    trainer = Trainer(model, settings, epochs * (len(pixels) // size))
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        for index in batches(len(pixels), size, rng):
            loss = functional.cross_entropy(model(pixels[index]), classes[index].long())
            trainer.step(loss)
        model.eval()
        with torch.no_grad():
            accuracy = float((model(test[0]).argmax(-1) == test[1]).double().mean())
        say(epoch + 1, epochs, f"accuracy {accuracy:.3f}")
    return {"accuracy": round(accuracy, 6), "loss": round(float(loss.detach()), 6)}
