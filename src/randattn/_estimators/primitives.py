"""The two public primitives, `attend` and `merge`, with checks of their arguments."""

from __future__ import annotations

import math
from typing import Any

from randattn._backends import dispatch
from randattn._backends.dispatch import undisturbed
from randattn._core import average as plain
from randattn._core.average import Average, Keys
from randattn._core.checks import check_broadcast, check_floating, check_like
from randattn._core.inputs import check_causal, prepare, with_rank, working_precision
from randattn._core.library import Array, namespace


@undisturbed
def attend(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    /,
    *,
    pair_bias: Array | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    layout: str = "heads_first",
) -> Average:
    r"""Average the values with softmax weights and their biases: the primitive of every estimator.

    .. math::

        \mathrm{out}_n = \sum_m \mathrm{softmax}_m(q_n \cdot k_m + b_m)\, v_m, \qquad
        \mathrm{log\_norm}_n = \log \sum_m \exp(q_n \cdot k_m + b_m)

    A logit is a plain dot product, without a scale. The logits are computed in blocks of bounded size.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    bias : array, shape (..., M), optional
        Bias that is added to all logits of a key, in nats. ``-inf`` removes the key.
    pair_bias : array, shape (..., N, M), optional
        Bias that is added to the logit of a query and a key, in nats. Either axis may have length one.
    key_mask : boolean array, shape (M,) or (..., M), optional
        True = attend. Axes before M are those of `k`, each of its size or 1. Masked keys and values are never
        read, even where they hold NaN.
    query_mask : boolean array, shape (N,) or (..., N), optional
        False = padding: the row is zero with the norm -inf, whatever the query holds, and no gradient passes
        through it. The default is never `key_mask`: these keys may be a part of those that the queries see.
        Axes before N are those of `q`, each of its size or 1.
    is_causal : bool, default False
        Query n sees the keys up to n. Requires N = M.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v`, `out` and `log_norm`: (..., H, N, D), or (..., N, H, D). Masks of tokens-first
        arrays may leave the axis of heads out. Biases are heads first.

    Returns
    -------
    out : array, shape (..., N, E)
        The average, in the dtype of the inputs; zeros for a query without keys.
    log_norm : array, shape (..., N)
        Log-sum-exp of the logits, in nats; ``-inf`` for a query without keys. The dtype is float32 for inputs
        in half precision.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and one real floating dtype.
    ValueError
        Shapes or devices that do not fit each other.

    See Also
    --------
    merge : The same average over the union of two key sets.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import attend
    >>> q, k, v = np.zeros((1, 2)), np.zeros((3, 2)), np.array([[1.0], [2.0], [6.0]])
    >>> out, log_norm = attend(q, k, v)
    >>> out
    array([[3.]])
    >>> np.exp(log_norm)
    array([3.])
    """
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
    masks |= {"enable_gqa": enable_gqa, "layout": layout}
    x = prepare(q, k, v, scale=1.0, is_self=False, is_whole=False, **masks)
    check_causal(x, is_causal)
    xp, (n, m) = x.xp, (x.q.shape[-2], x.k.shape[-2])
    given = {"q": (x.q, 2), "k": (x.k, 2), "v": (x.v, 2)}
    if bias is not None:
        shape = tuple(getattr(bias, "shape", ()))
        bias = x.match("bias", bias, 1)
        if not shape or shape[-1] != m:
            raise ValueError(f"bias: expected shape (..., {m}), got {shape}")
        given["bias"] = (bias, 1)
    if x.key_mask is not None:
        # Not a sum: the caller's bias may be NaN under the mask.
        bias = x.key_bias if bias is None else xp.where(x.key_mask, bias, -math.inf)
    if pair_bias is not None:
        shape = tuple(getattr(pair_bias, "shape", ()))
        pair_bias = x.match("pair_bias", pair_bias, 2)
        if len(shape) < 2 or shape[-2] not in (1, n) or shape[-1] not in (1, m):
            raise ValueError(f"pair_bias: expected shape (..., {n}, {m}), got {shape}")
        given["pair_bias"] = (pair_bias, 2)
        pair_bias = xp.broadcast_to(pair_bias, (*pair_bias.shape[:-2], n, m))
        if x.key_mask is not None:
            # NaN here would be added to the -inf of a masked key.
            pair_bias = xp.where(x.key_mask[..., None, :], pair_bias, 0.0)
    check_broadcast(**given)
    keys = Keys(x.k, x.v, bias, pair_bias=pair_bias, is_causal=is_causal)
    out, log_norm = dispatch.attend(x.q, keys)
    if x.query_mask is not None:
        # `finish` sets rows of padding to zero. Their norm must vanish too, or they would weigh in `merge`.
        log_norm = xp.where(x.query_mask, log_norm, -math.inf)
    return Average(x.finish(out), x.in_layout(x.merge_heads(log_norm, 1), 1))


