"""Families of transformers' models by "randattn_softmax", against their own exact attention.

Each agrees, or is in `LISTED` with what is said of it; a family that is there and agrees fails.
"""

from __future__ import annotations

import re

import pytest
import torch

from .checks import CHECKS, Counted, distance, softmax
from .families import BuildError, build, families

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = 1e-6
# Families whose own attention fails in these checks, as they are generated, or that are not generated;
# that no name replaces an attention of; that fall back, or are refused, and for what.
LISTED = {
    "attention of its own": """
        causal: BigBirdForCausalLM BloomForCausalLM CodeGenForCausalLM CpmAntForCausalLM FalconForCausalLM
            FalconMambaForCausalLM GPTJForCausalLM GPTNeoForCausalLM GPTNeoXJapaneseForCausalLM
            GitForCausalLM MambaForCausalLM MegatronBertForCausalLM MvpForCausalLM OpenAIGPTLMHeadModel
            RemBertForCausalLM RoFormerForCausalLM RwkvForCausalLM TrOCRForCausalLM
            XLMWithLMHeadModel XLNetLMHeadModel
        masked: BigBirdForMaskedLM ConvBertForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM
            FNetForMaskedLM FlaubertWithLMHeadModel FunnelForMaskedLM IBertForMaskedLM LongformerForMaskedLM
            LukeForMaskedLM MPNetForMaskedLM MegatronBertForMaskedLM MvpForConditionalGeneration
            NystromformerForMaskedLM RemBertForMaskedLM RoFormerForMaskedLM SqueezeBertForMaskedLM
            TapasForMaskedLM XLMWithLMHeadModel YosoForMaskedLM
        seq2seq: FSMTForConditionalGeneration LEDForConditionalGeneration MvpForConditionalGeneration
    """,
    "fails by itself": """
        causal: Inkling2ForCausalLM ProphetNetForCausalLM RecurrentGemmaForCausalLM XGLMForCausalLM Zamba2ForCausalLM
            xLSTMForCausalLM
        masked: EsmForMaskedLM MraForMaskedLM
        seq2seq: ProphetNetForConditionalGeneration VoxtralRealtimeForConditionalGeneration
    """,
    "falls back: attention_mask": """
        causal: AfmoeForCausalLM BeamForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CwmForCausalLM
            DogeForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM Gemma3ForCausalLM
            Gemma3ForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
            Gemma4UnifiedForCausalLM Gemma4UnifiedForConditionalGeneration Kolibri1ForCausalLM
            Lfm3ForCausalLM Llama4ForCausalLM MinistralForCausalLM MistralForCausalLM
            ModernBertDecoderForCausalLM Olmo3ForCausalLM
        masked: LayoutLMForMaskedLM ModernBertForMaskedLM ModernVBertForMaskedLM UltraVBertForMaskedLM
            UltrabertForMaskedLM
        seq2seq: T5Gemma2ForConditionalGeneration
    """,
    "falls back: position_bias": """
        causal: InklingForCausalLM
        seq2seq: LongT5ForConditionalGeneration MT5ForConditionalGeneration
            SwitchTransformersForConditionalGeneration T5ForConditionalGeneration
            UMT5ForConditionalGeneration
    """,
    "not built": """
        causal: BltForCausalLM CohereCompassForCausalLM DbrxForCausalLM Dots1ForCausalLM
            Dots3NoteForCausalLM Emu3ForCausalLM Gemma3nForCausalLM Gemma3nForConditionalGeneration
            Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM Mamba2ForCausalLM MptForCausalLM
            MusicgenForCausalLM MusicgenMelodyForCausalLM Phi4MultimodalForCausalLM Qwen4ExpForCausalLM
            ReformerModelWithLMHead ZambaForCausalLM
        masked: NeoMMEForMaskedLM PerceiverForMaskedLM ReformerForMaskedLM
        seq2seq: Nemotron3_5TranscribeForConditionalGeneration VibeVoiceAsrForConditionalGeneration
    """,
    "refused: indices": """
        causal: AXK2ForCausalLM DeepseekV32ForCausalLM GlmMoeDsaForCausalLM
    """,
    "refused: s_aux": """
        causal: DeepseekV4ForCausalLM FlintForCausalLM GptOssForCausalLM GraniteMoeSWAForCausalLM
            GraniteSWAForCausalLM HYV4ForCausalLM MiMoV2FlashForCausalLM
    """,
    "refused: softcap": """
        causal: Gemma2ForCausalLM VaultGemmaForCausalLM
        seq2seq: T5GemmaForConditionalGeneration
    """,
}


def _by_family(listed):
    found = {}
    for outcome, text in listed.items():
        kind = ""
        for word in text.split():
            if word.endswith(":"):
                kind = word[:-1]
            else:
                found[f"{kind} {word}"] = outcome
    return found


OTHERS = _by_family(LISTED)


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


def refusal(error):
    """The name that a refusal begins with."""
    return re.match(r"\w+", str(error)).group()


def ask_for(model, name):
    """As ``from_pretrained(attn_implementation=...)`` does, of models, too, that cannot change it later."""
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        model.config._attn_implementation = name


def looked_at(family):
    """Give the verdict on a family, and notes."""
    kind, name, types = family
    try:
        model = build(kind, name, types)
    except BuildError as error:
        return "not built", str(error)[:110]
    counted, notes, alone = Counted(), [], "agrees"
    for title, check in CHECKS.items():
        if kind == "masked" and title not in ("padding", "training"):
            continue
        ask_for(model, "eager")
        try:
            exact = check(model)
        except Exception as error:  # noqa: BLE001
            why = f"{type(error).__name__}: {error}".partition("\n")[0][:80]
            if title == "padding":
                return "fails by itself", why
            notes.append(f"no {title}, {why}")
            continue
        if not all(torch.isfinite(one).all() for one in exact):
            return "fails by itself", f"{title}: not finite"
        if title == "padding":
            ask_for(model, "sweep alone")
            try:
                check(model)
            except NotImplementedError as error:
                alone = f"falls back: {refusal(error)}"
        ask_for(model, "sweep")
        try:
            ours = check(model)
        except NotImplementedError as error:
            return f"refused: {refusal(error)}", ""
        far = distance(exact, ours)
        if not far <= NEAR:
            return f"differs: {title}", f"{far:.1e}"
        if title == "padding" and alone == "agrees" and counted.calls and not counted.estimates:
            return "nothing estimated", ""
    if not counted.calls:
        return "attention of its own", ""
    if not counted.contiguous:
        return "differs: not contiguous", ""
    return alone, "; ".join(notes)


@pytest.mark.parametrize("family", families(), ids=lambda family: f"{family[0]}-{family[1]}")
def test_family(family, record_property):
    outcome, note = looked_at(family)
    name = " ".join(family[:2])
    for title, value in (("outcome", outcome), ("family", name), ("note", note)):
        record_property(title, value)
    assert outcome == OTHERS.get(name, "agrees"), note


def test_what_is_listed_is_there():
    assert OTHERS.keys() <= {f"{kind} {name}" for kind, name, _ in families()}
