"""Causal EVA a token at a time: a window of tokens, and the groups that were over before it began."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import attend, backend_of, undisturbed
from randattn._core.average import Keys, average_of_all
from randattn._core.checks import broadcast_shapes
from randattn._core.inputs import check_causal, prepare, with_rank
from randattn._core.library import namespace, placement

from .states import match_state

if TYPE_CHECKING:
    from randattn._core.inputs import Inputs

    Array = Any


class EVAState(NamedTuple):
    """The state of causal `eva` after all tokens so far; groups have places for `max_tokens`.

    Attributes
    ----------
    q : array, shape (..., R, L, D)
        The window's queries, as its R groups of L tokens.
    k : array, shape (..., W, D)
        The window's keys.
    v : array, shape (..., W, E)
    bias : array, shape (..., W)
        0 for a token of the window, -inf for padding and what is still to come.
    mean_key : array, shape (..., C, D)
        Of each group that is over.
    beta : array, shape (..., C, E)
        Its control variate.
    weight : array, shape (..., C)
        Its size or one; 0 for a group that is not over.
    noise : array, shape (..., C, D)
        Added to the frequencies' means.
    tokens : integer array, shape ()
        So far.
    scale : array, shape ()
        Factor of the logits.
    by_size : array, shape ()
        1 where groups weigh by their size, or 0.
    """

    q: Array
    k: Array
    v: Array
    bias: Array
    mean_key: Array
    beta: Array
    weight: Array
    noise: Array
    tokens: Array
    scale: Array
    by_size: Array


@undisturbed
def eva_step(
    q: Array,
    k: Array,
    v: Array,
    state: EVAState,
    /,
    *,
    key_mask: Array | None = None,
    enable_gqa: bool = False,
) -> tuple[Array, EVAState]:
    """Causal `eva` of the next tokens.

    Parameters
    ----------
    q : array, shape (..., T, D)
        One or more tokens, heads first.
    k : array, shape (..., T, D)
        Their keys.
    v : array, shape (..., T, E)
        Their values.
    state : EVAState
        Of all tokens before, from `eva` with ``return_state=True`` or from this function.
    key_mask : boolean array, shape (..., T), optional
        True = attend, also in later steps.
    enable_gqa : bool, default False
        Let `q` have a multiple of the heads (axis -3) of `k` and `v`.

    Returns
    -------
    out : array, shape (..., T, E)
        The result of one call of `eva` on all tokens, for these; NaN beyond its `max_tokens`.
    state : EVAState
        After these tokens.

    Raises
    ------
    TypeError
        Not arrays, or of different libraries or dtypes; not an `EVAState` of these.
    ValueError
        Shapes or devices that do not fit each other or the state.

    See Also
    --------
    eva

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import eva, eva_step
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 9, 4))
    >>> options = {"window": 4, "group_size": 2, "is_causal": True}
    >>> prefill, state = eva(q[:, :5], k[:, :5], v[:, :5], max_tokens=9, return_state=True, **options)
    >>> step, state = eva_step(q[:, 5:], k[:, 5:], v[:, 5:], state)
    >>> bool(np.allclose(step, eva(q, k, v, **options)[:, 5:]))
    True
    """
    also = [(getattr(state, "beta", None), 2)]
    x = prepare(q, k, v, scale=1.0, key_mask=key_mask, enable_gqa=enable_gqa, also=also)
    check_causal(x, is_causal=True)
    sizes = _sizes(x.q.shape[-1], x.v.shape[-1])
    own = match_state("eva", EVAState, state, x, sizes, whole=("tokens",))
    after, out = backend_of(x.q).carry(_one, own, *((y, 1) for y in (x.q, x.k, x.v, _bias(x)[..., None])))
    return x.finish(out), _merged(x, after)


def _bias(x: Inputs) -> Array:
    """Return the logarithm of the key mask, also where there is none."""
    return x.xp.zeros_like(x.k[..., 0]) if x.key_bias is None else x.key_bias


def _sizes(d: int, e: int) -> dict[str, tuple[int | None, ...]]:
    """Return the trailing axes of a state's fields."""
    arrays: dict[str, tuple[int | None, ...]] = {
        "q": (None, None, d),
        "k": (None, d),
        "v": (None, e),
        "bias": (None,),
        "mean_key": (None, d),
        "beta": (None, e),
        "weight": (None,),
        "noise": (None, d),
    }
    return arrays | {"tokens": (), "scale": (), "by_size": ()}


def _merged(x: Inputs, state: EVAState) -> EVAState:
    sizes = _sizes(x.q.shape[-1], x.v.shape[-1])
    fields = zip(state, sizes.values(), strict=True)
    return EVAState(*(x.merge_heads(f, len(trailing)) if trailing else f for f, trailing in fields))


