"""PyTorch: the layer of the papers, and estimators in the form of `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from randattn import eva
from randattn._core.describe import shown

from ._layer import attended, buckets, check_layer, check_relative_bias
from ._layout import estimate, key_mask_of


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
    """Estimate attention with the arguments of PyTorch's own function of this name.

    Parameters
    ----------
    query : Tensor, shape (..., Hq, N, D)
        Queries.
    key : Tensor, shape (..., H, M, D)
        Keys.
    value : Tensor, shape (..., H, M, E)
        Values.
    attn_mask : Tensor of bool, shape (..., 1, M), optional
        True = attend, the same for all queries. Every query has a row, unless a `query_mask` (..., N) is
        among the options.
    dropout_p : float, default 0.0
        Must be zero: estimators have no weights to drop.
    is_causal : bool, default False
        Query n sees the keys up to n. Requires N = M.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    enable_gqa : bool, default False
        Allow `query` a multiple of the heads of `key` and `value`.
    estimator : function, default `randattn.eva`
        The estimator.
    **options
        Options of the estimator.

    Returns
    -------
    Tensor, shape (..., Hq, N, E)
        The estimate.

    Raises
    ------
    NotImplementedError
        Dropout, or a mask of another kind; neither is ignored.

    Examples
    --------
    >>> import torch
    >>> from randattn.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 2, 8, 100, 16)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True, window=16).shape
    torch.Size([2, 8, 100, 16])
    """
    if is_causal and query.shape[-2] != key.shape[-2]:
        # PyTorch's own flag takes the first n tokens as the queries, the estimators the last.
        expected, got = query.shape[-2], key.shape[-2]
        raise ValueError(f"is_causal: expected as many keys as queries ({expected}), got {got}")
    if dropout_p:
        raise NotImplementedError(
            f"dropout_p: expected 0, got {shown(dropout_p)}: estimators have no weights to drop"
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
        # Where heads lie inside tokens in memory, PyTorch's own result has that layout, and programs call
        # `view` on it: another layout would be an error there.
        out = out.transpose(-3, -2).contiguous().transpose(-3, -2)
    return out


class Attention(nn.Module):
    """Multi-head attention by an estimator, with the learned landmarks and the relative bias of the papers.

    Parameters
    ----------
    features : int
        Number of features of the inputs, of all heads together, and of the results.
    num_heads : int
        Number of heads, a divisor of `features`.
    estimator : {"eva", "adaptive_eva", "lara", "rfa", "ra", "softmax_attention"}, default "eva"
        Name of the estimator.
    options : dict, optional
        Options of the estimator.
    learned_landmarks : bool, default False
        For lara and eva: landmarks are ``LayerNorm(Linear(mean))`` of each segment's queries and keys [1]_.
    relative_bias : bool, default False
        For eva: T5's relative bias [2]_ inside the window, learned for each head.
    num_buckets, max_distance : int, default 32, 128
        Number of buckets of the relative bias, and the distance from which on all keys are in the last one.
    is_causal : bool, default False
        Query n sees the keys up to n.
    bias : bool, default True
        True gives the projections a bias.
    **factory
        `device` and `dtype` of the parameters.

    Raises
    ------
    ValueError
        Sizes and options that do not fit.

    Notes
    -----
    In training mode each call draws anew, by PyTorch's own random numbers. In evaluation mode lara and eva
    draw nothing, rfa and ra draw from the seed 0. An `rng` or `noise` of a call has precedence.
    `randattn.integrations.flax.Attention` gives the same results with the same weights.

    References
    ----------
    .. [1] L. Zheng, J. Yuan, C. Wang, L. Kong, "Efficient Attention via Control Variates", ICLR 2023,
       arXiv 2302.04542.
    .. [2] C. Raffel et al., "Exploring the Limits of Transfer Learning", arXiv 1910.10683.

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
        check_layer(features, num_heads, estimator, learned_landmarks=learned_landmarks)
        if relative_bias:
            check_relative_bias(estimator, options, num_buckets, max_distance, is_causal=is_causal)
        self.num_heads, self.is_causal = num_heads, is_causal
        self.estimator, self.options = estimator, options
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
            # A buffer follows the module to another device. It is made with the module, and not saved.
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

        `key_mask` (..., M) and `query_mask` (..., N) are False for padding. Without a context `query_mask` is
        `key_mask` by default. Further options are those of the estimator.
        """
        bias = None if self.relative_bias is None else self.relative_bias(self.places).movedim(-1, 0)
        draw = partial(_generator, x.device) if self.training else None
        return attended(self, x, context, key_mask, query_mask, own, window_bias=bias, draw=draw)


def _generator(device: torch.device) -> torch.Generator:
    # A seed from PyTorch's global generator on the host: `torch.manual_seed` decides the draws, on a
    # generator of the device that no other code uses.
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
