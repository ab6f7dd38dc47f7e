"""`attend` by the fastest way that a library has. Estimators call this one.

Arrays that can be written to go through `_inplace.py`, PyTorch's on the CPU through its own kernel where
that gives the same; JAX's are compiled, in blocks by its own loops; all others, and whatever is traced
or transformed by PyTorch, through the pure `_attend.py`. tests/shared/test_fused.py holds them together.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any

import array_api_compat as compat

from . import _attend, _inplace
from ._attend import Average, Keys, PairWeight
from ._inputs import broadcast_shapes, with_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = Any

# Logits of a block: on a GPU enough to keep it busy, under XLA what its own fusion wants.
_GPU_BLOCK_LOGITS = 1 << 25
_JAX_BLOCK_LOGITS, _JAX_MOST_LOGITS = 1 << 18, 1 << 22
_MIN_BLOCK_QUERIES = 64


def attend(
    q: Array,
    *sets: Keys,
    scale: float = 1.0,
    pair_bias: Array | None = None,
    pair_weight: PairWeight | None = None,
    is_causal: bool = False,
) -> Average:
    """`_attend.attend`: the average of all sets' values with weights ``exp(scale q . k + bias)``."""
    if not compat.is_torch_array(q):
        sets = tuple(keys.biased() for keys in sets)
    of_keys, of_queries = sum(math.prod(keys.k.shape) for keys in sets), math.prod(q.shape)
    if scale != 1 and pair_weight is None and 2 * of_queries < of_keys:
        q, scale = q * scale, 1.0
    elif scale != 1 and 2 * of_keys < of_queries:
        # On the far fewer tokens, once for all blocks.
        sets, scale = tuple(keys.scaled(scale) for keys in sets), 1.0
    if compat.is_jax_array(q):
        return _jax_attend(q, sets, scale, pair_bias, pair_weight, is_causal)
    if pair_bias is None:
        options = {"scale": scale, "pair_weight": pair_weight, "is_causal": is_causal}
        if compat.is_numpy_array(q):
            return _inplace.attend(q, *sets, steps=_NumpyWriting(q), **options)
        if compat.is_cupy_array(q):
            return _inplace.attend(q, *sets, block=_GPU_BLOCK_LOGITS, **options)
        if compat.is_torch_array(q) and _is_plain(_arrays(q, sets, pair_weight)):
            return _torch_attend(q, sets, **options)
    return _attend.attend(
        q, *sets, scale=scale, pair_bias=pair_bias, pair_weight=pair_weight, is_causal=is_causal
    )


def _is_plain(arrays: Sequence[Array]) -> bool:
    """Whether PyTorch computes at once: nothing compiles, transforms or only looks at shapes."""
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda") for x in arrays
    )


def _arrays(q: Array, sets: Sequence[Keys], pair_weight: PairWeight | None) -> list[Array]:
    """All arrays that a gradient could go to."""
    arrays = [q, *(x for keys in sets for x in keys[:3] if x is not None)]
    return arrays if pair_weight is None else [*arrays, *pair_weight.arrays]


def _torch_attend(
    q: Array, sets: Sequence[Keys], *, scale: float, pair_weight: PairWeight | None, is_causal: bool
) -> Average:
    torch = sys.modules["torch"]
    arrays = _arrays(q, sets, pair_weight)
    options = {"scale": scale, "pair_weight": pair_weight, "is_causal": is_causal}
    # autocast would take the products in half precision, and the logits with them.
    with torch.autocast(q.device.type, enabled=False):
        if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
            return Average(*_torch_function().apply(sets, options, *arrays))
        with torch.no_grad():
            return _torch_forward(q, sets, **options)


class _NumpyWriting(_inplace.Writing):
    strided = True


class _TorchWriting(_inplace.Writing):
    """With products that are scaled or added as they are made."""

    long_rows = False

    def matmul(self, name: str, a: Array, b: Array, factor: float = 1.0) -> Array:
        if factor == 1 or a.shape[:-2] != b.shape[:-2]:
            return super().matmul(name, a, b, factor)
        out = self.empty(name, *a.shape[:-1], b.shape[-1])
        sys.modules["torch"].baddbmm(_batch(out), _batch(a), _batch(b), beta=0, alpha=factor, out=_batch(out))
        return out

    def add_matmul(self, name: str, x: Array, a: Array, b: Array) -> Array:
        if not (x.shape[:-2] == a.shape[:-2] == b.shape[:-2] and x.is_contiguous()):
            return super().add_matmul(name, x, a, b)
        _batch(x).baddbmm_(_batch(a), _batch(b))
        return x


