"""Read samples of trained models' queries, keys and values, to try estimators on."""

from __future__ import annotations

import importlib.resources
import io
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

# The files of the samples, by name.
SAMPLES = {"encoder": "attention_inputs.npz", "language-model": "language_model_inputs.npz"}


class Sample(NamedTuple):
    """The inputs of attention, and the scale of their logits; README.md in this folder names the sources.

    Attributes
    ----------
    q, k, v : ndarrays of float16
        Queries, keys and values. "encoder": shape (6, 1, 512, 32), one head of each of six layers, for 512
        tokens. "language-model": q (2, 2048, 64), k and v (1, 2048, 64), two query heads that share a key
        head, for 2,048 tokens; its attention is causal.
    scale : float
        Factor of the logits.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float


def read_sample(name: str = "encoder") -> Sample:
    """Read a sample that this package carries.

    Parameters
    ----------
    name : {"encoder", "language-model"}, default "encoder"
        The model: a sentence encoder, or a causal language model.

    Returns
    -------
    Sample
        The arrays and the scale.

    Raises
    ------
    ValueError
        Another name.

    Examples
    --------
    >>> from randattn import softmax_attention
    >>> from randattn.data import read_sample
    >>> read_sample().q.shape[-2:]
    (512, 32)
    >>> q, k, v, scale = read_sample("language-model")
    >>> softmax_attention(q, k, v, scale=scale, is_causal=True).shape
    (2, 2048, 64)
    """
    import numpy as np

    if name not in SAMPLES:
        raise ValueError(f"name: expected one of {', '.join(SAMPLES)}, got {name!r}")
    # By its bytes, not by a path: the package may be in a zip file.
    file = importlib.resources.files(__name__) / SAMPLES[name]
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
        return Sample(arrays["q"], arrays["k"], arrays["v"], float(arrays["scale"]))
