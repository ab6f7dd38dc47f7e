"""The costs of public functions on a device, by the stand-in's counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tests.programs.agreement import Case, call, each, make_cases, make_inputs

from .arrays import COUNTS, Counts

if TYPE_CHECKING:
    from tests.helpers.libraries import Library


def cases() -> list[Case]:
    """Give every public function in each of its forms: what is compared, and what takes further arrays.

    Without `diagnose`, which says what it read, and `multiply_adds`, which takes no arrays.
    """
    masked = make_inputs()["masked"]
    mask = masked["key_mask"]
    return [
        *make_cases(),
        Case("eva query mask", "plain", ()).but(query_mask=mask, window=0),
        Case("lara query mask", "plain", ()).but(query_mask=mask),
    ]


def count(library: Library, case: Case, *, native: bool = False) -> Counts:
    """Give what one call costs; its draws are of its int seed, or of the library's own generator."""
    arrays = each(library.asarray, make_inputs()[case.inputs])
    options = {
        name: library.asarray(option) if isinstance(option, np.ndarray) else option
        for name, option in case.options
    }
    if native and "rng" in options:
        options["rng"] = library.generator(options["rng"])
    COUNTS.reset()
    call(case.but(**options), arrays)
    return replace(COUNTS)