def _batch(x: Array) -> Array:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _torch_forward(q: Array, sets: Sequence[Keys], **options: Any) -> Average:
    sets = [keys.biased() for keys in sets]
    if q.device.type == "cpu" and len(sets) == 1 and options["pair_weight"] is None:
        average = _torch_flash(q, sets[0], options["scale"], options["is_causal"])
        if average is not None:
            return average
    return _inplace.attend(q, *sets, block=_block(q), steps=_TorchWriting(q), **options)


def _block(q: Array) -> int | None:
    return None if q.device.type == "cpu" else _GPU_BLOCK_LOGITS


@functools.cache
def _torch_function() -> Any:
    """The average with a gradient that makes the weights again: none is kept, no N x M array is whole."""
    torch = sys.modules["torch"]

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, sets: Sequence[Keys], options: dict[str, Any], *arrays: Array
        ) -> tuple[Array, Array]:
            q, sets, pair_weight = _rebuilt(sets, options["pair_weight"], arrays)
            average = _torch_forward(q, sets, **{**options, "pair_weight": pair_weight})
            # The arrays themselves are PyTorch's to keep.
            ctx.like = [Keys(*(None if x is None else True for x in keys[:3]), keys.kappa) for keys in sets]
            weight = None if pair_weight is None else pair_weight._replace(arrays=())
            ctx.options = {**options, "pair_weight": weight}
            ctx.save_for_backward(*arrays, *average)
            return tuple(average)

        @staticmethod
        def backward(ctx: Any, *cotangent: Array) -> tuple[Any, ...]:
            *arrays, out, log_norm = ctx.saved_tensors
            q, sets, pair_weight = _rebuilt(ctx.like, ctx.options["pair_weight"], arrays)
            options = {**ctx.options, "pair_weight": pair_weight}
            if torch.is_grad_enabled():
                # A gradient of the gradient is asked for: the pure path has all of them.
                again = _attend.attend(q, *sets, **options)
                wanted = [x for x in arrays if x.requires_grad]
                found = iter(
                    torch.autograd.grad(again, wanted, cotangent, create_graph=True, allow_unused=True)
                )
                return None, None, *(next(found) if x.requires_grad else None for x in arrays)
            wanted = _rebuilt(ctx.like, pair_weight, ctx.needs_input_grad[2:])
            with torch.autocast(q.device.type, enabled=False):
                dq, dsets, dpair = _inplace.gradients(
                    q,
                    *(keys.biased() for keys in sets),
                    average=Average(out, log_norm),
                    cotangent=Average(*cotangent),
                    pullback=_torch_pullback,
                    wanted=[wanted[0], *(x for keys in wanted[1] for x in _wanted(keys))],
                    block=_block(q),
                    steps=_TorchWriting(q),
                    **options,
                )
            given = [x for keys, d in zip(sets, dsets, strict=True) for x in _without_kappa(keys, d)]
            return None, None, dq, *given, *dpair

    return Attend


def _wanted(keys: Keys) -> list[bool]:
    """What of the gradients to biased keys is needed for those to the keys themselves."""
    k, v, bias, kappa = keys
    wanted = [bool(k), bool(v), bool(bias) or bool(k and kappa is not None)]
    return wanted if kappa is not None or bias is not None else wanted[:2]


def _without_kappa(keys: Keys, d: Keys) -> list[Array | None]:
    """The gradients to the keys themselves, from those to the biased ones."""
    k, _, bias, kappa = keys
    dk, dv, dbias, _ = d
    if kappa is not None and dk is not None:
        if dbias.shape == k.shape[:-1]:
            dk.addcmul_(dbias[..., None], k, value=-kappa)
        else:
            dk -= kappa * (dbias[..., None] * k).sum_to_size(k.shape)
    if bias is None:
        return [dk, dv]
    return [dk, dv, None if dbias is None else dbias.sum_to_size(bias.shape)]


def _rebuilt(
    sets: Sequence[Keys], pair_weight: PairWeight | None, arrays: Sequence[Array]
) -> tuple[Array, list[Keys], PairWeight | None]:
    """The same structure, of these arrays in the order of `_arrays`."""
    q, *rest = arrays
    left = iter(rest)
    sets = [Keys(*(None if x is None else next(left) for x in keys[:3]), keys.kappa) for keys in sets]
    return q, sets, None if pair_weight is None else pair_weight._replace(arrays=tuple(left))


