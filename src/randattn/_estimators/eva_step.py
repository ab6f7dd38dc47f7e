"""Causal EVA, one token at a time: the window of the token, and the groups that ended before it began."""

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
    """The state of causal `eva` after the tokens so far, with room for the C groups of `max_tokens` tokens.

    Attributes
    ----------
    q : array, shape (..., R, L, D)
        Queries of the window, as its R groups of L tokens.
    k : array, shape (..., W, D)
        Keys of the window.
    v : array, shape (..., W, E)
        Values of the window.
    bias : array, shape (..., W)
        0 for a token of the window, -inf for padding and for a token to come.
    mean_key : array, shape (..., C, D)
        Mean key of each group of the full windows.
    beta : array, shape (..., C, E)
        Control variate of each group of the full windows.
    weight : array, shape (..., C)
        Weight of each group of the full windows, its size or 1; 0 for the other groups.
    noise : array, shape (..., C, D)
        Scaled draws that are added to the means of the frequencies.
    tokens : integer array, shape ()
        Number of tokens so far.
    scale : array, shape ()
        Factor of the logits.
    by_size : array, shape ()
        1 for ``group_weight="size"``, 0 for "unit".
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
    layout: str = "heads_first",
) -> tuple[Array, EVAState]:
    """Continue causal `eva` with the next tokens.

    Parameters
    ----------
    q : array, shape (..., T, D)
        Queries of the next T tokens, at least one, heads first.
    k : array, shape (..., T, D)
        Keys of these tokens.
    v : array, shape (..., T, E)
        Values of these tokens.
    state : EVAState
        State after all earlier tokens, from `eva` with ``return_state=True`` or from this function.
    key_mask : boolean array, shape (T,) or (..., T), optional
        True = attend, in this step and in later ones. Axes before T are those of `k`, each of its size or 1.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v` and the result: (..., H, T, D), or (..., T, H, D). Masks of tokens-first arrays
        may leave the axis of heads out. Other arguments are heads first.

    Returns
    -------
    out : array, shape (..., T, E)
        The rows that one call of `eva` on all tokens gives for these tokens; NaN for tokens beyond the
        `max_tokens` of that call.
    state : EVAState
        State after these tokens.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and dtype; a state that is no `EVAState` of such arrays.
    ValueError
        Shapes or devices that do not fit each other or the state.

    See Also
    --------
    eva : The call on all tokens.

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
    given: dict[str, Any] = {"key_mask": key_mask, "enable_gqa": enable_gqa, "layout": layout}
    x = prepare(q, k, v, scale=1.0, is_whole=False, also=also, **given)
    check_causal(x, is_causal=True)
    # The state carries the scale, as an array: `prepare` gets the factor one.
    sizes = _sizes(x.q.shape[-1], x.v.shape[-1])
    own = match_state("eva", EVAState, state, x, sizes, whole=("tokens",))
    after, out = backend_of(x.q).carry(_one, own, *((y, 1) for y in (x.q, x.k, x.v, _bias(x)[..., None])))
    return x.finish(out), _merged(x, after)


def _bias(x: Inputs) -> Array:
    """Return the logarithm of the key mask, zeros where no mask is given."""
    return x.xp.zeros_like(x.k[..., 0]) if x.key_bias is None else x.key_bias


def _sizes(d: int, e: int) -> dict[str, tuple[int | None, ...]]:
    """Return the trailing axes of the fields of a state."""
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
    """Return the state after one token, and the output of the token."""
    xp, device = namespace(q), placement(q)
    length = state.q.shape[-2]
    window, count = state.k.shape[-2], state.beta.shape[-2]
    place = state.tokens % window
    slots = xp.arange(window, dtype=state.tokens.dtype, device=device)

    def put(old: Array, new: Array) -> Array:
        # Not an assignment: `place` is an array, and JAX's arrays are constants.
        return xp.where(with_rank((slots == place)[:, None], old.ndim), new, old)

    *lead, _, _, d = state.q.shape
    queries = put(xp.reshape(state.q, (*lead, window, d)), q)
    keys, values = put(state.k, k), put(state.v, v)
    # Slots from `place` on still hold the window before: their tokens are in groups already.
    kept = xp.where(with_rank(slots < place, state.bias.ndim), state.bias, -math.inf)
    kept = put(kept[..., None], bias)[..., 0]

    # Equation: out = attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log |P_c|]).
    far = log_of(state.weight)
    out, _ = attend(state.scale * q, Keys(keys, values, kept), Keys(state.mean_key, state.beta, far))
    # Beyond `max_tokens` no slot is left for a group. A traced program cannot raise: the output is NaN.
    fits = state.tokens < count * length
    out = xp.where(with_rank(fits, out.ndim), out, math.nan)

    state = state._replace(
        q=xp.reshape(queries, state.q.shape), k=keys, v=values, bias=kept, tokens=state.tokens + 1
    )
    is_over = place == window - 1
    return backend_of(is_over).when(is_over, _with_window, state), out


def _with_window(state: EVAState) -> EVAState:
    """Return the state with the groups of a full window added."""
    xp, device, dtype = namespace(state.q), placement(state.q), state.q.dtype
    groups, length = state.q.shape[-3:-1]

    def parts(y: Array) -> Array:
        return xp.reshape(y, (*y.shape[:-2], groups, length, y.shape[-1]))

    keys, values, bias = parts(state.k), parts(state.v), parts(state.bias[..., None])[..., 0]
    (mean_q, _), (mean_k, log_size) = (average_of_all(bias, y) for y in (state.q, keys))
    first = (state.tokens - 1) // length - (groups - 1)
    number = xp.arange(state.beta.shape[-2], dtype=state.tokens.dtype, device=device)[:, None] - first
    number = number - xp.arange(groups, dtype=state.tokens.dtype, device=device)[None, :]
    # here[c, r] is 1 where slot c belongs to group r of the window. Slots are numbers in arrays, so that
    # reads and writes of them are products with this matrix.
    here = xp.astype(number == 0, dtype)
    root = xp.sqrt(state.scale)
    noise = xp.matmul(with_rank(xp.matrix_transpose(here), state.noise.ndim), state.noise)
    # Equation: w_c = (qt_c + kt_c)/2 + eps_c, then beta_c = f(w_c) over the keys of the group.
    w = root * (mean_q + mean_k) / 2 + noise
    beta, _ = attend(w[..., None, :], Keys(root * keys, values, bias, 1.0))
    size = xp.exp(log_size)
    weight = xp.where(state.by_size > 0, size, xp.astype(size > 0, dtype))

    def join(old: Array, new: Array) -> Array:
        # The slots of these groups hold zeros so far.
        return old + xp.matmul(with_rank(here, new.ndim), new)

    return state._replace(
        mean_key=join(state.mean_key, mean_k),
        beta=join(state.beta, beta[..., 0, :]),
        weight=join(state.weight[..., None], weight[..., None])[..., 0],
    )


def log_of(weight: Array) -> Array:
    """Return the logarithm of a weight, -inf for the weight 0."""
    xp = namespace(weight)
    # The inner `where` keeps log(0) out of the branch that is not taken: its gradient there would be NaN.
    return xp.where(weight > 0, xp.log(xp.where(weight > 0, weight, 1.0)), -math.inf)


def state_after(
    x: Inputs, window: int, length: int, groups: Keys, eps: Array | None, count: int, by_size: bool
) -> EVAState:
    """Return the state after a call of `eva`: the groups of its full windows, and its last, open window.

    `groups` has the groups of the call (..., C', X). `eps` has the scaled draws of all `count` groups of the
    state, or is None without draws.
    """
    xp, device, dtype = x.xp, x.device, x.q.dtype
    n = x.q.shape[-2]
    full = n - n % window
    lead = broadcast_shapes(x.lead, groups.k.shape[:-2], groups.v.shape[:-2])

    def filled(y: Array, size: int, value: float = 0.0) -> Array:
        y = xp.broadcast_to(y, (*lead, *y.shape[-2:]))
        more = xp.full((*lead, size - y.shape[-2], y.shape[-1]), value, dtype=dtype, device=device)
        return xp.concat([y, more], axis=-2)

    # The open window goes into the state by its tokens; it has no groups before it is full.
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
