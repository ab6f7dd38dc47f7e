"""CuPy: averages in place, in blocks for a GPU. No method here waits for the device."""

from __future__ import annotations

from .numpy import InPlace


class Cupy(InPlace):
    """CuPy's arrays."""

    name = "cupy"
    # `writing.looks` stays False: reading a value on the host would wait for the device.


BACKEND = Cupy()
