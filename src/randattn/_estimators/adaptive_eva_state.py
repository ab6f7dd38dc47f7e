"""The state of `adaptive_eva_step`: the tokens so far, those but the last in groups, with places for more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import backend_of
from randattn._core.checks import as_count
from randattn._core.indexing import rows
from randattn._core.inputs import log_mask
from randattn._core.library import namespace

from .adaptive_eva_options import lead_of_keys

if TYPE_CHECKING:
    from randattn._core.inputs import Inputs

    Array = Any

# Keys of a group. With groups of 8 a step over 32,768 tokens erred by 0.050 instead of 0.062, and took 5.6 ms
# instead of 4.4 (docs/notes/adaptive_eva.md has the measurements behind all of these numbers).
GROUP = 16
# The last tokens, at most so many, are exact. Half of them go into groups at once: an append to a large array
# copies it where arrays are constants.
RECENT = 256
# A query reads one feature of so many of all keys, and at least `_LEAST_FEATURES`.
_FEATURES_SHARE, _LEAST_FEATURES = 4, 8


class AdaptiveEVAState(NamedTuple):
    """The tokens so far, for `adaptive_eva_step`, with places for P = 16 C in groups and R recent ones.

    With grouped queries the leading axes are those of the keys.

    Attributes
    ----------
    features : integer array, shape (..., F)
        The features by which queries choose groups: a quarter of the D, and at least eight.
    by_feature : array, shape (..., F, 16, C)
        These features of the keys in groups: key j of group c is at [..., j, c].
    tokens : array, shape (..., P, D + E)
        Keys and values of the groups; zeros for padding and tokens to come.
    bias : array, shape (..., C, 16)
        0 for a key of a group, -inf for padding and tokens to come.
    means : array, shape (..., C, D + E)
        Mean key and mean value of each group.
    sizes : array, shape (..., C)
        Number of keys of each group, without padding.
    recent : array, shape (..., R, D + E)
        Keys and values of the tokens after those in groups.
    recent_bias : array, shape (..., R)
        0 for such a token, -inf for padding and tokens to come.
    indexed : integer array, shape ()
        Number of tokens in groups.
    number : integer array, shape ()
        Number of all tokens so far.
    scale : array, shape ()
        Factor of the logits.
    """

    features: Array
    by_feature: Array
    tokens: Array
    bias: Array
    means: Array
    sizes: Array
    recent: Array
    recent_bias: Array
    indexed: Array
    number: Array
    scale: Array


def lead_of_queries(x: Inputs, lead: tuple[int, ...]) -> tuple[int, ...]:
    """Return the leading axes of queries whose keys have the leading axes `lead`."""
    return (*lead[:-1], x.lead[-1]) if x.heads is not None and lead[-1] == 1 else lead


def by_key_head(x: Inputs, q: Array, lead: tuple[int, ...]) -> Array:
    """Return queries by the head of their keys (L, G, T, D), with the G that share it beside each other."""
    whole, rest, heads = lead_of_queries(x, lead), tuple(q.shape[-2:]), math.prod(lead)
    shared = 1 if whole == lead else whole[-1]
    return x.xp.reshape(x.xp.broadcast_to(q, (*whole, *rest)), (heads, shared, *rest))


def refuse_lazy(x: Inputs) -> None:
    """Raise for arrays whose values are computed later: a step appends to its state at once."""
    if backend_of(x.q).is_lazy:
        raise NotImplementedError("q: adaptive_eva has no steps on Dask; expected arrays of another library")


def axes_of(d: int, e: int) -> dict[str, tuple[int | None, ...]]:
    """Return the trailing axes of the fields of a state."""
    arrays: dict[str, tuple[int | None, ...]] = {
        "features": (number_of_features(d),),
        "by_feature": (number_of_features(d), GROUP, None),
        "tokens": (None, d + e),
        "bias": (None, GROUP),
        "means": (None, d + e),
        "sizes": (None,),
        "recent": (RECENT, d + e),
        "recent_bias": (RECENT,),
    }
    return arrays | {"indexed": (), "number": (), "scale": ()}


def given_back(x: Inputs, state: AdaptiveEVAState, lead: tuple[int, ...]) -> AdaptiveEVAState:
    """Return the state with the leading axes that a caller has."""
    axes = [len(a) for a in axes_of(x.q.shape[-1], x.v.shape[-1]).values()]

    def whole(y: Array, trailing: int) -> Array:
        return x.merge_heads(x.xp.reshape(y, (*lead, *y.shape[1:])), trailing)

    return AdaptiveEVAState(*(whole(y, n) if n else y for y, n in zip(state, axes, strict=True)))


def number_of_features(d: int) -> int:
    """Return the number of features of the keys, of d, that choose."""
    return min(d, max(_LEAST_FEATURES, d // _FEATURES_SHARE))


def with_groups(state: AdaptiveEVAState) -> AdaptiveEVAState:
    """Return the state with the first half of the recent tokens in groups."""
    xp, own = namespace(state.tokens), backend_of(state.tokens)
    size = RECENT // 2
    moved = _in_groups(state.recent[:, :size, :], state.recent_bias[:, :size], state.features)
    first = state.indexed // GROUP
    starts = ((first, -1), (state.indexed, -2), (first, -2), (first, -2), (first, -1))
    fields = [own.put(old, new, *at) for old, new, at in zip(state[1:6], moved, starts, strict=True)]
    recent, bias = state.recent[:, size:, :], state.recent_bias[:, size:]
    recent = xp.concat([recent, xp.zeros_like(recent)], axis=-2)
    bias = xp.concat([bias, xp.full_like(bias, -math.inf)], axis=-1)
    last = (recent, bias, state.indexed + size, state.number, state.scale)
    return AdaptiveEVAState._make((state.features, *fields, *last))


def _in_groups(tokens: Array, bias: Array, features: Array) -> tuple[Array, ...]:
    """Return the fields of a state, from `by_feature` to `sizes`, with whole groups of (L, T, D + E)."""
    xp, (heads, length, width) = namespace(tokens), tokens.shape
    count = length // GROUP
    groups = xp.reshape(tokens, (heads, count, GROUP, width))
    bias = xp.reshape(bias, (heads, count, GROUP))
    sizes = xp.sum(xp.astype(bias == 0, tokens.dtype), axis=-1)
    means = xp.sum(groups, axis=-2) / xp.where(sizes > 0, sizes, 1.0)[..., None]
    by_key = xp.reshape(xp.permute_dims(groups, (0, 3, 2, 1)), (heads, width, length))
    by_feature = xp.reshape(rows(by_key, features), (heads, -1, GROUP, count))
    return by_feature, tokens, bias, means, sizes


def _chosen_features(q: Array, k: Array, bias: Array) -> Array:
    """Return the features (L, F) with the most variance of ``q . k``: q (L, G, T, D), k (L, M, D)."""
    xp, own, number = namespace(q), backend_of(q), number_of_features(q.shape[-1])
    q, k, weight = own.constant(q), own.constant(k), xp.astype(bias == 0, k.dtype)[..., None]
    total = xp.sum(weight, axis=-2, keepdims=True)
    k = weight * (k - xp.sum(k, axis=-2, keepdims=True) / xp.where(total > 0, total, 1.0))
    return own.in_order(own.largest(xp.sum(q * q, axis=(1, 2)) * xp.sum(k * k, axis=-2), number))


def state_after(x: Inputs, max_tokens: Any) -> AdaptiveEVAState:
    """Return the state after a call, with places for `max_tokens` tokens, by default for those so far."""
    refuse_lazy(x)
    xp, device, dtype, m = x.xp, x.device, x.q.dtype, x.k.shape[-2]
    places = m if max_tokens is None else as_count("max_tokens", max_tokens, minimum=m)
    half = RECENT // 2
    # One half of the recent tokens goes into groups at once: no state is smaller.
    places = max(half, -(-places // GROUP) * GROUP)
    # As steps would have left it: from one half to all of the recent places are full.
    indexed = max(0, -(-(m - RECENT) // half) * half)
    lead = lead_of_keys(x)
    heads = math.prod(lead)
    tokens = xp.concat([xp.broadcast_to(y, (*lead, *y.shape[-2:])) for y in (x.k, x.v)], axis=-1)
    tokens = xp.reshape(tokens, (heads, *tokens.shape[-2:]))
    bias = xp.zeros((heads, m), dtype=dtype, device=device)
    if x.key_mask is not None:
        bias = xp.reshape(log_mask(xp.broadcast_to(x.key_mask, (*lead, m)), x.q), (heads, m))

    q = by_key_head(x, x.q[..., max(0, x.q.shape[-2] - RECENT) :, :], lead)
    features = _chosen_features(q, tokens[..., : x.q.shape[-1]], bias)

    def filled(part: slice, size: int) -> tuple[Array, Array]:
        found = []
        for y, value in ((tokens[:, part, :], 0.0), (bias[:, part, None], -math.inf)):
            shape = (heads, size - y.shape[-2], y.shape[-1])
            found.append(xp.concat([y, xp.full(shape, value, dtype=dtype, device=device)], axis=-2))
        return found[0], found[1][..., 0]

    groups = _in_groups(*filled(slice(indexed), places), features)
    numbers = (xp.asarray(number, device=device) for number in (indexed, m))
    scale = xp.asarray(x.scale, dtype=dtype, device=device)
    state = (features, *groups, *filled(slice(indexed, m), RECENT), *numbers, scale)
    return given_back(x, AdaptiveEVAState._make(state), lead)
