"""Capture the inputs of a model's attention, for `randattn compare` and `randattn diagnose`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np


class Captured(NamedTuple):
    """The inputs of one call of attention.

    Attributes
    ----------
    q : ndarray, shape (..., H, N, D)
        Queries.
    k, v : ndarrays, shapes (..., Hk, M, D) and (..., Hk, M, E)
        Keys and values; H is a multiple of Hk.
    scale : float
        Factor of the logits.
    is_causal : bool
        Whether each query sees the keys up to itself alone.
    key_mask : ndarray of bool, shape (..., 1, M), or None
        False = padding.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    is_causal: bool
    key_mask: np.ndarray | None


def capture(model: Any, inputs: Any) -> list[Captured]:
    """Run a model once, without gradients, and return the inputs of its calls of attention, in their order.

    Parameters
    ----------
    model : torch.nn.Module or flax.nnx.Module
        A model of PyTorch whose attention is `torch.nn.functional.scaled_dot_product_attention` (Hugging Face
        models with ``attn_implementation="sdpa"``, timm, `torch.nn.MultiheadAttention`), or a model of Flax
        with attention modules that have an `attention_fn`.
    inputs : mapping, tuple, list or array
        The model is called as ``model(**inputs)``, ``model(*inputs)`` or ``model(inputs)``.

    Returns
    -------
    list of Captured
        One for each call. A causal mask, and one that is the same for all queries, become `is_causal` and
        `key_mask`.

    Raises
    ------
    TypeError
        A model of another library.
    ValueError
        A model that makes no such call.
    NotImplementedError
        A bias of pairs, or a mask of another form.

    See Also
    --------
    save : Write the file that the command reads.

    Examples
    --------
    >>> import torch
    >>> from randattn.integrations.capture import capture
    >>> layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    >>> x = torch.randn(1, 50, 32)
    >>> (found,) = capture(layer, (x, x, x, None, False))
    >>> found.q.shape
    (1, 4, 50, 8)
    """
    found: list[Captured] = []
    torch, nnx = sys.modules.get("torch"), sys.modules.get("flax.nnx")
    if torch is not None and isinstance(model, torch.nn.Module):
        recording = _recording_torch(torch, found)
    elif nnx is not None and isinstance(model, nnx.Module):
        recording = _recording_flax(model, found)
    else:
        raise TypeError(f"model: expected one of PyTorch or flax.nnx, got {type(model).__name__}")
    with recording:
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, tuple | list):
            model(*inputs)
        else:
            model(inputs)
    if not found:
        raise ValueError(
            "model: expected calls of attention, got none: load a Hugging Face model with "
            'attn_implementation="sdpa"; a module of Flax needs an attention_fn'
        )
    return found


def save(path: Path | str, calls: Sequence[Captured]) -> None:
    """Write captured inputs to a file for ``randattn compare --input`` and ``randattn diagnose --input``.

    Parameters
    ----------
    path : Path or str
        A name that ends in .npz or .safetensors.
    calls : sequence of Captured
        The calls, which become a leading axis; a part of those of a model where their shapes differ.

    Raises
    ------
    ValueError
        No calls, calls of different shapes, scales or causality, or another name.

    Examples
    --------
    >>> import tempfile, torch
    >>> from randattn.integrations.capture import capture, save
    >>> layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    >>> x = torch.randn(1, 50, 32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/attention.npz", capture(layer, (x, x, x, None, False)))
    """
    path = Path(path)
    if not calls:
        raise ValueError("calls: expected at least one, got none")
    kinds = [
        (*(x.shape for x in one[:3]), one.scale, one.is_causal, None if one[5] is None else one[5].shape)
        for one in calls
    ]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(f"calls: expected all like the first, {kinds[0]}, got {kind} at number {number}")
    arrays = {name: np.stack([getattr(one, name) for one in calls]) for name in "qkv"}
    arrays |= {"scale": np.asarray([calls[0].scale]), "is_causal": np.asarray([calls[0].is_causal])}
    if calls[0].key_mask is not None:
        arrays["key_mask"] = np.stack([one.key_mask for one in calls if one.key_mask is not None])
    if path.suffix.lower() == ".npz":
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    elif path.suffix.lower() == ".safetensors":
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)
    else:
        raise ValueError(f"path: expected a name that ends in .npz or .safetensors, got {str(path)!r}")


