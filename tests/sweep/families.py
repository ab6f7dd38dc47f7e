"""Tiny models of transformers' own lists, with random weights: a family for each class of models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

LISTS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
VOCABULARY, WIDTH = 64, 32
# What configurations call their sizes. A size that a configuration has not is left out.
_NAMES = {
    WIDTH: """hidden_size d_model n_embd dim embedding_size input_embedding_size output_embedding_size
        word_embed_proj_dim attention_hidden_size lru_width emb_dim""",
    48: """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner n_inner
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size hidden_dim
        dense_intermediate_size intermediate_size_mlp expert_ffn_hidden_size ffn_hidden_size
        block_ff_dim pooler_hidden_size linear_intermediate_size""",
    2: """num_hidden_layers encoder_layers decoder_layers n_layer n_layers num_layers num_decoder_layers
        num_encoder_layers num_sparse_encoder_layers
        num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups multi_query_group_num
        num_experts_per_tok num_experts_per_token moe_topk topk_group n_group""",
    4: """num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads num_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads zero_expert_num
        num_experts n_routed_experts num_local_experts moe_num_experts rotary_dim""",
    6: "sliding_window local_attention window_size attention_chunk_size",
    8: """head_dim d_kv kv_channels attention_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim
        swa_head_dim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size""",
    16: "q_lora_rank kv_lora_rank",
    VOCABULARY: """vocab_size vocab_size_per_layer_input decoder_vocab_size entity_vocab_size
        pronunciation_vocab_size shape_vocab_size""",
    128: """max_position_embeddings n_positions max_seq_len n_ctx
        max_source_positions max_target_positions""",
    0.0: """dropout attention_dropout activation_dropout hidden_dropout_prob attention_probs_dropout_prob
        attn_pdrop embd_pdrop resid_pdrop hidden_dropout dropout_rate encoder_layerdrop layerdrop
        decoder_layerdrop classifier_dropout classifier_dropout_prob embedding_dropout
        attention_dropout_prob mlp_dropout residual_dropout router_jitter_noise input_jitter_noise
        ffn_dropout dropout_p""",
}
SIZES: dict[str, Any] = {name: value for value, names in _NAMES.items() for name in names.split()}
# Of these None is no answer.
_NEEDED = ("head_dim", "num_key_value_heads", "vocab_size")
# What configurations call the kinds of their layers.
_KINDS = ("layer_types", "layers_block_type", "block_types")
# What makes a family small that these names do not.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mpt": {"attn_pdrop": 0},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 48,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# More numbers in a model are not made.
MOST_NUMBERS = 5_000_000


def tiny(config: Any) -> dict[str, Any]:
    """The arguments that make a configuration of this kind small."""
    had = config.to_dict()
    found = {}
    for name in (*had, *config.attribute_map):
        value = had.get(name, getattr(config, name, None) if name in config.attribute_map else None)
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            # The last of a vocabulary that is small now.
            found[name] = VOCABULARY - 1
        elif name in SIZES and (name in _NEEDED or isinstance(value, (int, float))):
            found[name] = SIZES[name]
    if "kv_lora_rank" in had:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name, own in config.attribute_map.items():
        if own in found:
            found.pop(name, None)
    found |= _layers(had)
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if hasattr(sub, "to_dict"):
            found[name] = {**tiny(sub), "model_type": sub.model_type}
    return found


def _layers(had: dict[str, Any]) -> dict[str, Any]:
    """A layer of each kind, or two, and of lists by layer what belongs to these."""
    count = had.get("num_hidden_layers")
    kinds = next(
        (had[name] for name in _KINDS if isinstance(had.get(name), (list, tuple)) and had[name]), None
    )
    if not isinstance(count, int) or count < 2:
        return {}
    chosen = [0, 1]
    if kinds is not None and len(kinds) == count and len(set(kinds)) > 1:
        chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    found: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    for name, value in had.items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            found[name] = [SIZES.get(name, value[index]) for index in chosen]
    return found


def families() -> list[tuple[str, str, tuple[str, ...]]]:
    """Each model class once: its list, its name, the types of configuration that it has."""
    found: dict[tuple[str, str], list[str]] = {}
    for kind, names in LISTS.items():
        for model_type, classes in names.items():
            name = classes[0] if isinstance(classes, tuple) else classes
            if model_type in CONFIG_MAPPING:
                found.setdefault((kind, name), []).append(model_type)
    return [(kind, name, tuple(types)) for (kind, name), types in found.items()]


class BuildError(Exception):
    """These rules make no small model of a family."""


def _made(kind: str, name: str, model_type: str) -> Any:
    make = CONFIG_MAPPING[model_type]
    arguments = {**tiny(make()), **OVERRIDES.get(model_type, {})}
    if kind == "causal" and "is_decoder" in make().to_dict():
        arguments["is_decoder"] = True
    model = partial(getattr(transformers, name)._from_config, attn_implementation="eager")
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in model(make(**arguments)).parameters())
    if numbers > MOST_NUMBERS:
        raise ValueError(f"{numbers} numbers")
    torch.manual_seed(0)
    return model(make(**arguments))


def build(kind: str, name: str, types: tuple[str, ...]) -> Any:
    """A model of the family in float64, with weights that let attention matter."""
    model, errors = None, []
    for model_type in types:
        try:
            model = _made(kind, name, model_type)
            break
        except Exception as error:  # noqa: BLE001
            errors.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    if model is None:
        raise BuildError(errors[0])
    if model._can_set_experts_implementation():
        # The grouped products have no float64.
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim == 2 else 1
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
        if model.config.is_encoder_decoder:
            model.generation_config.decoder_start_token_id = 0
    return model.double().eval()
