"""`attend` for PyTorch as it computes at once: its own kernel, blocks in place, and gradients of its own."""

from __future__ import annotations

import functools
import math
import operator
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import _attend, _inplace, _writing
from ._attend import Average, Keys, PairWeight
from ._checks import broadcast_shapes
from ._fused import GPU_BLOCK_LOGITS, SMALL
from ._inputs import with_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = Any

# Private, and without a public counterpart; where it is gone, tests/shared/test_fused.py fails.
_transformed = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001


class Call(NamedTuple):
    """What `attend` is called with, without the arrays that gradients go to."""

    sets: tuple[tuple[bool, float | None], ...]  # whether a set has a bias, and its kappa
    scale: float
    pair_weight: PairWeight | None
    is_causal: bool

    def arrays(self, arrays: Sequence[Any]) -> tuple[Any, list[Keys], PairWeight | None]:
        """Of arrays in the order of `_arrays`: the queries, the sets and the weights of pairs."""
        q, *rest = arrays
        left = iter(rest)
        sets = [
            Keys(next(left), next(left), next(left) if biased else None, kappa) for biased, kappa in self.sets
        ]
        weight = self.pair_weight
        return q, sets, None if weight is None else weight._replace(arrays=tuple(left))


def is_plain(q: Array, sets: Sequence[Keys], pair_weight: PairWeight | None) -> bool:
    """Whether nothing transforms the arrays or looks at their shapes alone."""
    if _transformed() is not None or torch.autograd.forward_ad._current_level >= 0:  # noqa: SLF001
        return False
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda")
        for x in _arrays(q, sets, pair_weight)
    )


def attend(
    q: Array, sets: Sequence[Keys], scale: float, pair_weight: PairWeight | None, is_causal: bool
) -> Average:
    """`_attend.attend`."""
    arrays = _arrays(q, sets, pair_weight)
    if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        weight = None if pair_weight is None else pair_weight._replace(arrays=())
        own = tuple((keys.bias is not None, keys.kappa) for keys in sets)
        return Average(*_Attend.apply(Call(own, scale, weight, is_causal), *arrays))
    with torch.no_grad():
        return _forward(q, sets, scale, pair_weight, is_causal)


def _arrays(q: Array, sets: Sequence[Keys], pair_weight: PairWeight | None) -> list[Array]:
    """All arrays that a gradient could go to."""
    arrays = [q, *(x for keys in sets for x in keys[:3] if x is not None)]
    return arrays if pair_weight is None else [*arrays, *pair_weight.arrays]


def _forward(
    q: Array, sets: Sequence[Keys], scale: float, pair_weight: PairWeight | None, is_causal: bool
) -> Average:
    sets = [keys.biased() for keys in sets]
    if q.device.type == "cpu" and len(sets) == 1 and pair_weight is None:
        average = _flash(q, sets[0], scale, is_causal)
        if average is not None:
            return average
    lead = math.prod(_attend.leading_axes(q, sets, None, pair_weight))
    if not is_causal and lead * q.shape[-2] * sum(keys.k.shape[-2] for keys in sets) <= SMALL:
        return _whole(q, sets, scale, pair_weight)
    return _inplace.attend(q, sets, Writing(q), scale, pair_weight, is_causal, _block(q))


def _whole(q: Array, sets: Sequence[Keys], scale: float, pair_weight: PairWeight | None) -> Average:
    """Without blocks, in as few calls as PyTorch needs: on small inputs each costs more than its work."""
    parts = []
    scaled = q * scale if scale != 1 else q
    for k, _, bias, _ in sets:
        x = scaled @ k.mT
        parts.append(x if bias is None else x + bias[..., None, :])
    lead = broadcast_shapes(*(x.shape[:-2] for x in parts))
    logits = parts[0] if len(parts) == 1 else torch.cat([x.expand(*lead, *x.shape[-2:]) for x in parts], -1)
    log_norm = logits.logsumexp(-1)
    if not sets[0].v.shape[-1] and pair_weight is None:
        lead = _attend.leading_axes(q, sets, None, None)
        return _attend.of_one_shape(logits[..., :0].expand(*lead, *q.shape[-2:-1], 0), log_norm)
    weights = logits.softmax(-1)
    if any(keys.bias is not None for keys in sets):
        # A row of nothing but -inf has no weight at all.
        weights = weights.masked_fill((log_norm == -math.inf)[..., None], 0)
    if pair_weight is not None:
        weights = weights * pair_weight.of(q, Writing(q)).mT
        total = weights.sum(-1)
        weights = weights / total.clamp_min(torch.finfo(q.dtype).tiny)[..., None]
        log_norm = log_norm + total.log()
    shares = weights.split([x.shape[-1] for x in parts], -1) if len(parts) > 1 else (weights,)
    out = reduce(operator.add, (x @ keys.v for x, keys in zip(shares, sets, strict=True)))
    return _attend.of_one_shape(out, log_norm)