@contextlib.contextmanager
def _recording_torch(torch: Any, found: list[Captured]) -> Iterator[None]:
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Any:
        mask = None if attn_mask is None else _numpy_of_torch(attn_mask)
        arrays = tuple(map(_numpy_of_torch, (query, key, value)))
        found.append(_captured(arrays, mask, scale, is_causal=is_causal))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)

    # The fused path of `MultiheadAttention` and of encoders calls no function of Python.
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(functional, "scaled_dot_product_attention", attention), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)


def _numpy_of_torch(x: Any) -> np.ndarray:
    x = x.detach().cpu()
    found: np.ndarray = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy().copy()
    return found


@contextlib.contextmanager
def _recording_flax(model: Any, found: list[Captured]) -> Iterator[None]:
    from flax import nnx

    with contextlib.ExitStack() as stack:
        for _, module in nnx.iter_modules(model):
            original = getattr(module, "attention_fn", None)
            if original is None:
                continue

            def attention(
                q: Any, k: Any, v: Any, *args: Any, _original: Any = original, **options: Any
            ) -> Any:
                bias = options.get("bias", args[0] if args else None)
                mask = options.get("mask", args[1] if len(args) > 1 else None)
                if bias is not None:
                    raise NotImplementedError("bias: a bias of pairs is not captured")
                arrays = tuple(np.swapaxes(np.asarray(x, dtype=np.float32), -2, -3) for x in (q, k, v))
                mask = None if mask is None else np.asarray(mask).astype(bool)
                is_causal = bool(options.get("is_causal", False))
                found.append(_captured(arrays, mask, None, is_causal=is_causal))
                return _original(q, k, v, *args, **options)

            stack.enter_context(mock.patch.object(module, "attention_fn", attention))
        yield


def _captured(
    arrays: tuple[np.ndarray, ...], mask: np.ndarray | None, scale: float | None, *, is_causal: bool
) -> Captured:
    q, k, v = arrays
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    n, m = q.shape[-2], k.shape[-2]
    if is_causal and n != m:
        raise NotImplementedError(f"is_causal: expected as many keys as queries ({n}), got {m}")
    key_mask = None
    if mask is not None:
        is_causal, key_mask = _parts_of(_as_bool(mask), n, m)
    return Captured(q, k, v, factor, is_causal and n > 1, key_mask)


def _as_bool(mask: np.ndarray) -> np.ndarray:
    """Return a mask that is added to the logits as booleans."""
    if mask.dtype == np.bool_:
        return mask
    # Models mask with the least finite number, or with some -1e4 in half precision.
    keep: np.ndarray = mask == 0
    if not (keep | (mask <= -1e4)).all():
        raise NotImplementedError("attn_mask: a bias of pairs is not captured")
    return keep


def _parts_of(mask: np.ndarray, n: int, m: int) -> tuple[bool, np.ndarray | None]:
    """Return whether a mask (..., N, M) is causal, and the key mask (..., M) that is left, or None."""
    mask = np.broadcast_to(mask, (*mask.shape[:-2], n, m))
    keys, is_causal = mask[..., -1, :], False
    # Rows of padding may see all keys, so that no softmax is over nothing: they are not compared.
    rows = keys if n == m else np.ones((*keys.shape[:-1], n), dtype=bool)

    def is_mask(expected: np.ndarray) -> bool:
        return bool(((mask == expected) | ~rows[..., None]).all())

    if not is_mask(keys[..., None, :]):
        is_causal = n == m and is_mask(keys[..., None, :] & np.tri(n, dtype=bool))
        if not is_causal:
            raise NotImplementedError(f"attn_mask: expected one of keys or a causal one, got {mask.shape}")
    return is_causal, None if keys.all() else np.ascontiguousarray(keys)
