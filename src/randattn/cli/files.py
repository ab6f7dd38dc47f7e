"""Read the arrays of a caller's file, and write the report."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from randattn import data

from .errors import Refused

_AXES = {"q": "N, D", "k": "M, D", "v": "M, E"}
_MORE = ("scale", "is_causal", "key_mask")


class _Unfit(Exception):  # noqa: N818  (a file's fault)
    """A fault of a file, without the file's name."""


@dataclass(frozen=True)
class Arrays:
    """The inputs of attention in float32: q (..., N, D), k (..., M, D), v (..., M, E) and more.

    Key heads that query heads share are repeated. `key_mask` has the axes of `k` without the last.
    """

    name: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    is_causal: bool = False
    key_mask: np.ndarray | None = None

    @property
    def mask(self) -> dict[str, Any]:
        """Return the key mask as an option of a call, or none."""
        return {} if self.key_mask is None else {"key_mask": self.key_mask}

    def one_head(self, length: int) -> Arrays:
        """Return the first head, with its tokens repeated or cut to a length, and no padding."""

        def repeated(x: np.ndarray) -> np.ndarray:
            tokens: np.ndarray = x.reshape(-1, *x.shape[-2:])[0]
            return np.take(tokens, np.arange(length), axis=0, mode="wrap")

        parts: dict[str, Any] = {name: repeated(getattr(self, name)) for name in _AXES}
        return replace(self, **parts, key_mask=None)


def read_sample(name: str = "encoder") -> Arrays:
    """Return an embedded sample."""
    q, k, v, scale = data.read_sample(name)
    label = "embedded sample" if name == "encoder" else "embedded sample of a causal language model"
    found = _checked(label, {"q": q, "k": k, "v": v, "scale": np.asarray(scale)})
    return replace(found, is_causal=name == "language-model")


def read_inputs(path: Path) -> Arrays:
    """Read and check a caller's file; raise `Refused` for a fault of it.

    Parameters
    ----------
    path : Path
        A .npz or .safetensors file.

    Returns
    -------
    Arrays
    """
    try:
        return _checked(str(path), _read(path))
    except _Unfit as error:
        reason = str(error)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except MemoryError:
        reason = "does not fit in memory"
    raise Refused(f"{path}: {reason}")


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.exists() and not path.is_file():
        raise _Unfit("is not a file")
    content = path.read_bytes()
    if path.suffix.lower() == ".npz":
        return _read_npz(content)
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(content)
    raise _Unfit("expected a name that ends in .npz or .safetensors")