def _block(q: Array) -> int:
    return _inplace.BLOCK_LOGITS if q.device.type == "cpu" else GPU_BLOCK_LOGITS


class Writing(_writing.Writing):
    """With products that are scaled or added as they are made."""

    long_rows = False
    together = True

    def __init__(self, like: Array) -> None:
        super().__init__(like)
        self.looks = like.device.type == "cpu"

    def matmul(self, name: str, a: Array, b: Array, factor: float = 1.0) -> Array:
        if factor == 1 or a.shape[:-2] != b.shape[:-2]:
            return super().matmul(name, a, b, factor)
        out = self.empty(name, *a.shape[:-1], b.shape[-1])
        torch.baddbmm(_batch(out), _batch(a), _batch(b), beta=0, alpha=factor, out=_batch(out))
        return out

    def at_most(self, x: Array, bound: float) -> Array:
        return x.clamp_max_(bound)

    def at_least(self, x: Array, bound: float) -> Array:
        return x.clamp_min_(bound)

    def add_matmul(self, name: str, x: Array, a: Array, b: Array) -> Array:
        if not (x.shape[:-2] == a.shape[:-2] == b.shape[:-2] and x.is_contiguous()):
            return super().add_matmul(name, x, a, b)
        _batch(x).baddbmm_(_batch(a), _batch(b))
        return x


def _batch(x: Array) -> Array:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


class _Attend(torch.autograd.Function):
    """The average with a gradient that makes the weights again: none is kept, no N x M array is whole."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arrays: Array) -> tuple[Array, Array]:
        q, sets, pair_weight = call.arrays(arrays)
        average = _forward(q, sets, call.scale, pair_weight, call.is_causal)
        ctx.call = call
        ctx.save_for_backward(*arrays, *average)
        return tuple(average)

    @staticmethod
    def backward(ctx: Any, *cotangent: Array) -> tuple[Any, ...]:
        *arrays, out, log_norm = ctx.saved_tensors
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        # The caller's autocast may be on here: it would take the products in half precision.
        with torch.autocast(arrays[0].device.type, enabled=False):
            if torch.is_grad_enabled() or any(map(_is_batched, cotangent)):
                return None, *_pure_gradients(call, needed, arrays, Average(*cotangent))
            return None, *_backward(call, needed, arrays, Average(out, log_norm), Average(*cotangent))


def _pure_gradients(
    call: Call, needed: Sequence[bool], arrays: list[Array], cotangent: Average
) -> list[Array | None]:
    """Return the gradients by the pure path, which has gradients of gradients and writes to no array."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One array may be given twice, or be computed from another one: `grad` would count the paths between
        # them, which belong to the caller's graph. Views of their own are where the paths of this call end.
        views = [x.view_as(x) for x in arrays]
        wanted = [x for x, need in zip(views, needed, strict=True) if need]
        q, sets, pair_weight = call.arrays(views)
        average = _attend.attend(
            q, *sets, scale=call.scale, pair_weight=pair_weight, is_causal=call.is_causal
        )
        found = iter(
            torch.autograd.grad(average, wanted, cotangent, create_graph=create_graph, allow_unused=True)
        )
    return [next(found) if need else None for need in needed]


