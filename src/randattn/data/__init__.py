"""Read a sample of a trained model's queries, keys and values, to try estimators on."""

from __future__ import annotations

import importlib.resources
import io
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Sample(NamedTuple):
    """The inputs of attention, and the scale of their logits; README.md in this folder names the source.

    Attributes
    ----------
    q, k, v : ndarrays of float16, shape (6, 1, 512, 32)
        Queries, keys and values of one head of each of six layers, for 512 tokens.
    scale : float
        Factor of the logits.
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
        The arrays and the scale.

    Examples
    --------
    >>> from randattn.data import read_sample
    >>> read_sample().q.shape[-2:]
    (512, 32)
    """
    import numpy as np

    # By its bytes, not by a path: the package may be in a zip file.
    file = importlib.resources.files(__name__) / "attention_inputs.npz"
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
        return Sample(arrays["q"], arrays["k"], arrays["v"], float(arrays["scale"]))
