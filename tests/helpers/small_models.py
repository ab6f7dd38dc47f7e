"""Small models of Hugging Face transformers, and tokens with padding."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
PAD = 0
TOKENS = torch.randint(1, 50, (3, 40), generator=torch.Generator().manual_seed(0))
# Padding at the end; at the beginning, as causal models have it, it is turned round.
MASK = torch.arange(40) < torch.tensor([[40], [30], [7]])


def bert(name="eager"):
    model = BertModel(BertConfig(**SIZES, num_attention_heads=4)).eval()
    model.set_attn_implementation(name)
    return model


def larger(model):
    """As models begin, weights are so small that attention hardly matters."""
    for parameter in model.parameters():
        parameter.data *= 6 if parameter.ndim == 2 else 1
    return model.eval()


def llama(**options):
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, **options)
    return larger(LlamaForCausalLM(config))


def hidden(model, mask=None, tokens=TOKENS):
    return model(input_ids=tokens, attention_mask=mask)[0]


def close(x, y, mask=MASK, atol=2e-5):
    torch.testing.assert_close(x[mask], y[mask], atol=atol, rtol=1e-4)