def _torch_pullback(pair_weight: PairWeight, q: Array, d: Array) -> list[Array | None]:
    """The factors, and the gradients of sum(factors * d)."""
    torch = sys.modules["torch"]
    with torch.enable_grad():
        q, *arrays = (x.detach().requires_grad_() for x in (q, *pair_weight.arrays))
        factor = pair_weight._replace(arrays=tuple(arrays)).of(q)
        along = torch.autograd.grad(factor, (q, *arrays), d.sum_to_size(factor.shape), allow_unused=True)
    return [factor.detach(), *along]


@functools.cache
def _flash_works() -> bool:
    """Whether PyTorch still has this kernel, and it gives what it gave."""
    torch = sys.modules["torch"]
    q, k, v = torch.linspace(-1, 1, 3 * 5 * 4, dtype=torch.float64).reshape(3, 1, 1, 5, 4)
    mask = torch.linspace(0, 1, 5, dtype=q.dtype).expand(1, 1, 5, 5)
    try:
        out, log_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=0.5
        )
        logits = 0.5 * q @ k.mT + mask
        return torch.allclose(out, logits.softmax(-1) @ v) and torch.allclose(log_norm, logits.logsumexp(-1))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _torch_flash(q: Array, keys: Keys, scale: float, is_causal: bool) -> Average | None:
    """PyTorch's own kernel for the CPU; None where it does not fit."""
    torch = sys.modules["torch"]
    k, v, bias, _ = keys
    lead = tuple(q.shape[:-2])
    fits = (
        math.prod(lead) > 0
        and len(lead) <= 2
        and tuple(k.shape[:-2]) == lead == tuple(v.shape[:-2])
        and k.shape[-1] == v.shape[-1]
        and (bias is None or not is_causal)
        and _flash_works()
    )
    if not fits:
        return None
    # The kernel takes the last axis as contiguous, without a look.
    q, k, v = (with_rank(x if x.stride(-1) == 1 else x.contiguous(), 4) for x in (q, k, v))
    dead = mask = None
    if bias is not None:
        # Expanded below: the kernel would copy the whole mask otherwise.
        bias = with_rank(bias.contiguous(), 3)
        if broadcast_shapes(bias.shape[:-1], q.shape[:-2]) != tuple(q.shape[:-2]):
            return None
        mask = bias[..., None, :].expand(*q.shape[:-1], bias.shape[-1])
        dead = (bias == -math.inf).all(dim=-1)
    out, log_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=is_causal, attn_mask=mask, scale=scale
    )
    if dead is not None and dead.any():
        # Its answer to no key at all is no average.
        out = torch.where(dead[..., None, None], 0.0, out)
        log_norm = torch.where(dead[..., None], -math.inf, log_norm)
    n, e = out.shape[-2:]
    return Average(out.reshape(*lead, n, e), log_norm.reshape(*lead, n))


def _jax_attend(
    q: Array,
    sets: Sequence[Keys],
    scale: float,
    pair_bias: Array | None,
    pair_weight: PairWeight | None,
    is_causal: bool,
) -> Average:
    function, mask, arrays = pair_weight or (None, None, ())
    average = _jax_function()
    return average(
        *(q, tuple(sets), pair_bias, mask, arrays),
        scale=scale,
        function=function,
        is_causal=is_causal,
        block=_JAX_BLOCK_LOGITS,
    )


@functools.cache
def _jax_function() -> Any:
    """Compiled by itself, so that an eager call is one program; within a caller's jit it is a part of that."""
    jax = sys.modules["jax"]
    return jax.jit(_jax_blocks, static_argnames=("scale", "function", "is_causal", "block"))