def _is_batched(x: Array) -> bool:
    """Return whether `is_grads_batched` or `jacobian(vectorize=True)` made this of many cotangents."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))  # noqa: SLF001


def _backward(
    call: Call, needed: Sequence[bool], arrays: list[Array], average: Average, cotangent: Average
) -> list[Array | None]:
    q, sets, pair_weight = call.arrays(arrays)
    of_q, of_sets, _ = call.arrays(needed)
    dq, dsets, dpair = _inplace.gradients(
        q,
        [keys.biased() for keys in sets],
        Writing(q),
        average=average,
        cotangent=cotangent,
        wanted=[of_q, *(x for keys in of_sets for x in _wanted(keys))],
        scale=call.scale,
        pair_weight=pair_weight,
        pullback=_pullback,
        is_causal=call.is_causal,
        block=_block(q),
    )
    given = [x for keys, d in zip(sets, dsets, strict=True) for x in _without_kappa(keys, d)]
    return [dq, *given, *dpair]


def _wanted(needed: Keys) -> list[bool]:
    """What of the gradients to biased keys is needed for those to the keys themselves."""
    k, v, bias, kappa = needed
    if kappa is None:
        return [k, v] if bias is None else [k, v, bias]
    return [k, v, k or bool(bias)]


def _without_kappa(keys: Keys, d: Keys) -> list[Array | None]:
    """The gradients to the keys themselves, from those to the biased ones."""
    k, _, bias, kappa = keys
    dk, dv, dbias, _ = d
    if kappa is not None and dk is not None and dbias is not None:
        if dbias.shape == k.shape[:-1]:
            dk.addcmul_(dbias[..., None], k, value=-kappa)
        else:
            dk -= kappa * (dbias[..., None] * k).sum_to_size(k.shape)
    if bias is None:
        return [dk, dv]
    return [dk, dv, None if dbias is None else dbias.sum_to_size(bias.shape)]


def _pullback(pair_weight: PairWeight, q: Array, d: Array) -> list[Array | None]:
    """The factors, and the gradients of sum(factors * d)."""
    with torch.enable_grad():
        q, *arrays = (x.detach().requires_grad_() for x in (q, *pair_weight.arrays))
        factor = pair_weight._replace(arrays=tuple(arrays)).of(q)
        along = torch.autograd.grad(factor, (q, *arrays), d.sum_to_size(factor.shape), allow_unused=True)
    return [factor.detach(), *along]


def _flash(q: Array, keys: Keys, scale: float, is_causal: bool) -> Average | None:
    """PyTorch's own kernel for the CPU; None where it does not fit."""
    k, v, bias, _ = keys
    lead = tuple(q.shape[:-2])
    fits = (
        math.prod(lead) > 0
        and len(lead) <= 2
        and tuple(k.shape[:-2]) == lead == tuple(v.shape[:-2])
        and k.shape[-1] == v.shape[-1]
        and (bias is None or not is_causal)
        and flash_works()
    )
    if not fits:
        return None
    # The kernel takes the last axis as contiguous, without a look.
    q, k, v = (with_rank(x if x.stride(-1) == 1 else x.contiguous(), 4) for x in (q, k, v))
    dead = mask = None
    if bias is not None:
        # Contiguous, or the kernel would copy the whole mask.
        bias = with_rank(bias.contiguous(), 3)
        if broadcast_shapes(bias.shape[:-1], q.shape[:-2]) != tuple(q.shape[:-2]):
            return None
        mask = bias[..., None, :].expand(*q.shape[:-1], bias.shape[-1])
        dead = (bias == -math.inf).all(dim=-1)
    out, log_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
        q, k, v, is_causal=is_causal, attn_mask=mask, scale=scale
    )
    if dead is not None and dead.any():
        # Its answer to no key at all is no average.
        out = torch.where(dead[..., None, None], 0.0, out)
        log_norm = torch.where(dead[..., None], -math.inf, log_norm)
    n, e = out.shape[-2:]
    return Average(out.reshape(*lead, n, e), log_norm.reshape(*lead, n))


def sums_by_group(x: Array, index: Array, group: Array, count: int) -> Array:
    """`_tree.sums_by_group`, without the rows that are summed in memory."""
    (lanes, size, width), blocks = x.shape, index.shape[1]
    number = torch.arange(lanes * blocks, device=x.device).reshape(lanes, blocks, 1)
    index, group = (index + size * (number // blocks)).reshape(-1), (group + count * number).reshape(-1)
    sums = _Sums.apply(x.reshape(-1, width), index, group, lanes * blocks * count)
    return sums.reshape(lanes, blocks, count, width)


class _Sums(torch.autograd.Function):
    """Sums of rows `index` (T,) of `x`, by their groups (T,), in order; with gradients of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Array, index: Array, group: Array, count: int) -> Array:
        ctx.size = x.shape[0]
        ctx.save_for_backward(index, group)
        ends = torch.bincount(group, minlength=count).cumsum(0)
        ends = torch.cat([torch.zeros_like(ends[:1]), ends])
        return torch.nn.functional.embedding_bag(index, x, ends, mode="sum", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        index, group = ctx.saved_tensors
        zeros = cotangent.new_zeros(ctx.size, cotangent.shape[-1])
        return zeros.index_add(0, index, cotangent[group]), None, None, None


@functools.cache
def flash_works() -> bool:
    """Whether PyTorch still has this kernel, and it gives what it gave."""
    # The default device may be another one.
    q, k, v = torch.linspace(-1, 1, 3 * 5 * 4, dtype=torch.float64, device="cpu").reshape(3, 1, 1, 5, 4)
    mask = torch.linspace(0, 1, 5, dtype=q.dtype, device="cpu").expand(1, 1, 5, 5)
    try:
        out, log_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            q, k, v, attn_mask=mask, scale=0.5
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    logits = 0.5 * q @ k.mT + mask
    same = (out, logits.softmax(-1) @ v), (log_norm, logits.logsumexp(-1))
    return all(torch.allclose(x, y) for x, y in same)