def _one(state: EVAState, q: Array, k: Array, v: Array, bias: Array) -> tuple[EVAState, Array]:
    """Return the state after one token, and its average."""
    xp, device = namespace(q), placement(q)
    length = state.q.shape[-2]
    window, count = state.k.shape[-2], state.beta.shape[-2]
    place = state.tokens % window
    slots = xp.arange(window, dtype=state.tokens.dtype, device=device)

    def put(old: Array, new: Array) -> Array:
        return xp.where(with_rank((slots == place)[:, None], old.ndim), new, old)

    *lead, _, _, d = state.q.shape
    queries = put(xp.reshape(state.q, (*lead, window, d)), q)
    keys, values = put(state.k, k), put(state.v, v)
    kept = xp.where(with_rank(slots < place, state.bias.ndim), state.bias, -math.inf)
    kept = put(kept[..., None], bias)[..., 0]

    far = log_of(state.weight)
    out, _ = attend(state.scale * q, Keys(keys, values, kept), Keys(state.mean_key, state.beta, far))
    fits = state.tokens < count * length
    out = xp.where(with_rank(fits, out.ndim), out, math.nan)

    state = state._replace(
        q=xp.reshape(queries, state.q.shape), k=keys, v=values, bias=kept, tokens=state.tokens + 1
    )
    is_over = place == window - 1
    return backend_of(is_over).when(is_over, _with_window, state), out


def _with_window(state: EVAState) -> EVAState:
    """Put the groups of a window that is over among the others."""
    xp, device, dtype = namespace(state.q), placement(state.q), state.q.dtype
    groups, length = state.q.shape[-3:-1]

    def parts(y: Array) -> Array:
        return xp.reshape(y, (*y.shape[:-2], groups, length, y.shape[-1]))

    keys, values, bias = parts(state.k), parts(state.v), parts(state.bias[..., None])[..., 0]
    (mean_q, _), (mean_k, log_size) = (average_of_all(bias, y) for y in (state.q, keys))
    first = (state.tokens - 1) // length - (groups - 1)
    number = xp.arange(state.beta.shape[-2], dtype=state.tokens.dtype, device=device)[:, None] - first
    number = number - xp.arange(groups, dtype=state.tokens.dtype, device=device)[None, :]
    here = xp.astype(number == 0, dtype)
    root = xp.sqrt(state.scale)
    noise = xp.matmul(with_rank(xp.matrix_transpose(here), state.noise.ndim), state.noise)
    w = root * (mean_q + mean_k) / 2 + noise
    beta, _ = attend(w[..., None, :], Keys(root * keys, values, bias, 1.0))
    size = xp.exp(log_size)
    weight = xp.where(state.by_size > 0, size, xp.astype(size > 0, dtype))

    def join(old: Array, new: Array) -> Array:
        return old + xp.matmul(with_rank(here, new.ndim), new)

    return state._replace(
        mean_key=join(state.mean_key, mean_k),
        beta=join(state.beta, beta[..., 0, :]),
        weight=join(state.weight[..., None], weight[..., None])[..., 0],
    )


def log_of(weight: Array) -> Array:
    """Return the logarithm, -inf of 0."""
    xp = namespace(weight)
    return xp.where(weight > 0, xp.log(xp.where(weight > 0, weight, 1.0)), -math.inf)


def state_after(
    x: Inputs, window: int, length: int, groups: Keys, eps: Array | None, count: int, by_size: bool
) -> EVAState:
    """Return the state after a whole call: its groups (..., C', X) in full windows count; `eps` is of all groups to come."""
    xp, device, dtype = x.xp, x.device, x.q.dtype
    n = x.q.shape[-2]
    full = n - n % window
    lead = broadcast_shapes(x.lead, groups.k.shape[:-2], groups.v.shape[:-2])

    def filled(y: Array, size: int, value: float = 0.0) -> Array:
        y = xp.broadcast_to(y, (*lead, *y.shape[-2:]))
        more = xp.full((*lead, size - y.shape[-2], y.shape[-1]), value, dtype=dtype, device=device)
        return xp.concat([y, more], axis=-2)

    over = groups.of(slice(0, full // length))
    assert over.bias is not None
    queries = filled(x.q[..., full:, :], window)
    noise = groups.k[..., :0, :] if eps is None else eps
    state = EVAState(
        xp.reshape(queries, (*lead, window // length, length, queries.shape[-1])),
        filled(x.k[..., full:, :], window),
        filled(x.v[..., full:, :], window),
        filled(_bias(x)[..., full:, None], window, -math.inf)[..., 0],
        filled(over.k, count),
        filled(over.v, count),
        filled(xp.exp(over.bias)[..., None], count)[..., 0],
        filled(noise, count),
        xp.asarray(n, device=device),
        xp.asarray(x.scale, dtype=dtype, device=device),
        xp.asarray(float(by_size), dtype=dtype, device=device),
    )
    return _merged(x, state)