def _jax_blocks(
    q: Array,
    sets: tuple[Keys, ...],
    pair_bias: Array | None,
    mask: Array | None,
    arrays: tuple[Array, ...],
    first: Any = 0,
    *,
    scale: float,
    function: Any,
    is_causal: bool,
    block: int,
) -> Average:
    """Loops of the compiled program: over leading axes, then queries, then keys, as far as it takes."""
    n, m = q.shape[-2], sum(keys.k.shape[-2] for keys in sets)
    pair_weight = None if function is None else PairWeight(function, mask, arrays)
    lead = _attend.leading_axes(q, sets, pair_bias, pair_weight)
    rows = max(_MIN_BLOCK_QUERIES, block // m)
    splits = function is None and len(sets) == 1
    if math.prod(lead) * n * m <= block or (
        not lead and n <= rows and not (splits and n * m > _JAX_MOST_LOGITS)
    ):
        start = (first, 0) if is_causal else None
        return _attend.attend_whole(q, sets, scale, pair_bias, pair_weight, first=start)

    jax = sys.modules["jax"]
    again = functools.partial(_jax_blocks, scale=scale, function=function, is_causal=is_causal, block=block)
    operands = (q, sets, pair_bias, mask, arrays)
    if lead:
        return _over_heads(jax, again, operands, first, lead[0], block // (math.prod(lead[1:]) * n * m))
    if n > rows:
        return _over_queries(jax, again, operands, first, _even(n, rows))
    part = functools.partial(_attend.attend_whole, scale=scale, pair_weight=None)
    return _over_keys(
        jax, part, q, sets[0], pair_bias, first if is_causal else None, _even(m, _JAX_MOST_LOGITS // n)
    )


def _over_heads(jax: Any, again: Any, operands: Any, first: Any, size: int, most: int) -> Average:
    """A loop over the first axis, some of it at a time."""
    if size == 1:
        here = jax.tree.map(lambda x: x[0], operands)
        return jax.tree.map(lambda x: x[None], again(*here, first))
    held = _divisor(size, max(1, most))
    leaves, structure = jax.tree.flatten(operands)
    cut = [x.reshape(size // held, held, *x.shape[1:]) for x in leaves if x.shape[0] == size]

    def of_heads(parts: list[Array]) -> Average:
        left = iter(parts)
        here = [next(left) if x.shape[0] == size else x for x in leaves]
        return again(*structure.unflatten(x[0] if held == 1 else x for x in here), first)

    found = jax.lax.map(jax.checkpoint(of_heads), cut)
    return jax.tree.map(lambda x: x.reshape(size, *x.shape[1 if held == 1 else 2 :]), found)


def _over_queries(jax: Any, again: Any, operands: Any, first: Any, rows: int) -> Average:
    jnp = jax.numpy
    q, sets, pair_bias, mask, arrays = operands
    n = q.shape[0]
    whole = n - n % rows
    per_query = (q, pair_bias, None if mask is None else mask[:, None])

    def of_queries(part: Any) -> Average:
        (here, pairs, seen), start = part
        return again(here, sets, pairs, None if seen is None else seen[:, 0], arrays, start)

    cut = jax.tree.map(lambda x: x[:whole].reshape(whole // rows, rows, x.shape[-1]), per_query)
    found = jax.lax.map(jax.checkpoint(of_queries), (cut, first + jnp.arange(0, whole, rows)))
    found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), found)
    if whole == n:
        return found
    tail = of_queries((jax.tree.map(lambda x: x[whole:], per_query), first + whole))
    return jax.tree.map(lambda *parts: jnp.concat(parts), found, tail)


def _over_keys(
    jax: Any, average: Any, q: Array, keys: Keys, pair_bias: Array | None, first: Any, cols: int
) -> Average:
    jnp = jax.numpy
    m = keys.k.shape[0]
    whole = m - m % cols
    bias = None if keys.bias is None else keys.bias[:, None]
    per_key = (keys._replace(bias=bias), None if pair_bias is None else pair_bias.T)

    def of_keys(part: Any, start: Any) -> Average:
        (k, v, bias, _), pairs = part
        here = Keys(k, v, None if bias is None else bias[:, 0])
        pairs = None if pairs is None else pairs.T
        return average(q, (here,), pair_bias=pairs, first=None if first is None else (first, start))

    def step(done: Average, part: Any) -> tuple[Average, None]:
        return _attend.merge(done, of_keys(*part)), None

    cut = jax.tree.map(lambda x: x[:whole].reshape(whole // cols, cols, x.shape[-1]), per_key)
    nothing = Average(jnp.zeros((len(q), keys.v.shape[-1]), q.dtype), jnp.full((len(q),), -math.inf, q.dtype))
    found, _ = jax.lax.scan(jax.checkpoint(step), nothing, (cut, jnp.arange(0, whole, cols)))
    if whole == m:
        return found
    return _attend.merge(found, of_keys(jax.tree.map(lambda x: x[whole:], per_key), whole))


def _even(size: int, most: int) -> int:
    """A size of blocks that divides, unless that would be far smaller than it may be."""
    divisor = _divisor(size, most)
    return divisor if 2 * divisor > most else most


def _divisor(size: int, most: int) -> int:
    """The largest divisor that is no larger than this."""
    return next(d for d in range(min(size, most), 0, -1) if size % d == 0)
