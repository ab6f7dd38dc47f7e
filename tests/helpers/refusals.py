"""Inputs of calls that are refused, and the error that is expected."""

import re

import numpy as np
import pytest

from randattn import attend, eva, lara, ra, rfa, softmax_attention

N, M, D, E = 6, 5, 4, 3
ESTIMATOR_FUNCTIONS = {
    "softmax": (softmax_attention, {}),
    "rfa": (rfa, {"rng": 0}),
    "ra": (ra, {"rng": 0}),
    "lara": (lara, {}),
    "eva": (eva, {"window": 0}),
    "attend": (attend, {}),
}


def inputs(n=N, m=M):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in ((2, n, D), (2, m, D), (2, m, E))]


def refuses(kind, argument, *texts):
    """The message starts with the argument and has these texts."""
    return pytest.raises(kind, match=re.escape(f"{argument}: ") + ".*" + ".*".join(map(re.escape, texts)))
