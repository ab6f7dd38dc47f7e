"""Tell whether a CUDA device can be used.

``python -m tests.programs.cuda driver`` asks the driver, before anything is downloaded: it prints the driver's
CUDA major version. ``python -m tests.programs.cuda torch`` (``jax``, ``cupy``) computes by that library: its
packages may not get on with the driver, or have no kernels for the device. Both print the reason and exit with
status 1 where there is no such device.
"""

from __future__ import annotations

import ctypes
import os
import sys


def driver() -> str:
    """Return the driver's CUDA major version, 12 or 13.

    Raises
    ------
    RuntimeError
        If there is no driver, no device, or a driver that is too old.
    """
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        raise RuntimeError("no CUDA device: no CUDA driver is installed") from None
    count, version = ctypes.c_int(), ctypes.c_int()
    for status in (
        library.cuInit(0),
        library.cuDeviceGetCount(ctypes.byref(count)),
        library.cuDriverGetVersion(ctypes.byref(version)),
    ):
        if status:
            raise RuntimeError(f"no CUDA device: the driver says error {status}")
    if not count.value:
        raise RuntimeError("no CUDA device: the driver sees none")
    major, minor = version.value // 1000, version.value % 1000 // 10
    if major < 12:
        raise RuntimeError(
            f"no usable CUDA device: the driver is for CUDA {major}.{minor}, expected 12 or newer"
        )
    return str(min(major, 13))


def computed_by(library: str) -> str:
    """Return the sum of a product of matrices that the library computed on the device.

    Raises
    ------
    RuntimeError
        If the library fails, with its own error's first line, or computes something else.
    """
    try:
        if library == "cupy":
            import cupy

            x = cupy.ones((64, 64))
        elif library == "torch":
            import torch

            x = torch.ones((64, 64), device="cuda")
        else:
            import jax

            x = jax.device_put(jax.numpy.ones((64, 64)), jax.devices("cuda")[0])
        found = str(float((x @ x).sum()))
    # Each library has errors of its own for the same cause.
    except Exception as error:  # noqa: BLE001
        found = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if found != str(64.0**3):
        raise RuntimeError(f"no usable CUDA device: {library} gives {found}")
    return found


if __name__ == "__main__":
    try:
        print(driver() if sys.argv[1] == "driver" else computed_by(sys.argv[1]))
    except RuntimeError as error:
        print(error)
        sys.exit(1)
