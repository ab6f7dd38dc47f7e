"""Go along the queries of adaptive EVA in blocks, and find the heads that are to stay exact."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import attend, backend_of
from randattn._core import block_sizes
from randattn._core.average import Average, Keys
from randattn._core.inputs import log_mask
from randattn._core.library import hint, namespace, placement

from .adaptive_eva_keys import Choice, Heads, Index, attend_adaptively, choosers, index_keys
from .adaptive_eva_options import axes_of_heads, lead_of_keys, most_choosers, number_of_choosers
from .final_average import watched_average

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from randattn._core.inputs import Inputs

    from .adaptive_eva_options import Options

    Array = Any

# Queries by whose error heads are ranked.
_PROBES = 64


class _Tokens(NamedTuple):
    """Scaled queries (B, H G, N, D), keys and values (B, H, M, .), and a mask (B, H, M)."""

    q: Array
    k: Array
    v: Array
    mask: Array | None

    def attend(self, heads: Heads | None, queries: slice, keys: slice, *, is_causal: bool) -> Average:
        """Average these keys for these queries; None stands for all heads."""
        xp, k, v = namespace(self.q), self.k[:, :, keys, :], self.v[:, :, keys, :]
        mask = None if self.mask is None else self.mask[:, :, keys]
        q = self.q[:, :, queries, :]
        if heads is not None:
            q, k, v = heads.take(q), heads.take_keys(k), heads.take_keys(v)
            mask = None if mask is None else heads.take_keys(mask)
        (batch, count, n, d), of_keys = q.shape, k.shape[1]
        if count != of_keys:
            # Grouped queries: an axis of length one, so that no key is repeated.
            q = xp.reshape(q, (batch, of_keys, count // of_keys, n, d))
            k, v = k[:, :, None, ...], v[:, :, None, ...]
            mask = None if mask is None else mask[:, :, None, :]
        one = Keys(k, v, log_mask(mask, q))
        found = attend(q, *(one.for_last(n) if is_causal else (one,)))
        return Average(
            xp.reshape(found.out, (batch, count, n, v.shape[-1])),
            xp.reshape(found.log_norm, (batch, count, n)),
        )


def estimate(x: Inputs, options: Options, *, is_part: bool = False) -> Average:
    """Return the averages (..., N, E); a part of the keys is no last average, which `diagnose` looks at."""
    xp, lead = x.xp, x.lead
    tokens = _of_heads(x, lead)
    (_, heads, n, _), m = tokens.q.shape, tokens.k.shape[2]
    known = m - n + options.first if options.is_causal else m
    index = index_keys(tokens.k, tokens.v, tokens.mask, options.group_size, known)
    # The last average of the estimator where nothing is merged with it.
    is_last = not (is_part or options.is_causal or options.exact_heads)
    average = watched_average if is_last else attend
    first = None
    if options.is_causal:
        first = tokens.attend(None, slice(options.first), slice(known), is_causal=True)
    number = xp.arange(heads, device=placement(x.q))[None, :]
    every = Heads(number, number // (heads // tokens.k.shape[1]), True)
    parts = [] if first is None else [first]
    if options.exact_heads:
        segments = _segments(options, n, m)
        orders = _orders(tokens, index, options, every, segments, first)
        for queries, order in zip(segments, orders, strict=True):
            parts.append(_with_exact_heads(tokens, index, options, order, queries))
    else:
        parts.append(_blocks(tokens, index, options, every, slice(options.first, n), average))
    out, log_norm = _joined(parts, (-2, -1))
    return Average(xp.reshape(out, (*lead, n, out.shape[-1])), xp.reshape(log_norm, (*lead, n)))


def _segments(options: Options, n: int, m: int) -> list[slice]:
    """Return the queries after the first ones, in one or two segments for which the heads are ranked.

    A causal call ranks again at the first block with half of the keys before it, if these are twice as many
    as at the first ranking: a head may begin to look keys up late in a text. Each ranking takes JAX a second
    to compile.
    """
    start = options.first
    if options.is_causal:
        for later in range(start + options.block_size, n, options.block_size):
            if m - n + later >= max(m / 2, 2 * (m - n + start)):
                return [slice(start, later), slice(later, n)]
    return [slice(start, n)]


def _with_exact_heads(x: _Tokens, index: Index, options: Options, order: Array, queries: slice) -> Average:
    """Return the averages of a segment, of which the first heads in an order (B, H G) are exact."""
    per_key, (n, m) = x.q.shape[1] // x.k.shape[1], (x.q.shape[2], x.k.shape[2])
    exact, rest = (
        Heads(part, part // per_key, False)
        for part in (order[:, : options.exact_heads], order[:, options.exact_heads :])
    )
    keys = slice(m - n + queries.stop if options.is_causal else m)
    exactly = x.attend(exact, queries, keys, is_causal=options.is_causal)
    found = _joined([exactly, _blocks(x, index, options, rest, queries, attend)], (1, 1))
    # The order of a permutation is its inverse: it brings the heads back to their places.
    place = backend_of(x.q).order_of(order)
    return Average(*(Heads(place, place, False).take(y) for y in found))


def _joined(parts: list[Average], axes: tuple[int, int]) -> Average:
    """Join averages along an axis of `out` and of `log_norm`."""
    if len(parts) == 1:
        return parts[0]
    xp = namespace(parts[0].out)
    return Average(
        *(xp.concat(list(y), axis=axis) for y, axis in zip(zip(*parts, strict=True), axes, strict=True))
    )


def _of_heads(x: Inputs, lead: tuple[int, ...]) -> _Tokens:
    """Return the tokens with one axis of heads and one of all other leading axes."""
    xp, mask = x.xp, x.key_mask
    of_keys = lead_of_keys(x)
    split = len(lead) - axes_of_heads(x)

    def flat(y: Array, lead: tuple[int, ...], trailing: int) -> Array:
        rest = y.shape[y.ndim - trailing :]
        batch, heads = math.prod(lead[:split]), math.prod(lead[split:])
        return xp.reshape(xp.broadcast_to(y, (*lead, *rest)), (batch, heads, *rest))

    return _Tokens(
        flat(x.root * x.q, lead, 2),
        flat(x.root * x.k, of_keys, 2),
        flat(x.v, of_keys, 2),
        None if mask is None else flat(mask, of_keys, 1),
    )


def _orders(
    x: _Tokens, index: Index, options: Options, every: Heads, segments: list[slice], first: Average | None
) -> list[Array]:
    """Return the heads (B, H G) for each segment, by their error on one block of queries: the largest first.

    In a causal call these are the last queries before the segment, and as many before them choose.
    """
    own, n, m = backend_of(x.q), x.q.shape[2], x.k.shape[2]
    size = min(_PROBES, options.block_size)
    starts = [(n - size) // 2]
    if options.is_causal:
        size = max(1, min(_PROBES, options.first // 2))
        starts = [queries.start - size for queries in segments]
    runs = [starts] if own.compiles_loops else [[start] for start in starts]
    found = _joined([_run(x, index, options, every, run, size, attend) for run in runs], (-2, -1)).out
    orders = []
    for number, start in enumerate(starts):
        queries = slice(start, start + size)
        if queries.stop <= options.first and first is not None:
            exact = first.out[:, :, queries, :]
        else:
            keys = slice(m - n + queries.stop if options.is_causal else m)
            exact = x.attend(every, queries, keys, is_causal=options.is_causal).out
        errors = _errors(found[:, :, number * size : (number + 1) * size, :], exact)
        orders.append(own.order_of(-errors, stable=True))
    return orders


def _errors(found: Array, exact: Array) -> Array:
    """Return the squared error of each head (B, H G), over that of zero."""
    xp, own = namespace(exact), backend_of(exact)
    errors, whole = (own.constant(xp.sum(y**2, axis=(-2, -1))) for y in (found - exact, exact))
    errors = errors / xp.where(whole == 0, 1.0, whole)
    # Rounding is no error: by it heads would have another order on each library.
    return xp.where(errors > xp.finfo(errors.dtype).eps, errors, 0.0)


def _blocks(
    x: _Tokens,
    index: Index,
    options: Options,
    heads: Heads,
    queries: slice,
    average: Callable[..., Average],
) -> Average:
    """Return the averages (B, A, n, E) of the heads for a segment of the queries."""
    runs = _runs(options, queries, together=backend_of(x.q).compiles_loops)
    return _joined([_run(x, index, options, heads, *run, average) for run in runs], (-2, -1))


def _runs(options: Options, queries: slice, *, together: bool) -> Iterator[tuple[range, int]]:
    """Yield runs of blocks that are computed together: the first query of each block, and its queries.

    The blocks of a causal run see the keys up to the last of them, masked: `together` makes one program of
    all blocks, and otherwise each block is a run of its own, without masks.
    """
    size, start, n = options.block_size, queries.start, queries.stop
    whole = n - (n - start) % size
    step = size if options.is_causal and not together else max(size, whole - start)
    for first in range(start, whole, step):
        yield range(first, first + step, size), size
    if whole < n:
        yield range(whole, n, n - whole), n - whole


def _run(
    x: _Tokens,
    index: Index,
    options: Options,
    heads: Heads,
    first: Sequence[int],
    size: int,
    average: Callable[..., Average],
) -> Average:
    """Return the averages (B, A, n, E) of blocks of `size` queries, each from its `first` query on."""
    xp, own, (batch, all_heads, _, d) = namespace(x.q), backend_of(x.q), x.q.shape
    choosing, starts = _choosing(x, options, first, size)
    q, blocks = heads.take(_of_blocks(x.q, first, size)), choosing.shape[2]
    count, keys = q.shape[1], starts[-1]
    arrays = [q, *(_own_tokens(x, heads, first, size) if options.is_causal else ())]
    widths = [y.shape[-1] for y in arrays]
    flat = [xp.reshape(y, (batch, count, blocks, size * y.shape[-1])) for y in arrays]
    more = [choosing]
    if len(set(starts)) > 1:
        more.append(xp.reshape(xp.asarray(starts, device=placement(q)), (1, 1, blocks, 1)))

    def of_blocks(*parts: Array) -> Array:
        done = parts[0].shape[2]
        shape = (batch, count, done, size)
        q, *of_block = (
            xp.reshape(y, (*shape, width)) for y, width in zip(parts[: len(widths)], widths, strict=True)
        )
        choosing, start = (*parts[len(widths) :], None)[:2]
        start = None if start is None else xp.reshape(start, (-1,))
        plan = Choice(keys, options.exact_of(keys), options.recent, choosing, start)
        out, log_norm = attend_adaptively(index, heads, q, plan, of_block, average)
        both = xp.concat([out, log_norm[..., None]], axis=-1)
        return xp.reshape(both, (*both.shape[:3], size * both.shape[-1]))

    scores = hint(batch * all_heads * (choosing.shape[-1] // d) * keys)
    rows = 1 if options.is_causal else max(1, block_sizes.CHOICE_NUMBERS // scores)
    both = own.by_rows(of_blocks, rows, *((y, -2) for y in (*flat, *more)))
    both = xp.reshape(both, (batch, count, blocks * size, both.shape[-1] // size))
    return Average(both[..., :-1], both[..., -1])


def _choosing(x: _Tokens, options: Options, first: Sequence[int], size: int) -> tuple[Array, list[int]]:
    """Return the choosers (B, H G, b, c D) of blocks, and the number of keys that each may choose from."""
    xp, (batch, heads, n, d), m = namespace(x.q), x.q.shape, x.k.shape[2]
    if options.is_causal:
        # As many queries before each block choose for it. Runs of theirs have one length.
        width = min(size, options.first, first[0])
        width -= width % most_choosers(width)
        own = xp.concat([x.q[:, :, start - width : start, :] for start in first], axis=2)
        starts = [m - n + start for start in first]
    else:
        own, width, starts = _of_blocks(x.q, first, size), size, [m] * len(first)
    own = xp.reshape(own, (batch, heads, len(first), width, d))
    return choosers(own, number_of_choosers(width)), starts


def _of_blocks(y: Array, first: Sequence[int], size: int) -> Array:
    """Return the tokens (B, H, b size, ...) of blocks, each from its `first` token on, on axis 2."""
    stops = [start + size for start in first]
    if stops[:-1] == list(first[1:]):
        return y[:, :, first[0] : stops[-1], ...]
    return namespace(y).concat([y[:, :, start : start + size, ...] for start in first], axis=2)


def _own_tokens(x: _Tokens, heads: Heads, first: Sequence[int], size: int) -> list[Array]:
    """Return the blocks' own keys, values and, as one feature, the bias of a mask: (B, A, b size, .)."""
    of_keys = [x.k.shape[2] - x.q.shape[2] + start for start in first]
    arrays = [x.k, x.v]
    if (bias := log_mask(x.mask, x.q)) is not None:
        arrays.append(bias[..., None])
    return [heads.take_keys(_of_blocks(y, of_keys, size)) for y in arrays]
