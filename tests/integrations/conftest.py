"""torchvision, which timm imports, without what it has compiled: its wheel is for CUDA where PyTorch's is not."""

from __future__ import annotations

import importlib
import re
import sys

import torch


def pytest_configure() -> None:
    while True:
        try:
            importlib.import_module("torchvision")
        except ImportError:
            return
        except RuntimeError as error:
            # It describes this operator to PyTorch, which must know of it.
            missing = re.match(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing.group(1), "(Tensor dets, Tensor scores, float threshold) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
        else:
            return
