"""The error of each layer of a language model: its mean and its worst head, without and with exact heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from randattn import adaptive_eva

from .language_model import LanguageModel, exact_attention, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

# "Before" all heads choose keys together with their block; "after" is the default call.
BEFORE, AFTER = "adaptive_eva, exact_heads=0", "adaptive_eva"


class LayerError(NamedTuple):
    """The relative error of a layer: the mean over heads, and that of the worst head."""

    text: str
    tokens: int
    attention: str
    layer: int
    mean: float
    worst: float


def layer_errors(say: Callable[[str], None], tokens: int) -> Iterator[LayerError]:
    """Measure the errors of all layers on each text, on the inputs that exact attention gives them."""
    model = LanguageModel()
    for name, text in texts().items():
        found: list[LayerError] = []

        def attention(
            layer: int, *qkv: torch.Tensor, name: str = name, found: list[LayerError] = found
        ) -> torch.Tensor:
            exact = exact_attention(layer, *qkv)
            for label, options in ((BEFORE, {"exact_heads": 0}), (AFTER, {})):
                out = adaptive_eva(*qkv, is_causal=True, enable_gqa=True, **options)
                errors = (out - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
                rounded = (float(f"{float(x):.3g}") for x in (errors.mean(), errors.max()))
                found.append(LayerError(name, tokens, label, layer, *rounded))
            return exact

        say(f"{name}, {tokens} tokens: the errors of each layer")
        model.score(model.tokens(text, tokens), attention)
        yield from found
