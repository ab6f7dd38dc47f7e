"""CuPy: in place, in blocks large enough for a GPU. No method here waits for the device."""

from __future__ import annotations

from .numpy import InPlace


class Cupy(InPlace):
    """CuPy's arrays."""

    name = "cupy"


BACKEND = Cupy()
