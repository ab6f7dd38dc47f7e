"""The stand-in refuses what CuPy refuses, and is what is taken for CuPy."""

import sys
from types import ModuleType

import array_api_compat
import numpy as np
import pytest

from tests.helpers.libraries import open_library
from tests.libraries.cupy_standin.names import RECORDED


@pytest.fixture(scope="module")
def cupy():
    return open_library("cupy-standin", None).xp


def test_it_is_taken_for_cupy(cupy):
    x = cupy.ones(3)
    assert sys.modules["cupy"] is cupy
    assert array_api_compat.is_cupy_array(x)
    xp = array_api_compat.array_namespace(x)
    assert array_api_compat.is_cupy_namespace(xp)
    assert array_api_compat.device(xp.zeros(3, device=x.device)) == x.device
    assert cupy.__version__ == RECORDED["version"]


def test_nothing_becomes_numpys_by_itself(cupy):
    x = cupy.ones(3)
    for convert in (np.asarray, np.exp, np.sum, lambda x: np.ones(3) + x, lambda x: x * np.ones(3)):
        with pytest.raises(TypeError):
            convert(x)
    for call in (
        lambda: cupy.add(x, np.ones(3)),
        lambda: cupy.where(x > 0, x, np.ones(3)),
        lambda: cupy.take(x, np.arange(2)),
        lambda: x[np.arange(2)],
        lambda: x[[0, 1]],
        lambda: x.__setitem__(0, np.ones(())),
        lambda: x.__iadd__(np.ones(3)),
    ):
        with pytest.raises(TypeError):
            call()
    assert np.array_equal(x.get(), [1, 1, 1])


def test_the_parameters_are_cupys(cupy):
    x = cupy.ones((2, 3))
    for call in (
        lambda: cupy.asarray(x, device=x.device),
        lambda: cupy.add(x, x, where=x > 0),
        lambda: cupy.sum(x, initial=0.0),
        lambda: cupy.sort(x, stable=True),
        lambda: cupy.take_along_axis(x),
        lambda: x.astype(cupy.float32, device=None),
        lambda: x.sum(where=x > 0),
        lambda: cupy.random.default_rng(0).standard_normal(3, 4, 5, 6),
    ):
        with pytest.raises(TypeError):
            call()


def test_the_names_are_cupys(cupy):
    for owner, members in RECORDED["names"].items():
        found = cupy
        for part in owner.split(".")[1:]:
            found = getattr(found, part)
        ours = {name for name, member in vars(found).items() if not isinstance(member, ModuleType)}
        assert {name for name in ours if not name.startswith("_")} <= set(members)
    for name in ("vecdot", "unstack", "no_such_name"):
        assert name not in RECORDED["names"]["cupy"]
        with pytest.raises(AttributeError):
            getattr(cupy, name)
    assert not hasattr(cupy.ones(3), "to_device")
    with pytest.raises(NotImplementedError, match=r"cupy\.kaiser"):
        cupy.kaiser(3, 0.5)


def test_results_are_arrays(cupy):
    """Also of one element, where NumPy gives numbers."""
    x = cupy.ones((2, 3))
    for result in (x.sum(), x[0, 0], cupy.max(x), cupy.linalg.norm(x), x[0, 0] + 1, -x[0, 0]):
        assert type(result) is cupy.ndarray
        assert result.shape == ()


def test_single_elements_are_views(cupy):
    x = cupy.zeros(3)
    x[1][...] = 5.0
    assert x.tolist() == [0, 5, 0]


def test_files(cupy, tmp_path):
    """CuPy's files of several arrays give them by name, and have no `items`."""
    cupy.savez(tmp_path / "arrays.npz", a=cupy.ones(3))
    with cupy.load(tmp_path / "arrays.npz") as file:
        assert type(file["a"]) is cupy.ndarray
        assert file["a"].tolist() == [1, 1, 1]
        assert not hasattr(file, "items")


def test_kinds_of_sorting(cupy):
    with pytest.raises(ValueError, match="stable"):
        cupy.sort(cupy.ones(3), kind="quicksort")
    # All of it, whatever is asked for.
    x = cupy.asarray(np.random.default_rng(0).standard_normal(50))
    assert np.all(np.diff(x[cupy.argpartition(x, 40)].get()) >= 0)
