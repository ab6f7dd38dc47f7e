"""Eager PyTorch: its own kernel, blocks in place, and gradients that recompute the weights."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch

from randattn._core import average as plain
from randattn._core import block_sizes
from randattn._core.average import Average, Keys, PairWeight
from randattn._core.checks import broadcast_shapes
from randattn._core.library import Array

from . import inplace, inplace_ops
from .numpy import BACKEND as NUMPY
from .torch_tracing import TracedTorch

# Private, without a public counterpart. A release without it would leave no way to tell transformed tensors
# from others: then all of them take the plain path, which is right for both.
_transformed = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)  # noqa: SLF001


class Torch(TracedTorch):
    """Tensors of eager PyTorch."""

    def attend_together(self, q: Array, sets: tuple[Keys, ...], scale: float) -> Average:
        """Compute the average by PyTorch's kernel or in place; its gradients recompute the weights."""
        arrays = _arrays(q, sets)
        if sets[0].pair_bias is not None or not is_plain(*arrays):
            return plain.attend(q, *sets, scale=scale)
        if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
            return Average(*_Attend.apply(_Call(tuple(map(_Rule.of, sets)), scale), *arrays))
        with torch.no_grad():
            return _forward(q, sets, scale)

    def is_at_hand(self, x: Array) -> bool:
        """Tell whether the values are on the host and no transform hides them."""
        return x.device.type == "cpu" and is_plain(x)

    def order_of(self, x: Array, *, stable: bool = False) -> Array:
        """Return the places of the entries in ascending order; NumPy sorts a few times faster."""
        if not self.is_at_hand(x):
            return super().order_of(x, stable=stable)
        return torch.from_numpy(NUMPY.order_of(x.detach().numpy(), stable=stable))

    def in_order(self, x: Array) -> Array:
        """Return the entries in ascending order; `x` has places (integers), so that no gradient is lost."""
        if not self.is_at_hand(x):
            return super().in_order(x)
        return torch.from_numpy(NUMPY.in_order(x.detach().numpy()))

    def largest(self, x: Array, count: int) -> Array:
        """Return the places of the `count` largest entries of the last axis, in any order."""
        if not self.is_at_hand(x):
            return super().largest(x, count)
        return torch.from_numpy(NUMPY.largest(x.detach().numpy(), count))

    def sums_by_group(self, x: Array, index: Array, group: Array, count: int) -> Array:
        """Sum rows by their groups, without a copy of the taken rows."""
        if not is_plain(x):
            return super().sums_by_group(x, index, group, count)
        (heads, size, width), blocks = x.shape, index.shape[1]
        number = torch.arange(heads * blocks, device=x.device).reshape(heads, blocks, 1)
        index, group = (index + size * (number // blocks)).reshape(-1), (group + count * number).reshape(-1)
        sums = _Sums.apply(x.reshape(-1, width), index, group, heads * blocks * count)
        return sums.reshape(heads, blocks, count, width)

    def when(self, condition: Array, function: Callable[[Any], Any], state: Any) -> Any:
        """Return ``function(state)`` where the condition is true; else the state."""
        if not self.is_at_hand(condition):
            return super().when(condition, function, state)
        return function(state) if condition else state


BACKEND = Torch()


def is_plain(*arrays: Array) -> bool:
    """Tell whether no transform is active, and all arrays are plain tensors on a CPU or a CUDA device."""
    # `vmap`, forward-mode gradients and subclasses rewrite operations: they cannot rewrite writes in place.
    if _transformed() is not None or torch.autograd.forward_ad._current_level >= 0:  # noqa: SLF001
        return False
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda") for x in arrays
    )


class _Rule(NamedTuple):
    """A set of keys without the arrays that may have gradients."""

    has_bias: bool
    kappa: float | None
    pair_weight: PairWeight | None
    num_arrays: int  # the number of arrays of the pair weight
    is_causal: bool

    @classmethod
    def of(cls, keys: Keys) -> _Rule:
        """Return the rule of a set."""
        weight, count = keys.pair_weight, 0
        if weight is not None:
            weight, count = weight._replace(arrays=()), len(weight.arrays)
        return cls(keys.bias is not None, keys.kappa, weight, count, keys.is_causal)


class _Call(NamedTuple):
    """The arguments of `attend` without the arrays that may have gradients."""

    rules: tuple[_Rule, ...]
    scale: float

    def unflatten(self, arrays: Sequence[Any]) -> tuple[Any, list[Keys]]:
        """Return the queries and the sets from entries in the order of `_arrays`."""
        q, *rest = arrays
        left, sets = iter(rest), []
        for rule in self.rules:
            k, v, bias = next(left), next(left), next(left) if rule.has_bias else None
            weight = rule.pair_weight
            if weight is not None:
                weight = weight._replace(arrays=tuple(itertools.islice(left, rule.num_arrays)))
            sets.append(Keys(k, v, bias, rule.kappa, pair_weight=weight, is_causal=rule.is_causal))
        return q, sets


def _arrays(q: Array, sets: Sequence[Keys]) -> list[Array]:
    """Return all arrays that may have a gradient."""
    arrays = [q]
    for keys in sets:
        arrays += [x for x in keys[:3] if x is not None]
        arrays += [] if keys.pair_weight is None else keys.pair_weight.arrays
    return arrays


def _forward(q: Array, sets: Sequence[Keys], scale: float) -> Average:
    sets = [keys.biased() for keys in sets]
    if q.device.type == "cpu" and len(sets) == 1 and sets[0].pair_weight is None:
        average = _flash(q, sets[0], scale)
        if average is not None:
            return average
    is_short = q.shape[-2] <= block_sizes.SHORT_ROWS < sets[0].k.shape[-2]
    if q.device.type == "cpu" and len(sets) > 1 and (is_short or any(keys.is_causal for keys in sets)):
        # The kernel takes a set at a time.
        return reduce(plain.merge, (_forward(q, (keys,), scale) for keys in sets))
    lead = math.prod(plain.leading_axes(q, sets))
    logits = lead * q.shape[-2] * sum(keys.k.shape[-2] for keys in sets)
    if logits <= block_sizes.SMALL_LOGITS and not any(keys.is_causal for keys in sets):
        return _whole(q, sets, scale)
    return inplace.attend_in_blocks(q, sets, TorchOperations(q), scale, _block(q))


def _whole(q: Array, sets: Sequence[Keys], scale: float) -> Average:
    """Attend without blocks, in few calls of PyTorch: on small inputs a call costs more than its work."""
    parts, scaled = [], q * scale if scale != 1 else q
    for keys in sets:
        x = scaled @ keys.k.mT
        parts.append(x if keys.bias is None else x + keys.bias[..., None, :])
    lead = broadcast_shapes(*(x.shape[:-2] for x in parts))
    logits = parts[0] if len(parts) == 1 else torch.cat([x.expand(*lead, *x.shape[-2:]) for x in parts], -1)
    log_norm = logits.logsumexp(-1)
    is_weighed = any(keys.pair_weight is not None for keys in sets)
    if not sets[0].v.shape[-1] and not is_weighed:
        lead = plain.leading_axes(q, sets)
        return plain.of_one_shape(logits[..., :0].expand(*lead, *q.shape[-2:-1], 0), log_norm)
    weights = logits.softmax(-1)
    if any(keys.bias is not None for keys in sets):
        # The softmax of a row without a key is NaN.
        weights = weights.masked_fill((log_norm == -math.inf)[..., None], 0)
    shares = weights.split([x.shape[-1] for x in parts], -1) if len(parts) > 1 else (weights,)
    if is_weighed:
        shares = [
            x if keys.pair_weight is None else x * keys.pair_weight.of(q, TorchOperations(q)).mT
            for x, keys in zip(shares, sets, strict=True)
        ]
        total = reduce(operator.add, (x.sum(-1) for x in shares))
        shares = [x / total.clamp_min(torch.finfo(q.dtype).tiny)[..., None] for x in shares]
        log_norm = log_norm + total.log()
    out = reduce(operator.add, (x @ keys.v for x, keys in zip(shares, sets, strict=True)))
    return plain.of_one_shape(out, log_norm)


def _block(q: Array) -> int:
    return block_sizes.INPLACE_LOGITS if q.device.type == "cpu" else block_sizes.GPU_LOGITS


class TorchOperations(inplace_ops.BufferedOperations):
    """Operations in place; `baddbmm` scales or adds a product while it computes it."""

    long_rows = False
    together = True

    def __init__(self, like: Array) -> None:
        super().__init__(like)
        self.looks = like.device.type == "cpu"

    def matmul(self, name: str, a: Array, b: Array, factor: float = 1.0) -> Array:
        if factor == 1 or a.shape[:-2] != b.shape[:-2]:
            return super().matmul(name, a, b, factor)
        out = self.empty(name, *a.shape[:-1], b.shape[-1])
        # With beta=0 PyTorch does not read `out`, whose old values may be NaN.
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
    """The average with a gradient that recomputes the weights: no array of N x M numbers is kept."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *arrays: Array) -> tuple[Array, Array]:
        average = _forward(*call.unflatten(arrays), call.scale)
        ctx.call = call
        ctx.save_for_backward(*arrays, *average)
        return tuple(average)

    @staticmethod
    def backward(ctx: Any, *cotangent: Array) -> tuple[Any, ...]:
        *arrays, out, log_norm = ctx.saved_tensors
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        # The caller's autocast may be on here: it would compute the products in half precision.
        with torch.autocast(arrays[0].device.type, enabled=False):
            if torch.is_grad_enabled() or any(map(_is_batched, cotangent)):
                return None, *_plain_gradients(call, needed, arrays, Average(*cotangent))
            return None, *_gradients(call, needed, arrays, Average(out, log_norm), Average(*cotangent))


def _plain_gradients(
    call: _Call, needed: Sequence[bool], arrays: list[Array], cotangent: Average
) -> list[Array | None]:
    """Return the gradients by the plain average, which has gradients of gradients and writes to no array."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An array may be given twice, or be computed from another array: `grad` would count the path between
        # them, which belongs to the caller's graph. The paths of this call end at new views.
        views = [x.view_as(x) for x in arrays]
        wanted = [x for x, need in zip(views, needed, strict=True) if need]
        q, sets = call.unflatten(views)
        average = plain.attend(q, *sets, scale=call.scale)
        found = iter(
            torch.autograd.grad(average, wanted, cotangent, create_graph=create_graph, allow_unused=True)
        )
    return [next(found) if need else None for need in needed]


def _is_batched(x: Array) -> bool:
    """Tell whether `x` is a batch of cotangents, of `is_grads_batched` or `jacobian(vectorize=True)`."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))  # noqa: SLF001


def _gradients(
    call: _Call, needed: Sequence[bool], arrays: list[Array], average: Average, cotangent: Average
) -> list[Array | None]:
    q, sets = call.unflatten(arrays)
    of_q, of_sets = call.unflatten(needed)
    dq, dsets, dpairs = inplace.gradients(
        q,
        [keys.biased() for keys in sets],
        TorchOperations(q),
        average=average,
        cotangent=cotangent,
        wanted=[of_q, *(x for keys in of_sets for x in _wanted(keys))],
        scale=call.scale,
        pullback=_pullback,
        block=_block(q),
    )
    given = [dq]
    for keys, d, of_pairs in zip(sets, dsets, dpairs, strict=True):
        given += [*_without_kappa(keys, d), *of_pairs]
    return given


def _wanted(needed: Keys) -> list[bool]:
    """Tell which gradients of biased keys are needed for the gradients of the keys themselves."""
    k, v, bias, kappa = needed[:4]
    if kappa is None:
        return [k, v] if bias is None else [k, v, bias]
    return [k, v, k or bool(bias)]


def _without_kappa(keys: Keys, d: Sequence[Any]) -> list[Array | None]:
    """Return the gradients of the keys themselves, from the gradients of the biased keys."""
    k, _, bias, kappa = keys[:4]
    dk, dv, dbias = d
    if kappa is not None and dk is not None and dbias is not None:
        # The biased keys add -kappa |k|^2 / 2 to the bias, whose gradient to k is -kappa k.
        if dbias.shape == k.shape[:-1]:
            dk.addcmul_(dbias[..., None], k, value=-kappa)
        else:
            dk -= kappa * (dbias[..., None] * k).sum_to_size(k.shape)
    if bias is None:
        return [dk, dv]
    return [dk, dv, None if dbias is None else dbias.sum_to_size(bias.shape)]


def _pullback(pair_weight: PairWeight, q: Array, d: Array) -> list[Array | None]:
    """Return the factors of the pairs, then the gradients of sum(factors * d)."""
    with torch.enable_grad():
        q, *arrays = (x.detach().requires_grad_() for x in (q, *pair_weight.arrays))
        factor = pair_weight._replace(arrays=tuple(arrays)).of(q)
        along = torch.autograd.grad(factor, (q, *arrays), d.sum_to_size(factor.shape), allow_unused=True)
    return [factor.detach(), *along]


def _flash(q: Array, keys: Keys, scale: float) -> Average | None:
    """Attend by PyTorch's own kernel for the CPU; None where the kernel does not take the inputs."""
    k, v, bias, is_causal = keys.k, keys.v, keys.bias, keys.is_causal
    lead = plain.leading_axes(q, (keys,))
    fits = (
        math.prod(lead) > 0
        and tuple(q.shape[:-2]) == lead
        and k.shape[-1] == v.shape[-1]
        and (bias is None or not is_causal)
        and flash_works()
    )
    if not fits:
        return None
    # The kernel assumes that the last axis is contiguous, and does not check it.
    q, k, v = (_four_axes(x if x.stride(-1) == 1 else x.contiguous(), lead) for x in (q, k, v))
    dead = mask = None
    if bias is not None:
        # Contiguous, or the kernel would copy the whole mask of N x M numbers.
        bias = _four_axes(bias.contiguous()[..., None, :], lead)
        mask = bias.expand(*q.shape[:-1], bias.shape[-1])
        dead = (bias[..., 0, :] == -math.inf).all(dim=-1)
    out, log_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
        q, k, v, is_causal=is_causal, attn_mask=mask, scale=scale
    )
    if dead is not None and dead.any():
        # For rows without a key the kernel returns log_norm 0, which would count in a merge.
        out = torch.where(dead[..., None, None], 0.0, out)
        log_norm = torch.where(dead[..., None], -math.inf, log_norm)
    n, e = out.shape[-2:]
    return Average(out.reshape(*lead, n, e), log_norm.reshape(*lead, n))


def _four_axes(x: Array, lead: tuple[int, ...]) -> Array:
    """Return `x` with two leading axes. Heads that share keys read the same memory, by a stride of zero."""
    x = x.expand(*lead, *x.shape[-2:])
    return x.reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, *x.shape[-2:])


class _Sums(torch.autograd.Function):
    """Sums of the rows `index` (T,) of `x` by their groups (T,), which are in ascending order.

    PyTorch's own `embedding_bag` has no gradients of gradients; this `backward` has them.
    """

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
    """Tell whether PyTorch has the private kernel of `_flash`, and whether its average is right."""
    # `device` is given, since the caller may have set another default device.
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
