"""Block sizes small enough for a test's few tokens."""

import sys

from randattn import _attend, _fused, _inplace, _rfa

SIZES = [
    (_attend, "_BLOCK_LOGITS", 20),
    (_attend, "_MIN_BLOCK_KEYS", 5),
    (_attend, "_MIN_BLOCK_QUERIES", 1),
    (_fused, "SMALL", 0),
    (_fused, "GPU_BLOCK_LOGITS", 20),
    (_inplace, "BLOCK_LOGITS", 20),
    (_inplace, "_MIN_BLOCK_KEYS", 5),
    (_inplace, "_MIN_BLOCK_QUERIES", 2),
    (_inplace, "_FEW_QUERIES", 2),
    (_rfa, "_BLOCK_TOKENS", 5),
]
IN_JAX = [("_BLOCK_LOGITS", 20), ("_MOST_LOGITS", 10), ("_MIN_BLOCK_QUERIES", 2)]


def _all():
    yield from SIZES
    if "torch" in sys.modules:
        from randattn import _fused_torch

        yield _fused_torch, "SMALL", 0
    if "jax" in sys.modules:
        from randattn import _fused_jax

        yield from ((_fused_jax, *size) for size in IN_JAX)


def make_small(monkeypatch):
    """Cut the arrays of a test into many blocks."""
    for module, name, size in _all():
        monkeypatch.setattr(module, name, size)


def make_blocks(monkeypatch):
    """Have the few tokens of a test in blocks of the sizes that are used."""
    for module, name, size in _all():
        if name == "SMALL":
            monkeypatch.setattr(module, name, size)


def sizes():
    """What a compiled program depends on."""
    return tuple(getattr(module, name) for module, name, _ in _all())
