"""Memory that is held at once, as NumPy's allocations count it."""

from __future__ import annotations

import tracemalloc
from functools import partial

import numpy as np
import pytest

from randattn import adaptive_eva, eva, lara, ra, rfa, softmax_attention


def peak(function, n):
    """The most bytes allocated at a time during a call on n tokens, beyond the inputs."""
    q, k, v = np.random.default_rng(0).standard_normal((3, n, 8), dtype=np.float32)
    function(q[:64], k[:64], v[:64])
    tracemalloc.start()
    function(q, k, v)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.parametrize(
    "function", [softmax_attention, partial(softmax_attention, is_causal=True), partial(ra, rng=0)]
)
def test_no_whole_matrix_of_logits(function):
    """A float32 array of N x M would be 256 MiB."""
    n = 8192
    assert peak(function, n) < n * n * 4 / 2


LINEAR = [
    partial(rfa, rng=0),
    partial(rfa, rng=0, features="trigonometric"),
    partial(lara, rng=0),
    partial(lara, weighting="balance"),
    partial(eva, rng=0),
    partial(adaptive_eva),
    partial(eva, is_causal=True),
    partial(rfa, rng=0, is_causal=True),
    partial(lara, rng=0, is_causal=True),
]


@pytest.mark.parametrize("function", LINEAR, ids=lambda f: f"{f.func.__name__} {f.keywords}")
def test_memory_is_linear(function):
    """Four times the tokens, about four times the memory, of the order of N x (C + D)."""
    small, large = peak(function, 8192), peak(function, 32768)
    assert large < 5 * small
    assert large < 32768 * (64 + 8) * 4 * 8
