"""`attend` by the fastest way that a library has. Estimators call this one.

Arrays that can be written to go through `_inplace.py`, PyTorch's with gradients and a kernel of their
own (`_fused_torch.py`); JAX's are compiled, in blocks by its own loops (`_fused_jax.py`), on a mesh of
devices along them (`_fused_jax_mesh.py`); Dask's are cut where their chunks end (`_fused_dask.py`). All
others, what PyTorch traces or transforms, and on NumPy, CuPy and PyTorch a bias of pairs, go through the
pure `_attend.py`. tests/shared/test_fused.py holds them together.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from . import _attend, _inplace
from ._checks import out_of_range
from ._inputs import placement
from ._static import TENSORS, Held
from ._tracing import check_known, hint, is_known, library, namespace, tracing
from ._writing import Writing

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ._attend import Average, Keys, PairWeight

    Array = Any

F = TypeVar("F", bound="Callable[..., Any]")
S = TypeVar("S", bound="tuple[Array, ...]")

# Logits of a block on a GPU: enough to keep it busy.
GPU_BLOCK_LOGITS = 1 << 25
# Logits for which laying out blocks takes longer than computing them.
SMALL = 1 << 16


def undisturbed(function: F) -> F:
    """Leave what a caller's context does to operations.

    PyTorch's autocast would take the products in half precision, and the logits with them; on a JAX mesh
    with explicit axes every layout inside would have to be said; NumPy would warn of what overflows.
    """

    @functools.wraps(function)
    def call(q: Any, *args: Any, **options: Any) -> Any:
        own = in_full_precision(q)
        if own is not None:
            with own:
                return function(q, *args, **options)
        if library(q) == "jax":
            from . import _fused_jax_mesh

            return _fused_jax_mesh.laid_by_compiler(function, q, *args, **options)
        if library(q) == "numpy":
            return _without_overflow(function, q, *args, **options)
        return function(q, *args, **options)

    return cast("F", call)


def _without_overflow(function: Callable[..., Any], q: Any, *args: Any, **options: Any) -> Any:
    """Raise one error where NumPy would warn of each operation that overflows, and results would be NaN."""
    numpy = sys.modules["numpy"]
    if numpy.geterr()["over"] == "ignore":
        return function(q, *args, **options)
    try:
        with numpy.errstate(over="raise"):
            return function(q, *args, **options)
    except FloatingPointError:
        error = out_of_range(dict(zip("qkv", (q, *args), strict=False)))
    raise error


def in_full_precision(x: Any) -> Any:
    """A context without PyTorch's autocast, where there is one around; else None."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return None
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return None


class _NumpyWriting(Writing):
    strided = looks = True

    def quietly(self) -> AbstractContextManager[object]:
        numpy = sys.modules["numpy"]
        return cast("AbstractContextManager[object]", numpy.errstate(over="ignore", invalid="ignore"))


def attend(
    q: Array,
    *sets: Keys,
    scale: float = 1,
    pair_bias: Array | None = None,
    pair_weight: PairWeight | None = None,
    is_causal: bool = False,
) -> Average:
    """`_attend.attend`: the average of all sets' values with weights ``exp(scale q . k + bias)``."""
    chunks = chunked(q)
    if chunks is not None:
        return cast("Average", chunks.attend(q, sets, scale, pair_bias, pair_weight, is_causal))
    of_keys, of_queries = hint(sum(math.prod(keys.k.shape) for keys in sets)), hint(math.prod(q.shape))
    if scale != 1 and pair_weight is None and 2 * of_queries < of_keys:
        # On the far fewer tokens, once for all blocks.
        q, scale = q * scale, 1.0
    elif scale != 1 and 2 * of_keys < of_queries:
        sets, scale = tuple(keys.scaled(scale) for keys in sets), 1.0
    if library(q) == "jax":
        from . import _fused_jax

        return _fused_jax.attend(q, sets, scale, pair_bias, pair_weight, is_causal)
    if pair_bias is not None:
        return _attend.attend(
            q, *sets, scale=scale, pair_bias=pair_bias, pair_weight=pair_weight, is_causal=is_causal
        )
    if library(q) == "torch" and not compiling(q):
        from . import _fused_torch

        if _fused_torch.is_plain(q, sets, pair_weight):
            return _fused_torch.attend(q, sets, scale, pair_weight, is_causal)
    elif library(q) in ("numpy", "cupy"):
        steps, block = Writing(q), GPU_BLOCK_LOGITS
        if library(q) == "numpy":
            steps, block = _NumpyWriting(q), _inplace.BLOCK_LOGITS
        sets = tuple(keys.biased() for keys in sets)
        lead = math.prod(_attend.leading_axes(q, sets, None, pair_weight))
        if lead * q.shape[-2] * sum(keys.k.shape[-2] for keys in sets) <= SMALL:
            first = (0, 0) if is_causal else None
            return _attend.attend_whole(q, sets, scale, None, pair_weight, first)
        return _inplace.attend(q, sets, steps, scale, pair_weight, is_causal, block)
    return _attend.attend(q, *sets, scale=scale, pair_weight=pair_weight, is_causal=is_causal)


