"""timm: its `Attention` with an estimator inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import timm.layers

from randattn import eva

from .torch import scaled_dot_product_attention

if TYPE_CHECKING:
    import torch


class Attention(timm.layers.Attention):
    """`timm.layers.Attention` with an estimator inside; parameters and weights are the same.

    Attributes
    ----------
    estimator : function
        The estimator, by default `randattn.eva`.
    options : dict
        Options of the estimator.
    """

    # Attributes of the class: `replace_attention` changes the class of a module without a call of `__init__`.
    estimator: Callable[..., torch.Tensor] = staticmethod(eva)
    options: dict[str, Any] = {}  # noqa: RUF012

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Attend among the tokens (batch, N, F); `attn_mask` (batch, 1, 1, N) is True = attend."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            attn_mask,
            self.attn_drop.p if self.training else 0.0,
            is_causal,
            estimator=self.estimator,
            **self.options,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def replace_attention(
    model: torch.nn.Module, estimator: Callable[..., torch.Tensor] = eva, /, **options: Any
) -> int:
    """Replace attention by an estimator in every `timm.layers.Attention` of a model.

    Parameters
    ----------
    model : torch.nn.Module
        The model, which is changed in place; its weights stay as they are.
    estimator : function, default `randattn.eva`
        The estimator.
    **options
        Options of the estimator. An int `rng` is a seed, to which each layer adds its number.

    Returns
    -------
    int
        Number of layers that were changed.

    Raises
    ------
    ValueError
        A model without such a layer.

    Examples
    --------
    >>> import timm, torch
    >>> from randattn import lara
    >>> from randattn.integrations.timm import replace_attention
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    >>> replace_attention(model, lara, num_landmarks=8)
    2
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
    """
    found = [module for module in model.modules() if type(module) in (timm.layers.Attention, Attention)]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no timm.layers.Attention")
    for number, module in enumerate(found):
        module.__class__ = Attention
        # One seed for all layers would give them the same draws.
        own = {"rng": options["rng"] + number} if isinstance(options.get("rng"), int) else {}
        module.estimator, module.options = estimator, {**options, **own}
    return len(found)
