"""Layers of transformers' models that no estimator can stand for run on exact attention, where a user asks for it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BigBirdPegasusConfig,
    BigBirdPegasusModel,
    JetMoeConfig,
    JetMoeModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    T5Config,
    T5Model,
)

from randattn import softmax_attention
from randattn.integrations.transformers import register
from tests.helpers.small_models import MASK, PAD, SIZES, TOKENS, close, hidden, larger, llama

pytestmark = pytest.mark.usefixtures("registered")


def agrees(model, inputs, where=slice(None)):
    """By "exact", registered with that fallback, a model gives what its own attention gives; count estimates."""
    calls = []

    def counted(*arrays, **options):
        calls.append(options)
        return softmax_attention(*arrays, **options)

    register("exact", counted, fallback="exact")
    model.set_attn_implementation("eager")
    eager = model(**inputs)[0]
    model.set_attn_implementation("exact")
    torch.testing.assert_close(model(**inputs)[0][where], eager[where], atol=2e-5, rtol=1e-4)
    return len(calls)


def test_layers_that_slide_a_window_fall_back():
    sizes = {**SIZES, "num_attention_heads": 4, "pad_token_id": PAD}
    types = ["sliding_attention", "full_attention"]
    bert = ModernBertConfig(**sizes, layer_types=types, local_attention=8, cls_token_id=1, sep_token_id=2)
    assert agrees(larger(ModernBertModel(bert)), {"input_ids": TOKENS, "attention_mask": MASK}, MASK) == 1
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen2MoeConfig(
        **sizes,
        **experts,
        num_key_value_heads=2,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=types,
    )
    mask, model = MASK.flip(1), larger(Qwen2MoeModel(config))
    assert agrees(model, {"input_ids": TOKENS, "attention_mask": mask}, mask) == 1
    model.set_attn_implementation("randattn_softmax")
    with pytest.raises(NotImplementedError, match="sliding window.*fallback='exact'"):
        hidden(model, mask)


def test_position_biases_fall_back():
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=50, dropout_rate=0.0)
    model = larger(T5Model(config))
    inputs = {"input_ids": TOKENS, "attention_mask": MASK, "decoder_input_ids": TOKENS[:, :12]}
    assert agrees(model, inputs) == 0
    model.set_attn_implementation("randattn_softmax")
    with pytest.raises(NotImplementedError, match="position_bias") as refused:
        model(**inputs)
    assert len(str(refused.value)) < 300
    assert "tensor(" not in str(refused.value)


def test_a_prompt_in_pieces_and_masks_of_the_callers_fall_back():
    model, mask = llama(), MASK.flip(1)
    register("exact", softmax_attention, fallback="exact")
    seen = []
    for name in ("eager", "exact"):
        model.set_attn_implementation(name)
        cache = model(input_ids=TOKENS[:, :25], attention_mask=mask[:, :25]).past_key_values
        seen.append(model(input_ids=TOKENS[:, 25:], attention_mask=mask, past_key_values=cache)[0])
    close(seen[1], seen[0], mask[:, 25:])
    own = torch.zeros(3, 1, 40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -1e9)
    assert agrees(model, {"input_ids": TOKENS, "attention_mask": own}) == 0
    with pytest.raises(ValueError, match="fallback: expected one of 'error', 'exact'"):
        register(fallback="sdpa")


def test_what_falls_back_may_drop_weights():
    """PyTorch's function can, estimators cannot."""
    config = MistralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=8, attention_dropout=0.5
    )
    model = larger(MistralModel(config)).train()
    register("exact", softmax_attention, fallback="exact")
    model.set_attn_implementation("exact")
    assert (hidden(model) - hidden(model)).abs().max() > 1e-3


def test_results_are_viewed():
    """JetMoe does, where PyTorch's own implementation's are contiguous."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    config = JetMoeConfig(**sizes, num_key_value_heads=2, kv_channels=8, num_local_experts=4)
    mask = MASK.flip(1)
    assert agrees(larger(JetMoeModel(config)), {"input_ids": TOKENS, "attention_mask": mask}, mask) == 2


def test_parts_with_an_attention_of_their_own():
    """BigBird-Pegasus's encoder adds the mask to its logits."""
    config = BigBirdPegasusConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=50,
        dropout=0.0,
        attention_type="original_full",
    )
    model = larger(BigBirdPegasusModel(config))
    inputs = {"input_ids": TOKENS, "attention_mask": MASK.flip(1).long(), "decoder_input_ids": TOKENS[:, :12]}
    assert agrees(model, inputs) == 4
