"""Hugging Face transformers: the estimators as attention implementations of its models.

``register()``, then ``from_pretrained(..., attn_implementation="randattn_eva")``. The names are entries of
`AttentionInterface` and `AttentionMaskInterface`.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from randattn._core.checks import check_option
from randattn._core.describe import shown
from randattn._estimators.registry import by_label

from ._layout import estimate

# Arguments by which models change attention, and which neither estimators nor PyTorch's function take: to
# ignore one would give a model other results without a word.
_CHANGES = ("softcap", "s_aux", "sinks", "cache", "head_mask", "indices", "block_indices")


def names() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Return the estimators by their names as `attn_implementation`, with the options of each."""
    rows = by_label().items()
    return {
        f"randattn_{label}": (row.function, {"rng": 0} if row.draws == "always" else {})
        for label, row in rows
    }


def register(
    name: str | None = None,
    estimator: Callable[..., Any] | None = None,
    /,
    *,
    fallback: str = "error",
    **options: Any,
) -> None:
    """Register estimators with transformers, by names that models take as `attn_implementation`.

    Parameters
    ----------
    name : str, optional
        The `attn_implementation` of the estimator. The default registers all estimators: "randattn_softmax",
        "randattn_rfa", "randattn_ra", "randattn_lara", "randattn_eva", "randattn_adaptive_eva".
    estimator : function, optional
        An estimator for this name, such as `randattn.eva`.
    fallback : {"error", "exact"}, default "error"
        Treatment of calls that estimators do not support (Notes): an error, or exact attention by PyTorch's
        own function.
    **options
        Options of the estimator, except those that the model sets: scale, masks, heads, is_causal. An int
        `rng` is a seed, to which each layer adds its number if it has one.

    Raises
    ------
    TypeError
        A name without an estimator, or options without a name and an estimator.
    ValueError
        Another `fallback`.

    Notes
    -----
    Padding masks, grouped key heads and causal models are honoured. A single query, as in generation with a
    cache, attends exactly, which costs no more than an estimate. An unsupported argument is an error when the
    model is called; none is ignored. With ``fallback="exact"`` the following calls are exact, and the other
    layers are estimated: layers with a sliding window, position biases, other masks (packed sequences,
    chunks, the caller's 4D masks), and several new tokens after cached ones. Soft caps, attention sinks, keys
    that the model chooses, and dropout of estimated weights are always errors.

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
    check_option("fallback", fallback, ("error", "exact"))
    if name is None and estimator is None and not options:
        for each, (function, own) in names().items():
            register(each, function, fallback=fallback, **own)
        return
    if not isinstance(name, str) or not callable(estimator):
        raise TypeError(
            f"register: expected a name and an estimator, got {shown(name)} and {shown(estimator)}"
        )
    AttentionInterface.register(name, partial(_attention, estimator, options, fallback))
    AttentionMaskInterface.register(name, _mask)


class _Marks(NamedTuple):
    """The pattern of a mask that `_mask` made: the attribute `randattn` of the mask and of its memory."""

    is_causal: bool
    is_padded: bool
    is_other: bool  # than causal or full with padding
    start: int  # the place of the first query among the keys, for several queries


def _mark(mask: torch.Tensor, marks: _Marks) -> None:
    mask.randattn = marks
    # A traced tensor has no memory to mark.
    if not torch.compiler.is_compiling():
        mask.untyped_storage().randattn = (_layout(mask), marks)


def _marks_of(mask: torch.Tensor | None) -> _Marks | None:
    marks: _Marks | None = getattr(mask, "randattn", None)
    if mask is None or marks is not None or torch.compiler.is_compiling():
        return marks
    # A reentrant checkpoint detaches the mask before it calls again: the mask is another tensor of the same
    # memory. The layout tells it from a view of a part, to which the marks do not apply.
    layout, marks = getattr(mask.untyped_storage(), "randattn", (None, None))
    return marks if layout == _layout(mask) else None


def _layout(mask: torch.Tensor) -> tuple[Any, ...]:
    return mask.shape, mask.stride(), mask.storage_offset()


@cache
def _has_sdpa(config: Any) -> bool:
    """Tell whether this class of configurations has models that take the masks of "sdpa"."""
    models = MODEL_MAPPING.get(config, None) or ()
    models = models if isinstance(models, tuple) else (models,)
    supports = [
        (model._supports_attention_backend or model._supports_sdpa)  # noqa: SLF001
        and model._can_set_attn_implementation()  # noqa: SLF001
        for model in models
    ]
    return bool(supports) and all(supports)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    **own: Any,
) -> torch.Tensor | None:
    """Make the mask that transformers makes for "sdpa", True = attend, and mark it.

    Models without "sdpa" may have parts that add the mask to their logits: they get the mask for "eager".
    """
    is_causal = mask_function is causal_mask_function
    # A full mask is the same for all queries: one row takes N times less memory, and is expanded below.
    is_full = mask_function is bidirectional_mask_function
    kind: Any = type(config)
    make = sdpa_mask if _has_sdpa(kind) else eager_mask
    made = make(
        batch_size=batch_size,
        q_length=1 if is_full else q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        # transformers would skip a full mask and pass None, which has no marks; not all modules say
        # themselves that they look both ways.
        **{**own, "allow_is_bidirectional_skip": False},
    )
    if made is None:
        return None
    if is_full:
        made = made.expand(batch_size, -1, q_length, -1)
    several = is_causal and q_length > 1
    marks = _Marks(
        is_causal,
        # A static cache has places that are not written yet: the mask hides them from a single query.
        is_padded=attention_mask is not None or (is_causal and q_length == 1),
        is_other=not (is_causal or is_full),
        start=int(q_offset) - int(kv_offset) if several else 0,
    )
    _mark(made, marks)
    return made


def _beyond(
    query: torch.Tensor, attention_mask: torch.Tensor | None, marks: _Marks | None, keywords: dict[str, Any]
) -> str | None:
    """Return the fault of an argument that estimators do not support; None for a call that they support."""
    bias, window, new = keywords.get("position_bias"), keywords.get("sliding_window"), query.shape[-2]
    if bias is not None:
        return f"position_bias: expected None, got {shown(bias)}"
    if attention_mask is not None and marks is None:
        return f"attention_mask: expected one of padding, (batch, keys), got {shown(attention_mask)}"
    if marks is not None and marks.is_other:
        return (
            "attention_mask: expected a causal or a full one with padding, got another pattern (a sliding "
            "window, packed sequences, ...)"
        )
    if window is not None:
        return f"sliding_window: expected None, got {shown(window)}"
    if marks is not None and marks.start:
        return f"past_key_values: expected none, or one new token, got {new} new ones after {marks.start}"
    return None


def _is_self(module: torch.nn.Module) -> bool:
    """Tell whether a module that looks both ways is sure to attend to its own tokens.

    A module of a decoder may attend to an encoder's tokens, which may be as many but have other padding.
    """
    config = getattr(module, "config", None)
    has_decoder = any(getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention"))
    return (config is not None and not has_decoder) or getattr(module, "is_decoder", None) is False


def _refuse_changes(keywords: dict[str, Any]) -> None:
    """Raise where an argument of the model changes attention in a way that estimators do not have."""
    for name in _CHANGES:
        if keywords.get(name) is not None:
            raise NotImplementedError(
                f"{name}: expected None, got {shown(keywords[name])}: randattn has no such thing"
            )
    if keywords.get("output_attentions"):
        raise NotImplementedError("output_attentions: expected False: there are no weights to give")


def _keys_of(attention_mask: torch.Tensor, marks: _Marks) -> torch.Tensor | None:
    """Return the key mask of a marked mask; None where no key is padding."""
    if not marks.is_padded:
        return None
    # The last query sees all keys that any query may see.
    keys = attention_mask[..., -1, :]
    return keys if keys.dtype == torch.bool else keys == 0


def _attention(
    estimator: Callable[..., Any],
    options: dict[str, Any],
    fallback: str,
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
    """Attend from `query` (batch, heads, tokens, features), and return (batch, tokens, heads, features)."""
    _refuse_changes(keywords)
    marks = _marks_of(attention_mask)
    if attention_mask is None and is_causal is None:
        if not hasattr(module, "is_causal"):
            raise NotImplementedError(f"is_causal: {type(module).__name__} does not say which it is")
        is_causal = module.is_causal
    beyond = _beyond(query, attention_mask, marks, keywords)
    if beyond is not None:
        if fallback == "error":
            raise NotImplementedError(
                f"{beyond}: register(..., fallback='exact') makes such calls exact, "
                "attn_implementation='sdpa' all of the model"
            )
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        bias = keywords.get("position_bias")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias=bias
        )
    if dropout:
        raise NotImplementedError(
            f"dropout: expected 0, got {shown(dropout)}: "
            "set the attention dropout of the model's configuration to 0"
        )
    keys = None
    if attention_mask is not None and marks is not None:
        is_causal, keys = marks.is_causal, _keys_of(attention_mask, marks)
    n = query.shape[-2]
    # In a step with a cache the new token is the last one: it sees all keys that are there.
    is_causal = bool(is_causal) and n > 1
    if is_causal and key.shape[-2] > n:
        # Places of a static cache from number N on come after all queries: no query sees them.
        key, value = key[..., :n, :], value[..., :n, :]
        keys = None if keys is None else keys[..., :n]
    masks = {"key_mask": keys}
    if n == key.shape[-2] and options.get("query_mask") is None and (is_causal or _is_self(module)):
        masks["query_mask"] = keys
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
        **masks,
        enable_gqa=query.shape[-3] != key.shape[-3],
    )
    # Models call `view` on the result, which needs its heads side by side in memory.
    return out.transpose(1, 2).contiguous(), None
