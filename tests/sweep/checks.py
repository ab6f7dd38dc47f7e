"""A model's exact attention of its own against "randattn_softmax", in all the ways that models are called."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from randattn import softmax_attention
from randattn.integrations import transformers as ours

from .families import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = torch.randint(3, VOCABULARY - 1, (3, 20), generator=torch.Generator().manual_seed(0))
# Padding on the left.
MASK = (torch.arange(20) >= torch.tensor([[0], [6], [13]])).long()
NEW = 4


_softmax = torch.nn.functional.softmax


def softmax(x: torch.Tensor, dim: int = -1, dtype: Any = None, **own: Any) -> torch.Tensor:
    """PyTorch's, without going down to float32, as models' own attention does."""
    return _softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **own)


class Counted:
    """Attention by our name, which notes what it is called with and what it gives."""

    def __init__(self) -> None:
        self.calls = self.estimates = 0
        self.contiguous = True
        ours.register("sweep", self.estimator, fallback="exact")
        ours.register("sweep alone", self.estimator)
        registered = AttentionInterface()["sweep"]

        def attention(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            out, weights = registered(*arguments, **keywords)
            self.contiguous &= out.is_contiguous()
            return out, weights

        AttentionInterface.register("sweep", attention)

    def estimator(self, *arguments: Any, **options: Any) -> Any:
        self.estimates += 1
        return softmax_attention(*arguments, **options)


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    given = {"input_ids": TOKENS, "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = TOKENS[:, :9].flip(0)
    return given


def logits_of(out: Any) -> torch.Tensor:
    return next(out[name] for name in ("logits", "prediction_logits", "last_hidden_state") if name in out)


def real(model: Any, logits: torch.Tensor) -> torch.Tensor:
    return (
        logits
        if model.config.is_encoder_decoder
        else logits[:, -MASK.shape[1] :][MASK[:, -logits.shape[1] :].bool()]
    )


def padding(model: Any) -> list[torch.Tensor]:
    """Left padding, and none."""
    given = inputs_of(model)
    with torch.no_grad():
        first = real(model, logits_of(model(**given)))
        given["attention_mask"] = torch.ones_like(MASK)
        second = logits_of(model(**given))
        del given["attention_mask"]
        return [first, second, logits_of(model(**given))]


def generated(model: Any, **how: Any) -> list[torch.Tensor]:
    out = model.generate(
        input_ids=TOKENS,
        attention_mask=MASK,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    return [out.sequences, *out.logits]


def cache(model: Any) -> list[torch.Tensor]:
    return generated(model)


def static(model: Any) -> list[torch.Tensor]:
    return generated(model, cache_implementation="static")


def beams(model: Any) -> list[torch.Tensor]:
    return generated(model, num_beams=2)


def pieces(model: Any) -> list[torch.Tensor]:
    """A prompt in three pieces, the last of them a single token."""
    given, results, past = inputs_of(model), [], None
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    whole = given[name]
    cuts = (0, whole.shape[1] // 2, whole.shape[1] - 1, whole.shape[1])
    with torch.no_grad():
        for start, stop in itertools.pairwise(cuts):
            given[name] = whole[:, start:stop]
            if name == "input_ids":
                given["attention_mask"] = MASK[:, :stop]
            out = model(**given, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, logits_of(out)
            results.append(logits if name != "input_ids" else logits[MASK[:, start:stop].bool()])
    return results


def training(model: Any) -> list[torch.Tensor]:
    """Gradients, with what is between layers computed again."""
    model.train()
    model.activation_checkpointing_enable()
    model.zero_grad()
    try:
        real(model, logits_of(model(**inputs_of(model), use_cache=False))).square().mean().backward()
    finally:
        model.activation_checkpointing_disable()
        model.eval()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


CHECKS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "padding": padding,
    "cache": cache,
    "static": static,
    "pieces": pieces,
    "beams": beams,
    "training": training,
}


def distance(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> float:
    """The largest difference, over the largest number where that is above 1."""
    if len(xs) != len(ys):
        return float("inf")
    worst = 0.0
    for x, y in zip(xs, ys, strict=True):
        if x.shape != y.shape:
            return float("inf")
        # The same infinities, where logits are forbidden.
        gap = torch.where(x == y, 0.0, (x - y).abs().double())
        size = x.abs()[torch.isfinite(x)].double()
        if gap.numel():
            if not torch.isfinite(gap).all():
                return float("inf")
            worst = max(worst, gap.max().item() / max(1.0, size.max().item() if size.numel() else 1.0))
    return worst
