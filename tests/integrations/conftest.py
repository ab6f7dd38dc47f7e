"""Prepare torchvision, which timm imports, without its compiled part, and the estimators of transformers."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch


def pytest_configure() -> None:
    # The wheel of torchvision is for CUDA where that of PyTorch is not.
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


@pytest.fixture
def registered() -> None:
    """Register the estimators anew, since names hold for the process, and make the same weights in each run."""
    from randattn.integrations.transformers import register

    register()
    torch.manual_seed(0)
