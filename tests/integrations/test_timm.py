"""timm's vision transformers, on their own exact attention and on the estimators."""

from __future__ import annotations

import pytest
import torch

timm = pytest.importorskip("timm", exc_type=ImportError)

from randattn import eva, lara, rfa, softmax_attention  # noqa: E402
from randattn.integrations.timm import Attention, replace_attention  # noqa: E402

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=4, num_classes=7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def test_exactly():
    model = vit()
    exact = model(IMAGES)
    for estimator, options in ((softmax_attention, {}), (eva, {"window": 65})):
        assert replace_attention(model, estimator, **options) == 2
        torch.testing.assert_close(model(IMAGES), exact, atol=1e-4, rtol=1e-4)
    for estimator, options in ((rfa, {"rng": 0}), (lara, {"num_landmarks": 8}), (eva, {"window": 8})):
        replace_attention(model, estimator, **options)
        assert (model(IMAGES) - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "norm_layer": torch.nn.LayerNorm}, {"gated": True}]
)
def test_as_timms_own(options):
    torch.manual_seed(0)
    theirs = timm.layers.Attention(24, 3, qkv_bias=True, **options).eval()
    ours = Attention(24, 3, qkv_bias=True, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.options = {"window": 20}
    x = torch.randn(2, 20, 24)
    keep = (torch.arange(20) < torch.tensor([20, 9])[:, None])[:, None, None, :]
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, keep), theirs(x, keep.expand(2, 1, 20, 20)))
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True))


def test_refusals():
    with pytest.raises(ValueError, match="model: Linear has no"):
        replace_attention(torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="dropout_p"):
        Attention(24, 3, attn_drop=0.1).train()(torch.randn(2, 20, 24))
