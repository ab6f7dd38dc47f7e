"""The signature of PyTorch's own attention function, against it."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch.nn import functional

from randattn import eva, lara, rfa, softmax_attention
from randattn.integrations.torch import scaled_dot_product_attention

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = torch.randn(3, 2, 4, 20, 8, generator=GENERATOR)
KEEP = torch.arange(20) < torch.tensor([20, 13])[:, None]
exactly = partial(scaled_dot_product_attention, estimator=softmax_attention)


def test_signature():
    ours = list(inspect.signature(scaled_dot_product_attention).parameters.values())
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert [one.name for one in ours[:8]] == names
    assert all(name in functional.scaled_dot_product_attention.__doc__ for name in names)
    assert [one.default for one in ours[3:8]] == [None, 0.0, False, None, False]


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.7}, {"attn_mask": KEEP[:, None, None, :]}, {"enable_gqa": True}],
)
def test_as_pytorchs_own(options):
    k, v = (x[:, ::2] if options.get("enable_gqa") else x for x in (K, V))
    exact = functional.scaled_dot_product_attention(Q, k, v, **options)
    torch.testing.assert_close(exactly(Q, k, v, **options), exact)
    torch.testing.assert_close(scaled_dot_product_attention(Q, k, v, **options, window=20), exact)


@pytest.mark.parametrize(
    "estimator, options", [(softmax_attention, {}), (rfa, {"rng": 0}), (lara, {}), (eva, {})]
)
def test_views(estimator, options):
    """View results as programs view PyTorch's, with heads split from tokens, and with heads first."""
    split = Q.transpose(1, 2).contiguous().transpose(1, 2)
    packed = torch.randn(2, 20, 3, 4, 8, generator=GENERATOR).permute(2, 0, 3, 1, 4)
    ours = partial(scaled_dot_product_attention, estimator=estimator, **options)
    for function in (functional.scaled_dot_product_attention, ours):
        for q, k, v in ((split, split, split), packed):
            assert function(q, k, v).transpose(1, 2).view(2, 20, 32).shape == (2, 20, 32)
        assert function(Q, K, V).view(8, 20, 8).shape == (8, 20, 8)
    if estimator is softmax_attention:
        torch.testing.assert_close(ours(*packed), functional.scaled_dot_product_attention(*packed))


def test_other_keys_than_queries():
    for estimator, options in ((eva, {"num_groups": 20}), (rfa, {"rng": 0}), (lara, {})):
        out = scaled_dot_product_attention(Q[..., :7, :], K, V, estimator=estimator, **options)
        assert out.shape == (2, 4, 7, 8)
    one = Q[..., :1, :]
    torch.testing.assert_close(
        scaled_dot_product_attention(one, K, V), functional.scaled_dot_product_attention(one, K, V)
    )


def test_in_the_place_of_pytorchs_own(monkeypatch):
    """A module that calls it by its name."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    x = torch.randn(2, 10, 16, generator=GENERATOR)
    # In training mode, which calls the function; else PyTorch takes a path of its own.
    exact, calls = layer(x), []

    def ours(*arrays, **options):
        calls.append(options)
        return scaled_dot_product_attention(*arrays, **options, window=10)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", ours)
    torch.testing.assert_close(layer(x), exact)
    assert calls


def test_what_is_not_supported_is_refused():
    with pytest.raises(NotImplementedError, match="dropout_p"):
        exactly(Q, K, V, dropout_p=0.1)
    with pytest.raises(NotImplementedError, match="same for all queries"):
        exactly(Q, K, V, attn_mask=torch.ones(20, 20, dtype=torch.bool).tril())
    with pytest.raises(NotImplementedError, match="same for all queries"):
        exactly(Q, K, V, attn_mask=torch.ones(20, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="expected booleans"):
        exactly(Q, K, V, attn_mask=torch.zeros(1, 20))
    with pytest.raises(ValueError, match="as many keys as queries"):
        exactly(Q[..., :7, :], K, V, is_causal=True)
    with pytest.raises(TypeError, match="key_mask: expected of the call"):
        exactly(Q, K, V, key_mask=KEEP[:, None, :])