def _read_npz(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file, each checked against its checksum, none of them unpickled."""
    # A pickle begins with this byte. To load one can run any code: it gets an error of its own.
    if content[:1] == b"\x80":
        raise _Unfit("is a pickle, which could run any code and is not read")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            _check_names(names)
            return {
                name: np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
                for name, member in zip(names, archive.namelist(), strict=True)
            }
    except (_Unfit, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (damaged bytes make zip, zlib and NumPy raise anything)
        if "allow_pickle" in str(error):
            raise _Unfit("holds pickled objects, which could run any code and are not read") from None
        raise _Unfit(f"is truncated, damaged or no .npz file ({error})") from None


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    try:
        tensors = dict(deserialize(content))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise _Unfit(f"is truncated, damaged or no .safetensors file ({error})") from None
    _check_names(tensors)
    return {name: _from_safetensors(name, tensor) for name, tensor in tensors.items()}


def _from_safetensors(name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = tensor["dtype"], tensor["shape"]
    if dtype == "BOOL":
        return np.frombuffer(tensor["data"], dtype=np.bool_).reshape(shape)
    if dtype == "BF16":
        # NumPy has no bfloat16; its bits are the upper half of a float32.
        upper = np.frombuffer(tensor["data"], dtype="<u2").astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(shape)
    if dtype not in ("F16", "F32", "F64"):
        raise _Unfit(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}")
    return np.frombuffer(tensor["data"], dtype=f"<f{int(dtype[1:]) // 8}").reshape(shape)


def _check_names(names: Iterable[str]) -> None:
    got = set(names)
    if not set(_AXES) <= got <= {*_AXES, *_MORE}:
        expected = f"q, k, v and optionally {', '.join(_MORE)}"
        raise _Unfit(f"expected the arrays {expected}, got {', '.join(sorted(got)) or 'none'}")


def _checked(name: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    for which in (*_AXES, "scale"):
        if which in arrays and not np.issubdtype(arrays[which].dtype, np.floating):
            raise _Unfit(f"{which}: expected a real floating dtype, got {arrays[which].dtype}")
    for which, axes in _AXES.items():
        shape = arrays[which].shape
        if len(shape) < 2 or 0 in shape:
            raise _Unfit(f"{which}: expected shape (..., {axes}) and no axis of length 0, got {shape}")
    q, k, v = (arrays[which].shape for which in _AXES)
    if k[-1] != q[-1]:
        raise _Unfit(f"k: expected the {q[-1]} features of q on its last axis, got shape {k}")
    if v[-2] != k[-2]:
        raise _Unfit(f"v: expected the {k[-2]} tokens of k on its axis -2, got shape {v}")
    parts: dict[str, Any] = {which: _single(which, arrays[which]) for which in _AXES}
    # Grouped heads: each key head is repeated for the query heads that share it.
    groups = (
        q[-3] // k[-3] if min(len(q), len(k), len(v)) > 2 and k[-3] == v[-3] > 1 and not q[-3] % k[-3] else 1
    )
    parts |= {which: np.repeat(parts[which], groups, axis=-3) for which in "kv" if groups > 1}
    try:
        np.broadcast_shapes(*(x.shape[:-2] for x in parts.values()))
    except ValueError:
        raise _Unfit(f"leading axes of q, k, v: expected some that broadcast, got {q}, {k}, {v}") from None
    is_causal = _is_causal(arrays.get("is_causal"), q[-2], k[-2])
    mask = _mask(arrays.get("key_mask"), k, groups)
    return Arrays(name, **parts, scale=_scale(arrays.get("scale"), q[-1]), is_causal=is_causal, key_mask=mask)


def _is_causal(flag: np.ndarray | None, n: int, m: int) -> bool:
    if flag is None:
        return False
    if flag.dtype != np.bool_ or flag.size != 1:
        raise _Unfit(f"is_causal: expected one boolean, got {flag.dtype} of shape {flag.shape}")
    if flag.item() and n != m:
        raise _Unfit(f"is_causal: expected as many keys as queries ({n}), got {m}")
    return bool(flag.item())


def _mask(mask: np.ndarray | None, k: tuple[int, ...], groups: int) -> np.ndarray | None:
    if mask is None:
        return None
    axes = (*k[:-2], k[-2])
    fits = mask.shape[-1:] == axes[-1:] and mask.ndim in (1, len(axes))
    fits = fits and all(size in (1, axis) for size, axis in zip(mask.shape, axes[-mask.ndim :], strict=True))
    if mask.dtype != np.bool_ or not fits:
        expected = f"booleans of shape ({k[-2]},), or of the {len(axes)} axes of k without its features"
        raise _Unfit(f"key_mask: expected {expected}, got {mask.dtype} of shape {mask.shape}")
    if not mask.any(axis=-1).all():
        raise _Unfit("key_mask: masks all keys of a sequence")
    heads = mask.shape[-2] if mask.ndim > 1 else 1
    return np.repeat(mask, groups, axis=-2) if heads > 1 else mask


def _single(which: str, x: np.ndarray) -> np.ndarray:
    # Values that overflow in float32, or squared norms |k|^2 that do, become NaN in estimators: the fault is
    # named here, before anything is measured.
    if not np.isfinite(x).all():
        raise _Unfit(f"{which}: holds NaN or infinity")
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(x, dtype=np.float32)
    if not np.isfinite(single).all():
        raise _Unfit(f"{which}: holds values too large for float32")
    with np.errstate(over="ignore"):
        squares = np.vecdot(single, single)
    if which != "v" and not np.isfinite(squares).all():
        raise _Unfit(f"{which}: holds values whose squared norms are too large for float32")
    return single


def _scale(scale: np.ndarray | None, features: int) -> float:
    if scale is None:
        return float(features**-0.5)
    if scale.size != 1 or not 0 < scale.item() < np.inf:
        raise _Unfit("scale: expected one positive, finite number")
    return float(scale.item())


def check_output(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before anything is measured.

    Parameters
    ----------
    folder : Path
        The folder, which need not exist.
    """
    # The nearest parent that exists says whether the folder can be made.
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise _not_written(folder, error) from None
    if not there.is_dir():
        raise Refused(f"--output {folder}: {'is' if there == folder else f'{there} is'} not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"--output {folder}: permission denied")


def write_report(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a folder, in place of older files of their names: all of them or none.

    The new files are first written whole to a hidden folder within `folder`, and the older files are copied
    there. Each new file is then renamed into place, which the system does at once or not at all. If a rename
    fails, or an interrupt comes between two, the older files are renamed back from their copies. A machine
    that stops between two renames leaves a mixture.

    Parameters
    ----------
    folder : Path
        The folder. If it does not exist it is made, and removed again if a file cannot be written.
    files : mapping of str to bytes
        Names and contents of the files.
    """
    made: list[Path] = []
    try:
        made += [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            old.mkdir()
            for name, content in files.items():
                _write(new / name, content)
                if os.path.lexists(folder / name):
                    shutil.copy2(folder / name, old / name, follow_symlinks=False)
            _replace(folder, files, new, old)
    except OSError as error:
        _remove_empty(made)
        raise _not_written(folder, error) from None
    except BaseException:
        _remove_empty(made)
        raise


def _replace(folder: Path, names: Iterable[str], new: Path, old: Path) -> None:
    try:
        for name in names:
            (new / name).replace(folder / name)
    except BaseException:
        # A list of finished renames would miss one if an interrupt came right after it: the folders tell.
        for name in names:
            if (new / name).exists():
                continue
            if os.path.lexists(old / name):
                (old / name).replace(folder / name)
            else:
                (folder / name).unlink()
        raise


def _write(path: Path, content: bytes) -> None:
    """Write a file to the disk."""
    # Without fsync a rename can reach the disk before the content of the file, and leave an empty file.
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _not_written(folder: Path, error: OSError) -> Refused:
    return Refused(f"--output {folder}: the report is not written, {(error.strerror or str(error)).lower()}")