def compiling(x: Array) -> bool:
    """Whether PyTorch makes a program of this call."""
    return tracing() and library(x) == "torch"


def chunked(x: Array) -> Any:
    """What knows how the tokens of an array are cut into chunks; None where it is whole."""
    if library(x) != "dask":
        return None
    from . import _fused_dask

    return _fused_dask


def regroup(
    function: Callable[..., Average], averages: Average, shape: tuple[int, ...], *indices: Any
) -> Average:
    """``function(averages, *indices)``, from (..., A) to (..., *shape) averages."""
    chunks = chunked(averages.out)
    if chunks is None:
        return function(averages, *indices)
    return cast("Average", chunks.regroup(function, averages, shape, *indices))


def take(x: Array, index: Any, axis: int) -> Array:
    """`x` at a NumPy index of any shape, which is flattened into the axis."""
    xp, chunks = namespace(x), chunked(x)
    if chunks is not None:
        return chunks.take(x, index.reshape(-1), axis)
    return xp.take(x, xp.reshape(beside(index, x), (-1,)), axis=axis)


def beside(rows: Any, like: Array) -> Array:
    """Return a NumPy array, or what a trace has in its place, in the library and on the device of `like`."""
    if isinstance(rows, Held):
        return TENSORS[rows.place](like.device)
    return namespace(like).asarray(rows, device=placement(like))


def summed_up(x: Array, axis: int) -> Array:
    """Return for each entry of the last axis the sum of all up to it."""
    # Of array-api-compat's function Dynamo would warn: it looks the library up in a cache.
    return x.cumsum(axis) if library(x) == "torch" else namespace(x).cumulative_sum(x, axis=axis)


def mean_of_rows(x: Array) -> Array:
    """(..., L, D) -> (..., D)."""
    xp = namespace(x)
    known = library(x) in ("numpy", "cupy", "torch")
    if not known or hint(math.prod(x.shape)) <= SMALL:
        return xp.mean(x, axis=-2)
    # As a product: a third of the time of their own means.
    share = xp.full((1, x.shape[-2]), 1 / x.shape[-2], dtype=x.dtype, device=placement(x))
    return xp.matmul(share, x)[..., 0, :]


def lanes_of(x: Array) -> int:
    """In how many parts of one length the tokens of `x` (..., N, D) may lie on devices of their own."""
    if library(x) != "jax":
        return 1
    from . import _fused_jax_mesh

    return math.gcd(x.shape[-2], _fused_jax_mesh.mesh_size(x))


def everywhere(x: Average) -> Average:
    """Bring what belongs to groups, not to tokens, to all devices that the tokens lie on, or in one chunk."""
    chunks = chunked(x.out)
    if chunks is not None:
        return cast("Average", chunks.in_one(*x))
    if library(x.out) != "jax":
        return x
    from . import _fused_jax_mesh

    out, log_norm = (_fused_jax_mesh.everywhere(array, axes) for array, axes in zip(x, (2, 1), strict=True))
    return x._replace(out=out, log_norm=log_norm)


def by_rows(function: Callable[..., Array], size: int, *arrays: tuple[Array, int]) -> Array:
    """`function` of so many rows at a time, which lie on the given axis (-1 or -2) of each array.

    It gives (..., rows, E).
    """
    x, axis = arrays[0]
    if hint(x.shape[axis]) <= size:
        return function(*(x for x, _ in arrays))
    if library(x) == "jax":
        check_known("q", "blocks of queries", x.shape[axis])
        from . import _fused_jax

        return _fused_jax.by_rows(function, size, *arrays)
    if not is_known(x.shape[axis]):
        rows = x.shape[axis]
        cut = [_attend.cut(x, axis, _attend.parts_of(rows, size)) for x, axis in arrays]
        return _attend.joined([function(*parts) for parts in zip(*cut, strict=True)], -2, rows)
    done = [
        function(*(x[..., rows] if axis == -1 else x[..., rows, :] for x, axis in arrays))
        for rows in _attend.slices(x.shape[axis], size)
    ]
    return namespace(x).concat(done, axis=-2)


