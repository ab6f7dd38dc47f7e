"""Nothing waits for a device; and what is counted is what happens."""

import numpy as np
import pytest

from tests.helpers.blocks import make_small
from tests.helpers.libraries import open_library
from tests.libraries.cupy_standin import COUNTS
from tests.libraries.cupy_standin.counting import cases, count

CALLS = [
    pytest.param(case, native, id=f"{case}{', generator' if native else ''}")
    for case in cases()
    for native in ((False, True) if "rng" in dict(case.options) else (False,))
]


@pytest.fixture(scope="module")
def library():
    return open_library("cupy-standin", None)


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("case, native", CALLS)
def test_nothing_waits(library, monkeypatch, case, native, blocks):
    if blocks:
        make_small(monkeypatch)
    found = count(library, case, native=native)
    assert found.syncs == 0
    assert found.launches > 0


def counted(call):
    COUNTS.reset()
    call()
    return COUNTS.launches, COUNTS.copies, COUNTS.syncs


def test_what_is_counted(library):
    cupy = library.xp
    x, mask = cupy.ones((4, 3)), cupy.ones((4, 3)) > 0
    rows = cupy.asarray(np.arange(2))
    for expected, calls in {
        # Views.
        (0, 0, 0): (
            lambda: x[1:],
            lambda: x[0, 0],
            lambda: x.T,
            lambda: cupy.reshape(x, (2, 6)),
            lambda: list(x),
        ),
        # What gives new arrays, or is written over others.
        (1, 0, 0): (
            lambda: x + 1,
            lambda: x.__iadd__(0),
            lambda: cupy.exp(x, out=x),
            x.sum,
            lambda: cupy.reshape(x.T, (12,)),
            lambda: x.__setitem__(0, 1.0),
            lambda: x[rows],
            lambda: cupy.random.default_rng(0).standard_normal(3),
        ),
        # From the host.
        (0, 1, 0): (lambda: cupy.asarray(np.ones(3)), lambda: cupy.asarray(1.0)),
        # To the host.
        (0, 0, 1): (
            x.get,
            x.tolist,
            x[0, 0].item,
            lambda: float(x[0, 0]),
            lambda: bool(x[0, 0]),
            lambda: str(x),
        ),
        # A shape that depends on values.
        (1, 0, 1): (lambda: x[mask], lambda: x.__setitem__(mask, 1.0), lambda: cupy.nonzero(x)),
    }.items():
        for call in calls:
            assert counted(call) == expected
