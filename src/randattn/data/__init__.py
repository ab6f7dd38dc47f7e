"""Queries, keys and values of a trained model's attention, to try estimators on."""

from __future__ import annotations

import importlib.resources
import io
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Sample(NamedTuple):
    """Inputs of attention, and the scale of their logits; see README.md in this folder for their source.

    Attributes
    ----------
    q, k, v : ndarrays of float16, shape (6, 1, 512, 32)
        Of one head of each of six layers, 512 tokens.
    scale : float
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float


def read_sample() -> Sample:
    """Read the sample that this package carries.

    Returns
    -------
    Sample

    Examples
    --------
    >>> from randattn.data import read_sample
    >>> read_sample().q.shape[-2:]
    (512, 32)
    """
    import numpy as np

    file = importlib.resources.files(__name__) / "attention_inputs.npz"
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
        return Sample(arrays["q"], arrays["k"], arrays["v"], float(arrays["scale"]))