def merge(a: tuple[Array, Array], b: tuple[Array, Array], /) -> Average:
    r"""Merge two averages over disjoint key sets into the average over their union.

    .. math::

        l = \log(e^{l_1} + e^{l_2}), \qquad o = e^{l_1 - l} o_1 + e^{l_2 - l} o_2

    The operation is associative and commutative: keys can be cut into blocks, streamed, or spread over
    machines, in any order.

    Parameters
    ----------
    a, b : tuple of arrays, shapes (..., N, E) and (..., N)
        Pairs ``(out, log_norm)`` as `attend` returns them.

    Returns
    -------
    out : array, shape (..., N, E)
        The average over both sets, in the dtype of `out` in `a`; zeros for a query without keys in both.
    log_norm : array, shape (..., N)
        Log-sum-exp of the logits of both sets, in nats.

    Raises
    ------
    TypeError
        Arguments that are not pairs of arrays of one library and of real floating dtypes.
    ValueError
        Shapes or devices that do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import attend, merge
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((10, 4)) for _ in range(3))
    >>> whole = attend(q, k, v)
    >>> parts = merge(attend(q, k[:3], v[:3]), attend(q, k[3:], v[3:]))
    >>> np.allclose(whole.out, parts.out), np.allclose(whole.log_norm, parts.log_norm)
    (True, True)
    """
    (out_a, log_a), (out_b, log_b) = (_check_part(name, part, a) for name, part in (("a", a), ("b", b)))
    if out_a.shape[-2:] != out_b.shape[-2:]:
        raise ValueError(
            f"b: expected the queries and features of a, {tuple(out_a.shape[-2:])}, "
            f"got {tuple(out_b.shape[-2:])}"
        )
    if out_a.dtype != out_b.dtype:
        raise TypeError(f"b: expected the dtype of a, {out_a.dtype}, got {out_b.dtype}")
    check_broadcast(
        **{"a.out": (out_a, 2), "a.log_norm": (log_a, 1), "b.out": (out_b, 2), "b.log_norm": (log_b, 1)}
    )
    # Half precision is merged in float32, since exp(l1 - l) of close norms needs more than 11 bits.
    xp, dtype = namespace(out_a), out_a.dtype
    rank = max(out_a.ndim, log_a.ndim + 1, out_b.ndim, log_b.ndim + 1)
    out_a, out_b = (with_rank(working_precision(x), rank) for x in (out_a, out_b))
    log_a, log_b = (with_rank(xp.astype(x, out_a.dtype, copy=False), rank - 1) for x in (log_a, log_b))
    out, log_norm = plain.merge(Average(out_a, log_a), Average(out_b, log_b))
    return Average(xp.astype(out, dtype, copy=False), log_norm)


def _check_part(name: str, part: Any, first: Any) -> tuple[Array, Array]:
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise TypeError(f"{name}: expected a pair (out, log_norm), got {type(part).__name__}")
    out, log_norm = part
    for which, x in (("out", out), ("log_norm", log_norm)):
        check_like(f"{name}.{which}", x, first[0], "a.out")
        check_floating(f"{name}.{which}", x)
    if out.ndim < 2 or log_norm.ndim < 1 or log_norm.shape[-1] != out.shape[-2]:
        raise ValueError(
            f"{name}: expected shapes (..., N, E) and (..., N), "
            f"got {tuple(out.shape)} and {tuple(log_norm.shape)}"
        )
    return out, log_norm
