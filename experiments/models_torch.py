"""The models of the papers' experiments, for PyTorch: blocks of attention and of a perceptron."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from randattn.integrations.torch import Attention

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .runs import Mechanism

_EXACT: dict[str, Any] = {"estimator": "softmax_attention"}


class Block(nn.Module):
    """Attention to itself, to a context where there is one, and a perceptron, each after a norm."""

    def __init__(
        self,
        features: int,
        heads: int,
        layer: dict[str, Any],
        *,
        is_causal: bool = False,
        crosses: bool = False,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2 + crosses))
        self.attention = Attention(features, heads, is_causal=is_causal, **layer)
        self.cross = Attention(features, heads, **_EXACT) if crosses else None
        self.perceptron = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map tokens (B, N, F) to tokens; masks are True for real tokens."""
        x = x + self.attention(self.norms[0](x), key_mask=mask)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), context, key_mask=context_mask)
        return x + self.perceptron(self.norms[1](x))


class Stack(nn.Module):
    """Learned places, blocks, and a norm."""

    def __init__(self, sizes: dict[str, Any], layer: dict[str, Any], length: int, **block: bool) -> None:
        super().__init__()
        features = sizes["features"]
        self.places = nn.Parameter(0.5 * torch.randn(length, features))
        self.blocks = nn.ModuleList(
            Block(features, sizes["heads"], layer, **block) for _ in range(sizes["depth"])
        )
        self.norm = nn.LayerNorm(features)

    def forward(self, x: torch.Tensor, *own: torch.Tensor | None) -> torch.Tensor:
        """Map tokens (B, N, F) to tokens, with further arguments of each block."""
        x = x + self.places[: x.shape[-2]]
        for block in self.blocks:
            x = block(x, *own)
        return self.norm(x)


class Classifier(nn.Module):
    """A vision transformer with a token a pixel; the mean of all tokens gives the class."""

    def __init__(self, sizes: dict[str, Any], mechanism: Mechanism) -> None:
        super().__init__()
        self.pixel = nn.Linear(1, sizes["features"])
        self.stack = Stack(sizes, mechanism.layer(), sizes["tokens"])
        self.head = nn.Linear(sizes["features"], sizes["classes"])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes) of pixels (B, tokens)."""
        return self.head(self.stack(self.pixel(pixels[..., None])).mean(dim=-2))


class Language(nn.Module):
    """A causal model of bytes."""

    def __init__(self, sizes: dict[str, Any], mechanism: Mechanism) -> None:
        super().__init__()
        self.token = nn.Embedding(256, sizes["features"])
        self.stack = Stack(sizes, mechanism.layer(), sizes["tokens"], is_causal=True)
        self.head = nn.Linear(sizes["features"], 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (B, N, 256) of each next byte."""
        return self.head(self.stack(self.token(tokens)))


class Translator(nn.Module):
    """An encoder with the mechanism, and a decoder with exact attention, as in the papers."""

    def __init__(self, sizes: dict[str, Any], mechanism: Mechanism) -> None:
        super().__init__()
        # One embedding for source, target and results.
        self.token = nn.Embedding(sizes["vocabulary"], sizes["features"], padding_idx=0)
        nn.init.normal_(self.token.weight, std=sizes["features"] ** -0.5)
        self.encoder = Stack(sizes, mechanism.layer(), sizes["tokens"])
        self.decoder = Stack(sizes, _EXACT, sizes["tokens"], is_causal=True, crosses=True)

    def encode(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the source's tokens (B, M); return them with a mask, False for padding."""
        mask = source != 0
        return self.encoder(self._embedded(source), mask), mask

    def decode(self, target: torch.Tensor, context: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits (B, N, vocabulary) of each next token of the target."""
        return self.decoder(self._embedded(target), None, context, mask) @ self.token.weight.T

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) * math.sqrt(self.token.embedding_dim)


class Trainer:
    """AdamW whose rate warms up and then falls as a cosine."""

    def __init__(self, model: nn.Module, settings: dict[str, Any], steps: int) -> None:
        self.model, self.steps = model, steps
        self.optimizer = torch.optim.AdamW(
            _groups(model, settings["weight_decay"]), lr=settings["rate"], betas=(0.9, 0.98)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: fall(step, steps, settings["warm_up"])
        )

    def step(self, loss: torch.Tensor) -> None:
        """Make one step against the gradient, clipped to norm one."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def fall(step: int, steps: int, warm_up: int) -> float:
    """Return the share of the rate at a step."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))


def _groups(model: nn.Module, decay: float) -> Iterable[dict[str, Any]]:
    """Yield the groups of parameters: matrices with weight decay, norms and biases without."""
    parameters = list(model.parameters())
    yield {"params": [one for one in parameters if one.ndim > 1], "weight_decay": decay}
    yield {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0}
