"""Block sizes small enough for a test's few tokens."""

from randattn import _attend, _fused, _inplace

SIZES = [
    (_attend, "_BLOCK_LOGITS", 20),
    (_attend, "_MIN_BLOCK_KEYS", 5),
    (_attend, "_MIN_BLOCK_QUERIES", 1),
    (_inplace, "BLOCK_LOGITS", 20),
    (_inplace, "_MIN_BLOCK_KEYS", 5),
    (_inplace, "_MIN_BLOCK_QUERIES", 2),
    (_fused, "_JAX_BLOCK_LOGITS", 20),
    (_fused, "_JAX_MOST_LOGITS", 10),
    (_fused, "_MIN_BLOCK_QUERIES", 2),
]


def make_small(monkeypatch):
    """Cut the arrays of a test into many blocks."""
    for module, name, size in SIZES:
        monkeypatch.setattr(module, name, size)


def sizes():
    """What a compiled program depends on."""
    return tuple(getattr(module, name) for module, name, _ in SIZES)