def carry(
    function: Callable[..., tuple[Any, Array]], state: Any, *arrays: tuple[Array, int]
) -> tuple[Any, Array]:
    """Go along axis -2 of the arrays, so many rows of each at a time: (state, rows) -> (state, results)."""
    x, size = arrays[0]
    check_known("k", "a causal form, which goes along the tokens a block at a time", x.shape[-2])
    if x.shape[-2] <= size:
        return function(state, *(x for x, _ in arrays))
    if library(x) == "jax":
        from . import _fused_jax

        return _fused_jax.carry(function, state, *arrays)
    done = []
    for rows in zip(*(_attend.slices(x.shape[-2], size) for x, size in arrays), strict=True):
        state, out = function(state, *(x[..., part, :] for (x, _), part in zip(arrays, rows, strict=True)))
        done.append(out)
    return state, namespace(x).concat(done, axis=-2)


def constant(x: Array) -> Array:
    """`x`, of which nothing is differentiated."""
    if library(x) == "torch":
        return x.detach()
    return sys.modules["jax"].lax.stop_gradient(x) if library(x) == "jax" else x


def largest(x: Array, count: int) -> Array:
    """Where the so many largest entries of the last axis stand, in any order."""
    xp, rest = namespace(x), x.shape[-1] - count
    if _known(x):
        return _by_numpy(lambda x: largest(x, count), x)
    if library(x) == "torch":
        return x.topk(count, sorted=False).indices
    if library(x) == "jax":
        return sys.modules["jax"].lax.top_k(x, count)[1]
    if rest and library(x) in ("numpy", "cupy"):
        return xp.argpartition(x, rest, axis=-1)[..., rest:]
    return xp.argsort(x, axis=-1)[..., rest:]


def order_of(x: Array, *, stable: bool = False) -> Array:
    """Where the entries of the last axis stand, the smallest first; equal ones in any order unless stable."""
    if _known(x):
        return _by_numpy(functools.partial(order_of, stable=stable), x)
    return namespace(x).argsort(x, axis=-1, stable=stable)


def in_order(x: Array) -> Array:
    """The entries of the last axis from the smallest on."""
    return _by_numpy(in_order, x) if _known(x) else namespace(x).sort(x, axis=-1, stable=False)


def with_last(x: Array, part: Array) -> Array:
    """`x` with `part` for its last rows' last entries: written over it where that can be."""
    if library(x) in ("numpy", "cupy", "torch"):
        x[..., -part.shape[-2] :, -part.shape[-1] :] = part
        return x
    xp, rows, features = namespace(x), x.shape[-2] - part.shape[-2], x.shape[-1] - part.shape[-1]
    last = xp.concat([x[..., rows:, :features], part], axis=-1)
    return xp.concat([x[..., :rows, :], last], axis=-2)


def _by_numpy(function: Callable[..., Any], x: Array) -> Array:
    """Of PyTorch's array on the host, as fast as NumPy sorts: a few times faster."""
    return sys.modules["torch"].from_numpy(function(x.detach().numpy()))


def sums_by_group(x: Array, index: Array, group: Array, count: int) -> Array:
    """`_tree.sums_by_group`: sums of rows `index` (L, B, T) of `x` (L, S, X), by group: (L, B, C, X)."""
    if library(x) == "jax":
        from . import _fused_jax

        return _fused_jax.sums_by_group(x, index, group, count)
    if library(x) == "numpy":
        return _inplace.sums_by_group(x, index, group, count)
    if library(x) == "torch" and not compiling(x):
        from . import _fused_torch

        if _fused_torch.is_plain(x, (), None):
            return _fused_torch.sums_by_group(x, index, group, count)
    from . import _tree

    return _tree.sums_by_group(x, index, group, count)


def when(condition: Array, function: Callable[[S], S], state: S) -> S:
    """``function(state)`` where the condition, one boolean, is true; else the state, in the same arrays."""
    if library(condition) == "jax":
        from . import _fused_jax

        return cast("S", _fused_jax.when(condition, function, state))
    if library(condition) == "numpy" or _known(condition):
        return function(state) if condition else state
    xp = namespace(condition)
    both = zip(function(state), state, strict=True)
    return type(state)(*(xp.where(condition, new, old) for new, old in both))


def known(x: Array) -> bool:
    """Whether the values are at hand, on the host."""
    if library(x) == "jax":
        return not isinstance(x, sys.modules["jax"].core.Tracer)
    return library(x) == "numpy" or _known(x)


def _known(condition: Array) -> bool:
    """Whether PyTorch has the value at hand: it waits for no device, and traces and transforms nothing."""
    if library(condition) != "torch" or compiling(condition):
        return False
    from . import _fused_torch

    return condition.device.type == "cpu" and _fused_torch.is_plain(condition, (), None)
