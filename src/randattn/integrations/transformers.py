"""Hugging Face transformers: the estimators as attention implementations of its models.

``register()``, then ``from_pretrained(..., attn_implementation="randattn_eva")``. The names are entries of
`AttentionInterface` and `AttentionMaskInterface`.
"""

from __future__ import annotations

import numbers
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from randattn import eva, lara, ra, rfa, softmax_attention

from ._layout import estimate

if TYPE_CHECKING:
    from collections.abc import Callable

# What models pass that changes attention, and none of our functions takes.
_CHANGES = ("sliding_window", "softcap", "position_bias", "s_aux", "cache", "head_mask")
NAMES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "randattn_softmax": (softmax_attention, {}),
    "randattn_rfa": (rfa, {"rng": 0}),
    "randattn_ra": (ra, {"rng": 0}),
    "randattn_lara": (lara, {}),
    "randattn_eva": (eva, {}),
    "randattn_eva_top": (eva, {"groups": "tree", "exact": "top"}),
}


def register(name: str | None = None, estimator: Callable[..., Any] | None = None, /, **options: Any) -> None:
    """Make estimators known to transformers, by names that models take as `attn_implementation`.

    Parameters
    ----------
    name : str, optional
        What the model is to ask for. By default all of `NAMES`: "randattn_softmax", "randattn_rfa",
        "randattn_ra", "randattn_lara", "randattn_eva", and "randattn_eva_top" for chosen keys.
    estimator : function, optional
        `randattn.eva` or another, with a name.
    **options
        As for the estimator, but for what the model says itself: scale, masks, heads, is_causal. An int
        `rng` is a seed, to which layers that know their number add it.

    Raises
    ------
    TypeError
        A name without an estimator, or options without either.

    Notes
    -----
    Padding masks, grouped key heads and causal models are honoured. A single query, as in generation with a
    cache, attends exactly: that costs no more than an estimate. What is not supported is an error when the
    model is called, never ignored: other masks (sliding windows, packed sequences, 4D masks), several new
    tokens after cached ones, dropout of attention weights, soft caps, position biases, attention sinks.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> from randattn.integrations.transformers import register
    >>> register()
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> model = BertModel(BertConfig(**sizes, vocab_size=99))
    >>> model.set_attn_implementation("randattn_eva")
    >>> model.eval()(**model.dummy_inputs).last_hidden_state.shape
    torch.Size([3, 5, 16])
    """
    if name is None and estimator is None and not options:
        for each, (function, own) in NAMES.items():
            register(each, function, **own)
        return
    if not isinstance(name, str) or not callable(estimator):
        raise TypeError(f"register: expected a name and an estimator, got {name!r} and {estimator!r}")
    AttentionInterface.register(name, partial(_attention, estimator, options))
    AttentionMaskInterface.register(name, _mask)


class _Mask(NamedTuple):
    """What a mask of ours says of itself, on a tensor (batch, 1, 1, keys), True = attend."""

    is_causal: bool
    is_padded: bool


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> torch.Tensor:
    """The keys to attend to; of another pattern an error."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise NotImplementedError(
            "attention_mask: expected a causal or a full one with padding, got another pattern (a sliding "
            "window, packed sequences, ...): use attn_implementation='sdpa' for this model"
        )
    is_causal, first = mask_function is causal_mask_function, int(q_offset)
    if is_causal and q_length > 1 and (first or int(kv_offset) or q_length != kv_length):
        raise NotImplementedError(
            "past_key_values: expected none, or one new token, "
            f"got {q_length} new ones from {first} of {kv_length}"
        )
    place = torch.arange(kv_length, device=device) + int(kv_offset)
    keep = torch.ones(1, kv_length, dtype=torch.bool, device=device)
    if is_causal and q_length == 1:
        # A static cache has places that are not written yet.
        keep = (place <= first)[None, :]
    if attention_mask is not None:
        there = attention_mask.to(keep.device).bool()
        there = torch.nn.functional.pad(there, (0, max(0, int(kv_offset) + kv_length - there.shape[1])))
        keep = keep & there[:, int(kv_offset) : int(kv_offset) + kv_length]
    made = keep.expand(batch_size, kv_length)[:, None, None, :]
    made.randattn = _Mask(is_causal, is_padded=attention_mask is not None or (is_causal and q_length == 1))
    return made


def _attention(
    estimator: Callable[..., Any],
    options: dict[str, Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """`query` (batch, heads, tokens, features); the result is (batch, tokens, heads, features)."""
    for name in _CHANGES:
        if keywords.get(name) is not None:
            raise NotImplementedError(
                f"{name}: expected None, got {keywords[name]!r}: randattn has no such thing"
            )
    if dropout:
        raise NotImplementedError(
            f"dropout: expected 0, got {dropout}: set the attention dropout of the model's configuration to 0"
        )
    if keywords.get("output_attentions"):
        raise NotImplementedError("output_attentions: expected False: there are no weights to give")
    said = getattr(attention_mask, "randattn", None)
    if attention_mask is not None and said is None:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise NotImplementedError(
            f"attention_mask: expected one of padding, (batch, keys), got shape {shape}"
        )
    keys = None
    if attention_mask is not None and said is not None:
        is_causal, keys = said.is_causal, attention_mask[..., 0, :] if said.is_padded else None
    elif is_causal is None:
        if not hasattr(module, "is_causal"):
            raise NotImplementedError(f"is_causal: {type(module).__name__} does not say which it is")
        is_causal = module.is_causal
    # In a step with a cache the new token is the last one: it sees all keys that are there.
    is_causal = bool(is_causal) and query.shape[-2] > 1
    if isinstance(options.get("rng"), numbers.Integral):
        options = {**options, "rng": int(options["rng"]) + (getattr(module, "layer_idx", None) or 0)}
    out = estimate(
        estimator,
        options,
        query,
        key,
        value,
        is_causal=is_causal,
        scale=scaling,
        key_mask=keys,
        enable_gqa=query.shape[-3] != key.shape[-3],
    )
    return out.transpose(1, 2), None
