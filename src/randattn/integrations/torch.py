"""PyTorch: a layer as in the papers, and the signature of its own `scaled_dot_product_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from randattn import eva
from randattn._core.describe import shown
from randattn._estimators.registry import ESTIMATORS

from ._layer import (
    buckets,
    check_layer,
    draws_in_evaluation,
    masks_of,
    merge_heads,
    pooled,
    split_heads,
)
from ._layout import estimate, key_mask_of

if TYPE_CHECKING:
    from collections.abc import Callable


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
        True = attend; the same for all queries, of which none is padding unless a `query_mask` is among the
        options (..., N).
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
        raise NotImplementedError(
            f"dropout_p: expected 0, got {shown(dropout_p)}: no weights are there to drop"
        )
    out = estimate(
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
    if query.ndim > 2 and query.stride(-3) < query.stride(-2):
        # Heads that lie inside of tokens do so in PyTorch's result, where programs view them as one axis.
        out = out.transpose(-3, -2).contiguous().transpose(-3, -2)
    return out


class Attention(nn.Module):
    """Multi-head attention by an estimator, with what the papers train beside the projections.

    Parameters
    ----------
    features : int
        Of the inputs, of all heads together, and of the results.
    num_heads : int
        A divisor of them.
    estimator : {"eva", "adaptive_eva", "lara", "rfa", "ra", "softmax_attention"}, default "eva"
        The estimator.
    options : dict, optional
        As for the estimator.
    learned_landmarks : bool, default False
        For lara and eva: landmarks are ``LayerNorm(Linear(mean))`` of each segment's queries and keys.
    relative_bias : bool, default False
        For eva: T5's relative bias inside the window, learned for each head.
    num_buckets, max_distance : int, default 32, 128
        Of the relative bias.
    is_causal : bool, default False
        Query n sees the keys up to n.
    bias : bool, default True
        Let the projections have one.
    **factory
        `device` and `dtype` of the parameters.

    Raises
    ------
    ValueError
        Sizes and options that do not fit.

    Notes
    -----
    In training mode draws come from PyTorch's own random numbers, new in each call. In evaluation mode lara
    and eva draw nothing, rfa and ra from the seed 0. A call's own `rng` or `noise` goes before.
    `randattn.integrations.flax.Attention` gives the same with the same weights.

    References
    ----------
    .. [1] L. Zheng, J. Yuan, C. Wang, L. Kong, "Efficient Attention via Control Variates", ICLR 2023,
       arXiv 2302.04542.
    .. [2] C. Raffel et al., "Exploring the Limits of Transfer Learning", arXiv 1910.10683: the bias.

    Examples
    --------
    >>> import torch
    >>> from randattn.integrations.torch import Attention
    >>> options = {"num_groups": 8, "window": 16}
    >>> layer = Attention(32, 4, options=options, learned_landmarks=True, relative_bias=True)
    >>> layer(torch.randn(2, 100, 32)).shape
    torch.Size([2, 100, 32])
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        estimator: str = "eva",
        options: dict[str, Any] | None = None,
        learned_landmarks: bool = False,
        relative_bias: bool = False,
        num_buckets: int = 32,
        max_distance: int = 128,
        is_causal: bool = False,
        bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        options = dict(options or {})
        check_layer(
            features,
            num_heads,
            estimator,
            options,
            learned_landmarks=learned_landmarks,
            relative_bias=relative_bias,
            num_buckets=num_buckets,
            max_distance=max_distance,
            is_causal=is_causal,
        )
        self.num_heads, self.estimator, self.options, self.is_causal = (
            num_heads,
            estimator,
            options,
            is_causal,
        )
        self.query, self.key, self.value, self.out = (
            nn.Linear(features, features, bias=bias, **factory) for _ in range(4)
        )
        self.query_landmark = self.key_landmark = self.relative_bias = None
        if learned_landmarks:
            size = features // num_heads
            self.query_landmark, self.key_landmark = (
                nn.Sequential(nn.Linear(size, size, **factory), nn.LayerNorm(size, **factory))
                for _ in range(2)
            )
        if relative_bias:
            self.relative_bias = nn.Embedding(num_buckets, num_heads, **factory)
            nn.init.normal_(self.relative_bias.weight, std=0.02)
            places = buckets(options.get("window", 64), num_buckets, max_distance, is_causal=is_causal)
            places = torch.as_tensor(places, device=factory.get("device"))
            self.register_buffer("places", places, persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        key_mask: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        **own: Any,
    ) -> torch.Tensor:
        """Attend from `x` (..., N, F) to `context` (..., M, F), by default to itself.

        `key_mask` (..., M) is True where there is a key, `query_mask` (..., N) where a query is. Without a
        context one mask is both. Further options are the estimator's.
        """
        x, context, masks = masks_of(x, context, key_mask, query_mask)
        q, k, v = (
            split_heads(project(y), self.num_heads)
            for project, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        options = {**self._draws(x.device, own), **self.options, **own}
        if self.query_landmark is not None and self.key_landmark is not None:
            qt, kt = pooled(self.estimator, q, k, options, is_causal=self.is_causal, **masks)
            options["landmarks"] = (self.query_landmark(qt.to(q.dtype)), self.key_landmark(kt.to(k.dtype)))
            for name in ("num_landmarks", "num_groups"):
                options.pop(name, None)
        if self.relative_bias is not None:
            options["window_bias"] = self.relative_bias(self.places).movedim(-1, 0)
        out = estimate(
            ESTIMATORS[self.estimator].function, options, q, k, v, is_causal=self.is_causal, **masks
        )
        return self.out(merge_heads(out))

    def _draws(self, device: torch.device, own: dict[str, Any]) -> dict[str, Any]:
        is_given = any({**self.options, **own}.get(name) is not None for name in ("rng", "noise"))
        if is_given or ESTIMATORS[self.estimator].draws == "never":
            return {}
        if self.training:
            seed = int(torch.randint(2**62, ()))
            return {"rng": torch.Generator(device).manual_seed(seed)}
        return draws_in_evaluation(self.estimator)
