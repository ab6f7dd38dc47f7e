"""The inputs that a model gives its attention: captured, saved, and read by the command."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from randattn import softmax_attention  # noqa: E402
from randattn.cli.errors import Refused  # noqa: E402
from randattn.cli.files import read_inputs  # noqa: E402
from randattn.integrations.capture import capture, save  # noqa: E402

B, H, N, D = 2, 4, 12, 8


class Model(torch.nn.Module):
    """Two calls of attention, of which each call's options are given."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.results = options, []

    def forward(self, q, k, v):
        for factor in (1.0, 2.0):
            found = torch.nn.functional.scaled_dot_product_attention(factor * q, k, v, **self.options)
            self.results.append(found.detach().numpy())
        return found


def inputs(heads=H):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, count, N, D, generator=generator) for count in (H, heads, heads))


def masks():
    """Masks of right padding, in the forms of models: (B, 1, 1, N), causal (B, 1, N, N), added to logits."""
    keys = (torch.arange(N) < torch.tensor([[9], [12]]))[:, None, None, :]
    causal = keys & torch.ones(N, N, dtype=torch.bool).tril()
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    return {"keys": keys, "causal": causal, "added": added}


@pytest.mark.parametrize(
    ("options", "is_causal", "is_masked"),
    [
        ({}, False, False),
        ({"is_causal": True, "scale": 0.5}, True, False),
        ({"attn_mask": masks()["keys"]}, False, True),
        ({"attn_mask": masks()["causal"]}, True, True),
        ({"attn_mask": masks()["added"]}, True, True),
    ],
)
def test_calls_of_pytorch(options, is_causal, is_masked):
    """Exact attention of what is captured is the model's own result."""
    model = Model(**options)
    calls = capture(model, inputs())
    assert len(calls) == 2
    for call, result in zip(calls, model.results, strict=True):
        assert call.is_causal == is_causal
        assert (call.key_mask is not None) == is_masked
        out = softmax_attention(*call[:3], scale=call.scale, is_causal=is_causal, key_mask=call.key_mask)
        rows = np.ones((B, 1, N), dtype=bool) if call.key_mask is None else call.key_mask
        np.testing.assert_allclose(out * rows[..., None], result * rows[..., None], rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.scaled_dot_product_attention.__module__ != "randattn.integrations.capture"


def test_rows_of_padding_may_see_all():
    """Left padding: the masks of models let its queries see every key, so that no row is empty."""
    keys = (torch.arange(N) >= torch.tensor([[3], [0]]))[:, None, None, :]
    mask = keys & torch.ones(N, N, dtype=torch.bool).tril()
    mask = mask | ~mask.any(-1, keepdim=True)
    (call, _) = capture(Model(attn_mask=mask), inputs())
    assert call.is_causal
    np.testing.assert_array_equal(call.key_mask, keys[:, :, 0].numpy())


def test_multihead_attention_in_evaluation():
    """Its fused path in evaluation mode calls no function that could be looked at."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    (call,) = capture(layer, torch.randn(2, 10, 32))
    assert call.q.shape == (2, 4, 10, 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_modules_of_flax():
    nnx = pytest.importorskip("flax.nnx")
    import jax.numpy as jnp

    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    own = layer.attention_fn
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, N, 8)), dtype=jnp.float32)
    mask = nnx.make_causal_mask(x[..., 0])
    (call,) = capture(layer, {"inputs_q": x, "mask": mask})
    assert layer.attention_fn is own
    assert call.is_causal
    assert call.q.shape == (1, 2, N, 4)
    out = softmax_attention(*call[:3], is_causal=True)
    heads = np.einsum("bhnd,hdf->bnf", out, layer.out.kernel[...]) + layer.out.bias[...]
    np.testing.assert_allclose(heads, layer(x, mask=mask), rtol=1e-4, atol=1e-5)


def test_what_is_not_captured():
    with pytest.raises(NotImplementedError, match="a bias of pairs"):
        capture(Model(attn_mask=torch.randn(N, N)), inputs())
    window = torch.ones(N, N, dtype=torch.bool).tril() & torch.ones(N, N, dtype=torch.bool).triu(-3)
    with pytest.raises(NotImplementedError, match="one of keys or a causal one"):
        capture(Model(attn_mask=window), inputs())
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        capture(torch.nn.Linear(3, 3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="expected one of PyTorch or flax.nnx"):
        capture(object(), ())


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_the_command_reads_what_is_saved(tmp_path, ending):
    """Grouped heads are repeated; a mask and causality are read."""
    q, k, v = inputs(heads=2)
    calls = capture(Model(attn_mask=masks()["causal"], enable_gqa=True), (q, k, v))
    path = tmp_path / f"calls.{ending}"
    save(path, calls)
    found = read_inputs(path)
    assert (found.q.shape, found.k.shape) == ((2, B, H, N, D), (2, B, H, N, D))
    assert found.is_causal
    np.testing.assert_array_equal(found.k[0], np.repeat(k.numpy(), 2, axis=1))
    np.testing.assert_array_equal(found.key_mask, np.stack([masks()["keys"][:, :, 0].numpy()] * 2))
    assert found.scale == pytest.approx(D**-0.5)


def test_a_mask_of_each_key_head_is_repeated_with_it(tmp_path):
    mask = np.random.default_rng(0).random((B, 2, N)) < 0.8
    mask[..., 0] = True
    arrays = {name: x.numpy() for name, x in zip("qkv", inputs(heads=2), strict=True)}
    np.savez(tmp_path / "grouped.npz", **arrays, key_mask=mask)
    found = read_inputs(tmp_path / "grouped.npz")
    out = softmax_attention(found.q, found.k, found.v, **found.mask)
    expected = softmax_attention(*arrays.values(), key_mask=mask, enable_gqa=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_calls_of_several_kinds_are_not_saved(tmp_path):
    calls = capture(Model(), inputs())
    with pytest.raises(ValueError, match="at number 1"):
        save(tmp_path / "calls.npz", [calls[0], calls[1]._replace(scale=1.0)])
    with pytest.raises(ValueError, match=r"\.npz or \.safetensors"):
        save(tmp_path / "calls.txt", calls)
    with pytest.raises(ValueError, match="at least one"):
        save(tmp_path / "calls.npz", [])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"is_causal": np.asarray([1.0])}, "is_causal: expected one boolean"),
        ({"key_mask": np.ones((3, N), dtype=bool)}, "key_mask: expected booleans of shape"),
        ({"key_mask": np.zeros(N, dtype=bool)}, "key_mask: masks all keys"),
        ({"causal": np.asarray([True])}, "optionally scale, is_causal, key_mask"),
    ],
)
def test_faults_of_a_file(tmp_path, more, text):
    path = tmp_path / "calls.npz"
    np.savez(path, **{name: x.numpy() for name, x in zip("qkv", inputs(), strict=True)}, **more)
    with pytest.raises(Refused, match=text):
        read_inputs(path)
