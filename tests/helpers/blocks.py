"""Block sizes small enough for a test's few tokens."""

from randattn._core import block_sizes

SIZES = {
    "PLAIN_LOGITS": 20,
    "PLAIN_MIN_KEYS": 5,
    "PLAIN_MIN_QUERIES": 1,
    "INPLACE_LOGITS": 20,
    "INPLACE_MIN_KEYS": 5,
    "INPLACE_MIN_QUERIES": 2,
    "INPLACE_FEW_QUERIES": 2,
    "GPU_LOGITS": 20,
    "SMALL_LOGITS": 0,
    "COMPILED_LOGITS": 20,
    "COMPILED_MOST_LOGITS": 10,
    "COMPILED_MIN_QUERIES": 2,
    "CAUSAL_TOKENS": 5,
}


def make_small(monkeypatch):
    """Cut the arrays of a test into many blocks."""
    for name, size in SIZES.items():
        monkeypatch.setattr(block_sizes, name, size)


def make_blocks(monkeypatch):
    """Have the few tokens of a test in blocks of the sizes that are used."""
    monkeypatch.setattr(block_sizes, "SMALL_LOGITS", 0)


def sizes():
    """Give the sizes that a compiled program depends on."""
    return tuple(getattr(block_sizes, name) for name in SIZES)
