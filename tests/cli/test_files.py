"""Files and options that are refused: one line, exit status 2, nothing written."""

from __future__ import annotations

import errno
import io
import pickle
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save as to_safetensors

from randattn.cli import libraries

if TYPE_CHECKING:
    from collections.abc import Callable

    Arrays = dict[str, Any]
    Write = Callable[..., bytes]


def to_npz(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


WRITERS = {".npz": to_npz, ".safetensors": lambda arrays: to_safetensors(dict(arrays))}


@pytest.fixture(params=list(WRITERS))
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def arrays(arrays: Arrays) -> Arrays:
    return {name: np.asarray(x) for name, x in arrays.items()}


@pytest.fixture
def refuse(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Offer a file and an output folder; see it refused by its name and the folder not made."""

    def run(content: bytes | None, name: str) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        there = sorted(tmp_path.iterdir())
        line = refused("--input", path, "--output", tmp_path / "report")
        assert line.startswith(f"Error: {path}: ")
        assert sorted(tmp_path.iterdir()) == there
        return line

    return run


def test_good_files_are_read(command: Any, arrays: Arrays, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"inputs{suffix.upper()}"
    reports = []
    for dtype in (np.float16, np.float32, np.float64):
        path.write_bytes(WRITERS[suffix]({name: x.astype(dtype) for name, x in arrays.items()}))
        reports.append(command("--json", "--input", path, "--backend", "numpy", "--estimator", "lara").report)
    errors = [[row["relative_error"] for row in report["rows"]] for report in reports]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    assert errors[1] == pytest.approx(errors[2], rel=1e-5)


def test_the_scale_is_read(command: Any, arrays: Arrays, tmp_path: Path, suffix: str) -> None:
    errors = []
    for name, scale in (
        ("given", {"scale": np.full((1,), 8**-0.5, np.float32)}),
        ("left out", {}),
        ("other", {"scale": np.float32(2.0)}),
    ):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(
            WRITERS[suffix]({**{n: arrays[n] for n in "qkv"}, **{n: np.asarray(x) for n, x in scale.items()}})
        )
        report = command("--json", "--input", path, "--backend", "numpy", "--estimator", "rfa").report
        errors.append([report["mean_v_error"], *(row["relative_error"] for row in report["rows"])])
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    assert errors[0] != pytest.approx(errors[2], rel=0.1)


def test_bfloat16_is_read(command: Any, arrays: Arrays, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    path = tmp_path / "inputs.safetensors"
    rounded = {name: torch.asarray(arrays[name]).to(torch.bfloat16) for name in "qkv"}
    path.write_bytes(save(rounded))
    same = tmp_path / "inputs.npz"
    same.write_bytes(to_npz({name: x.float().numpy() for name, x in rounded.items()}))
    reports = [
        command("--json", "--input", each, "--backend", "numpy", "--estimator", "eva").report
        for each in (path, same)
    ]
    errors = [[row["relative_error"] for row in report["rows"]] for report in reports]
    assert errors[0] == errors[1]


def test_missing(refuse: Callable[..., str], suffix: str) -> None:
    assert "no such file or directory" in refuse(None, f"missing{suffix}")


def test_a_folder(refuse: Callable[..., str], tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    assert "is not a file" in refuse(None, f"folder{suffix}")


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied"),
        (OSError(errno.EIO, "Input/output error"), "input/output error"),
        (MemoryError(), "does not fit in memory"),
    ],
)
def test_not_readable(
    refuse: Callable[..., str], inputs: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    # Root may read everything, so that reading is made to fail.
    def fail(path: Path) -> bytes:
        raise error

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert said in refuse(None, inputs.name)


def test_another_suffix(refuse: Callable[..., str], arrays: Arrays) -> None:
    assert "expected a name that ends in .npz or .safetensors" in refuse(to_npz(arrays), "inputs.npy")


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_truncated(refuse: Callable[..., str], arrays: Arrays, suffix: str, part: float) -> None:
    whole = WRITERS[suffix](arrays)
    assert "is truncated, damaged or no" in refuse(whole[: int(part * len(whole))], f"inputs{suffix}")


def test_truncated_within(refuse: Callable[..., str], arrays: Arrays) -> None:
    """A whole archive of an array that is not."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in "qkv":
            content = io.BytesIO()
            np.save(content, arrays[name])
            archive.writestr(f"{name}.npy", content.getvalue()[:-4])
    assert "is truncated, damaged or no .npz file" in refuse(file.getvalue(), "inputs.npz")


def test_damaged(refuse: Callable[..., str], arrays: Arrays) -> None:
    damaged = bytearray(to_npz(arrays))
    damaged[300] ^= 0xFF
    assert "is truncated, damaged or no .npz file" in refuse(bytes(damaged), "inputs.npz")


class _Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_pickled(refuse: Callable[..., str], arrays: Arrays, tmp_path: Path) -> None:
    trap = _Touch(str(tmp_path / "touched"))
    assert "pickle" in refuse(pickle.dumps({**arrays, "trap": trap}), "inputs.npz")
    assert "damaged" in refuse(pickle.dumps({**arrays, "trap": trap}), "inputs.safetensors")
    objects = np.array([trap], dtype=object)
    assert "pickle" in refuse(to_npz({**arrays, "q": objects}), "objects.npz")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "change, got",
    [
        ({"w": np.ones(3, np.float32)}, "k, q, scale, v, w"),
        ({"q": None}, "k, scale, v"),
        ({"q": None, "k": None, "v": None}, "scale"),
        ({"q": None, "Q": np.ones((2, 3), np.float32)}, "Q, k, scale, v"),
    ],
)
def test_other_arrays(
    refuse: Callable[..., str], arrays: Arrays, suffix: str, change: Arrays, got: str
) -> None:
    changed = {name: x for name, x in {**arrays, **change}.items() if x is not None}
    line = refuse(WRITERS[suffix](changed), f"inputs{suffix}")
    assert line.endswith(
        f"expected the arrays q, k, v and optionally scale, is_causal, key_mask, got {got}\n"
    )


def test_no_arrays(refuse: Callable[..., str], suffix: str) -> None:
    assert "got none" in refuse(WRITERS[suffix]({}), f"inputs{suffix}")


def test_an_array_alone(refuse: Callable[..., str], arrays: Arrays) -> None:
    file = io.BytesIO()
    np.save(file, arrays["q"])
    assert "no .npz file" in refuse(file.getvalue(), "inputs.npz")


@pytest.mark.parametrize("name", ["q", "k", "v", "scale"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan(refuse: Callable[..., str], arrays: Arrays, suffix: str, name: str, value: float) -> None:
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[-1] = value
    line = refuse(WRITERS[suffix](arrays), f"inputs{suffix}")
    assert (
        "scale: expected one positive, finite number" if name == "scale" else f"{name}: holds NaN"
    ) in line


@pytest.mark.parametrize("name", ["q", "k", "v", "scale"])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex64])
def test_integers(refuse: Callable[..., str], arrays: Arrays, suffix: str, name: str, dtype: Any) -> None:
    arrays[name] = np.ones_like(arrays[name], dtype=dtype)
    line = refuse(WRITERS[suffix](arrays), f"inputs{suffix}")
    assert f": {name}: expected " in line
    assert "float" in line


@pytest.mark.parametrize("scale", [0.0, -1.0, np.ones(2), np.ones(0)])
def test_scale(refuse: Callable[..., str], arrays: Arrays, suffix: str, scale: Any) -> None:
    arrays["scale"] = np.asarray(scale, dtype=np.float64)
    assert "scale: expected one positive, finite number" in refuse(WRITERS[suffix](arrays), f"inputs{suffix}")


@pytest.mark.parametrize(
    "q, k, v, said",
    [
        ((8,), (6, 8), (6, 8), "q: expected shape (..., N, D)"),
        ((0, 8), (6, 8), (6, 8), "q: expected shape (..., N, D)"),
        ((6, 8), (0, 8), (0, 8), "k: expected shape (..., M, D)"),
        ((6, 8), (6, 8), (6, 0), "v: expected shape (..., M, E)"),
        ((0, 6, 8), (6, 8), (6, 8), "q: expected shape (..., N, D)"),
        ((6, 8), (6, 4), (6, 8), "k: expected the 8 features of q"),
        ((6, 8), (6, 8), (5, 8), "v: expected the 6 tokens of k"),
        ((3, 6, 8), (2, 6, 8), (2, 6, 8), "leading axes of q, k, v: expected some that broadcast"),
    ],
)
def test_shapes(refuse: Callable[..., str], suffix: str, q: Any, k: Any, v: Any, said: str) -> None:
    changed = {name: np.ones(shape, np.float32) for name, shape in (("q", q), ("k", k), ("v", v))}
    assert said in refuse(WRITERS[suffix](changed), f"inputs{suffix}")


def test_too_large_for_float32(refuse: Callable[..., str], arrays: Arrays) -> None:
    arrays["q"] = arrays["q"].astype(np.float64) * 1e300
    assert "q: holds values too large for float32" in refuse(to_npz(arrays), "inputs.npz")


def test_squared_norms_too_large_for_float32(refuse: Callable[..., str], arrays: Arrays) -> None:
    arrays["k"] = arrays["k"] * np.float32(1e20)
    assert "k: holds values whose squared norms are too large" in refuse(to_npz(arrays), "inputs.npz")


def test_logits_too_large_for_float32(refuse: Callable[..., str], arrays: Arrays) -> None:
    arrays["q"], arrays["k"] = arrays["q"] * 1e17, arrays["k"] * 1e17
    arrays["scale"] = np.array(1e6)
    assert "exact attention overflows in float32" in refuse(to_npz(arrays), "inputs.npz")


def test_no_error_is_relative_to_zero(refuse: Callable[..., str], arrays: Arrays) -> None:
    arrays["v"] = arrays["v"].copy()
    arrays["v"][1] = 0
    assert "exact attention is zero in a layer" in refuse(to_npz(arrays), "inputs.npz")


def test_a_line_in_a_name(refuse: Callable[..., str], refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no such file" in refused("--input", tmp_path / "two\nlines.npz")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seeds", "0"),
        ("--seeds", "-1"),
        ("--seeds", "many"),
        ("--seeds",),
        ("--backend", "tensorflow"),
        ("--estimator", "performer"),
        ("--fast",),
        ("surplus",),
    ],
)
def test_options(refused: Callable[..., str], arguments: tuple[str, ...]) -> None:
    assert arguments[-1] in refused(*arguments)


def test_a_library_that_is_not_installed(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "_is_installed", lambda name: name == "numpy")
    line = refused("--backend", "numpy", "--backend", "torch")
    assert line == "Error: --backend torch: is not installed for this Python\n"


def test_cupy_without_a_device(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device() -> int:
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(runtime=SimpleNamespace(getDevice=no_device))
    monkeypatch.setattr(libraries, "_is_installed", lambda name: name in ("numpy", "cupy"))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert "--backend cupy: finds no usable CUDA device" in refused("--backend", "cupy")
