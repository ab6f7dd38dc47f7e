"""PyTorch: the estimators with the signature of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from randattn import eva

from ._layout import estimate, key_mask_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    estimator: Callable[..., torch.Tensor] = eva,
    **options: Any,
) -> torch.Tensor:
    """Estimate attention where a program calls PyTorch's own.

    Parameters
    ----------
    query : Tensor, shape (..., Hq, N, D)
        Queries.
    key : Tensor, shape (..., H, M, D)
        Keys.
    value : Tensor, shape (..., H, M, E)
        Values.
    attn_mask : Tensor of bool, shape (..., 1, M), optional
        True = attend; the same for all queries.
    dropout_p : float, default 0.0
        Zero alone: no weights are there to drop.
    is_causal : bool, default False
        Query n sees the keys up to n; N = M.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    enable_gqa : bool, default False
        Let `query` have a multiple of the heads of `key` and `value`.
    estimator : function, default `randattn.eva`
        The estimator.
    **options
        As for the estimator.

    Returns
    -------
    Tensor, shape (..., Hq, N, E)
        The estimate.

    Raises
    ------
    NotImplementedError
        Dropout, or a mask of another kind: never ignored.

    Examples
    --------
    >>> import torch
    >>> from randattn.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 2, 8, 100, 16)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True, window=16).shape
    torch.Size([2, 8, 100, 16])
    """
    if dropout_p:
        raise NotImplementedError(f"dropout_p: expected 0, got {dropout_p}: no weights are there to drop")
    return estimate(
        estimator,
        options,
        query,
        key,
        value,
        is_causal=is_causal,
        key_mask=key_mask_of(attn_mask, key.shape[-2], "attn_mask"),
        scale=scale,
        enable_gqa=enable_gqa,
    )
