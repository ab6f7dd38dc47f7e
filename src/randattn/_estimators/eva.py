"""EVA: a window of keys exactly, each group of the others by one control variate.

``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log-size_c]).out``, over the union of the two sets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from randattn._backends.dispatch import attend, backend_of, undisturbed
from randattn._core.average import Average, Keys
from randattn._core.checks import as_real, broadcast_shapes, check_flags, check_option
from randattn._core.draws import normal_draws
from randattn._core.inputs import check_causal, prepare, with_rank
from randattn._core.library import namespace
from randattn._tokens.device_parts import cuts, fits_lanes, windows
from randattn._tokens.grids import blocks_over
from randattn._tokens.pooling import (
    blocks_of_queries,
    gather,
    gather_bias,
    given_landmarks,
    in_pieces,
    others,
    pool,
    pooling_ranks,
    scatter,
    union,
)

from .eva_step import state_after
from .final_average import final_average
from .options import bias_of_window, eva_layout, groups_to_draw

if TYPE_CHECKING:
    from collections.abc import Mapping

    from randattn._core.inputs import Inputs
    from randattn._tokens.device_parts import Cuts, Pieces
    from randattn._tokens.grids import Blocks
    from randattn._tokens.pooling import Parted

    from .options import Layout

    Array = Any


@undisturbed
def eva(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_groups: int | tuple[int, ...] | None = None,
    group_size: int | tuple[int, ...] | None = None,
    window: int | tuple[int, ...] = 64,
    window_bias: Array | None = None,
    landmarks: tuple[Array, Array] | None = None,
    group_weight: str = "size",
    disjoint: bool = True,
    # Not 1.0: Dynamo would trace twice, with a symbolic float and without.
    noise_scale: float = 1,
    rng: Any = None,
    noise: Array | None = None,
    query_mask: Array | None = None,
    grid: tuple[int, ...] | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    return_state: bool = False,
    max_tokens: int | None = None,
    enable_gqa: bool = False,
) -> Any:
    r"""Attend to a window of keys exactly, to every group of other keys by one control variate (EVA).

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, real floating, heads first. Leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_groups : int or tuple of int, optional
        Groups C of consecutive keys, by default 64, or as many as `landmarks` or `noise` has; at most
        M. On a `grid` a tuple gives the number on each axis; an int is laid out as the largest number
        up to it that fits, in the squarest blocks that this number allows (a prime makes strips).
    group_size : int or tuple of int, optional
        Groups by their tokens instead of their number; the last one may be smaller.
    window : int or tuple of int, default 64
        Tokens of the window of keys that a query sees exactly: blocks of so many tokens, the last one
        smaller where it does not divide. Of a `grid`, the block's size on each axis, or its number of
        tokens. 0: none, and the only choice where N is not M.
    window_bias : array, shape (..., W, W), optional
        Added to the logits of each query and key of a window, by their places in it: a learned relative
        bias, in nats.
    landmarks : tuple of arrays, shapes (..., C, D), optional
        ``(q_landmarks, k_landmarks)`` of the caller's own, in the units of `q` and `k`, instead of the
        groups' means.
    group_weight : {"size", "unit"}, default "size"
        A group weighs ``exp(q . kt)`` times its number of keys: calibrated, right without training; or
        without it, as the published models were trained.
    disjoint : bool, default True
        Leave out of the groups the keys that the window has. False counts them twice, as published.
    noise_scale : float, default 1.0
        Factor of the draws. The authors' code has ``D ** -0.25``.
    rng : int, numpy.random.Generator, torch.Generator, cupy.random.Generator or JAX key, optional
        Where the draws come from. One int gives the same draws on every library. With neither `rng` nor
        `noise` the frequencies are the means of the proposals: deterministic, for inference.
    noise : array, shape (..., C, D), optional
        The standard normal draws themselves; broadcasts.
    query_mask : boolean array, shape (..., N), optional
        False = padding: a row of zeros, whatever the query holds, no gradient from or to it, and no part in a
        landmark. By default `key_mask` where N = M, as in self-attention: pass all True where other
        queries are as many.
    grid : tuple of int, optional
        One, two or three sizes of the grid, in row-major order, that the tokens lie on; N = M.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (..., M), optional
        True = attend. What lies under False is never read, whatever it holds; a group of padding alone
        has no weight. Padding may move the borders of the groups, nothing else.
    is_causal : bool, default False
        Query n sees the keys up to n: those of its window, and the groups that are over where the window
        begins. N = M; `group_size` divides `window`, by default it is as large.
    return_state : bool, default False
        With ``is_causal=True``: return the state after the last token too, for `eva_step`.
    max_tokens : int, optional
        With ``is_causal=True``: draw, and with ``return_state=True`` keep places, for the groups of so many
        tokens, by default N.
    enable_gqa : bool, default False
        Let `q` have a multiple of the heads (axis -3) of `k` and `v`.

    Returns
    -------
    array, shape (..., N, E), or a pair of it and an `EVAState` with ``return_state=True``
        Of the inputs' library, dtype and device; half precision is summed in float32. A query with
        no key left gets zeros.

    Raises
    ------
    TypeError
        Not arrays, or of different libraries or dtypes, or not floating; a generator of another library.
    ValueError
        Shapes, devices, counts or options that do not fit; both `rng` and `noise`.
    NotImplementedError
        `window_bias` with ``return_state=True``.

    See Also
    --------
    adaptive_eva : The estimator for trained models.

    Notes
    -----
    Softmax attention over the keys E of the window and one key :math:`\tilde k_c` for each group
    :math:`P_c`, its mean, with the value :math:`\beta_c = f(w_c)`, the f of `rfa` over the group's keys
    alone, at :math:`w_c \sim N((\tilde q_c + \tilde k_c)/2, I)` ([1]_, section 4). Exact where every
    group is one key, or the window is the whole sequence. In O(N (C + W)) time; causal, the groups are as
    many as the sequence is long, N / group_size.

    Where a window cuts a group, the part outside the window is a group of its own for its queries.

    References
    ----------
    .. [1] L. Zheng, J. Yuan, C. Wang, L. Kong, "Efficient Attention via Control Variates", ICLR 2023,
       arXiv 2302.04542.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import eva, softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 36, 4))
    >>> eva(q, k, v, num_groups=9, window=4, rng=0).shape
    (2, 36, 4)
    >>> np.allclose(eva(q, k, v, num_groups=36, window=(2, 2), grid=(6, 6)), softmax_attention(q, k, v))
    True
    """
    check_option("group_weight", group_weight, ("size", "unit"))
    noise_scale = as_real("noise_scale", noise_scale)
    check_flags(disjoint=disjoint, return_state=return_state, is_causal=is_causal)
    if return_state and (not is_causal or landmarks is not None or query_mask is not None):
        raise ValueError("return_state: expected is_causal=True, and neither landmarks nor query_mask")
    if return_state and window_bias is not None:
        raise NotImplementedError("window_bias: eva_step has none, so that return_state=True has not either")
    if is_causal and not disjoint:
        raise ValueError("is_causal: expected disjoint=True")
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
    also = [*pooling_ranks(landmarks, noise), (window_bias, 2)]
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, also=also, **masks)
    check_causal(x, is_causal)
    layout = eva_layout(
        x.q.shape[-2],
        x.k.shape[-2],
        grid=grid,
        window=window,
        num_groups=num_groups,
        group_size=group_size,
        is_causal=is_causal,
        like=(landmarks, noise),
    )
    pair_bias = bias_of_window(x, window_bias, layout.window, is_causal=is_causal)
    count = groups_to_draw(max_tokens, x.q.shape[-2], layout, is_causal=is_causal)

    split = _split(x, layout, is_causal=is_causal, disjoint=disjoint)
    (kt, log_size), of_keys = union(pool(x.k, split.atoms, x.key_mask), split.parts)
    if landmarks is None:
        qt, _ = pool(x.q, blocks_of_queries(x, layout.groups), x.query_mask)
    else:
        qt, kt = given_landmarks(x, landmarks, layout.groups.index.shape[0])
    w = x.root * (qt + kt) / 2
    lead = w.shape[:-2] if pair_bias is None else broadcast_shapes(w.shape[:-2], pair_bias.shape[:-3])
    eps = normal_draws(x, (count, w.shape[-1]), rng=rng, noise=noise, axes="C, D", lead=lead)
    if eps is not None:
        eps = noise_scale * eps
        w = w + eps[..., : w.shape[-2], :]

    (beta, _), of_values = union(_control_variates(x, w, split), split.parts)
    groups = Keys(kt, beta, _weight(log_size, group_weight))
    if layout.window is None:
        return x.finish(final_average(x.q, groups, scale=x.scale))
    rests = []
    if split.rest is not None:
        given = kt if landmarks is not None else None
        rests = [_rests(of_values, of_keys, split.rest, given, group_weight)]
    out = x.finish(_by_windows(x, layout, split, groups, rests, pair_bias, is_causal=is_causal))
    if not return_state:
        return out
    (window,), (size,) = layout.window, layout.sizes
    return out, state_after(x, window, size, groups, eps, count, by_size=group_weight == "size")


def eva_landmarks(x: Inputs, options: Mapping[str, Any], is_causal: bool) -> tuple[Array, Array]:
    """Return the means of queries and keys (..., C, D) of each group."""
    given: dict[str, Any] = {name: options.get(name) for name in ("grid", "num_groups", "group_size")}
    window, n, m = options.get("window", 64), x.q.shape[-2], x.k.shape[-2]
    groups = eva_layout(n, m, window=window if n == m else 0, is_causal=is_causal, **given).groups
    (qt, _), (kt, _) = pool(x.q, blocks_of_queries(x, groups), x.query_mask), pool(x.k, groups, x.key_mask)
    return qt, kt


class _Split(NamedTuple):
    """How groups are split by windows, and over devices.

    Attributes
    ----------
    lanes : int
        In so many the tokens lie over devices.
    cut : Cuts or None
        By windows, whose keys are left out of the groups.
    rest : Cuts or None
        The same where some group is cut: the part outside the window is a group of its own.
    parts : Pieces or None
        The groups' pieces; None where groups are the pieces.
    atoms : Blocks
        The smallest pieces.
    """

    lanes: int
    cut: Cuts | None
    rest: Cuts | None
    parts: Pieces | None
    atoms: Blocks


def _split(x: Inputs, layout: Layout, *, is_causal: bool, disjoint: bool) -> _Split:
    tile, lanes = layout.window, 1 if is_causal else backend_of(x.k).lanes_of(x.k)
    if lanes > 1 and tile is not None and not fits_lanes(layout.tokens, tile, lanes):
        lanes = 1
    cut = None
    if tile is not None and disjoint and not is_causal:
        cut = cuts(layout.tokens, (layout.how, layout.sizes), tile, lanes)
    rest = cut if cut is not None and cut.is_cut.size else None
    parts = in_pieces(x.k, layout.groups) if rest is None else rest.pieces
    return _Split(lanes, cut, rest, parts, layout.groups if parts is None else parts.atoms)


def _control_variates(x: Inputs, w: Array, split: _Split) -> Average:
    """Return ``beta_c = f(w_c)`` over the keys of each atom alone, (..., A, E), and log Z."""
    at = split.atoms
    if split.parts is not None and split.parts.levels:
        w = backend_of(w).take(w, split.parts.group_of_atom, axis=-2)
    keys = Keys(gather(x.k, at), gather(x.v, at), gather_bias(x.k, x.key_mask, at), x.scale)
    beta, log_z = attend(w[..., None, :], keys, scale=x.root)
    return Average(beta[..., 0, :], log_z[..., 0])


def _by_windows(
    x: Inputs,
    layout: Layout,
    split: _Split,
    groups: Keys,
    rests: list[Keys],
    pair_bias: Array | None,
    *,
    is_causal: bool,
) -> Array:
    """Attend from each window to its own keys exactly, and to the groups beside them: (..., N, E)."""
    assert layout.window is not None
    at, own = windows(layout.tokens, layout.window, split.lanes), backend_of(x.q)
    near = Keys(gather(x.k, at), gather(x.v, at), gather_bias(x.k, x.key_mask, at))
    near = near._replace(pair_bias=pair_bias, is_causal=is_causal and pair_bias is None)
    assert groups.bias is not None
    kt, beta, log_weight = groups.k[..., None, :, :], groups.v[..., None, :, :], groups.bias[..., None, :]
    if split.cut is not None:
        outside = with_rank(own.along(split.cut.outside, x.q), x.q.ndim)
        log_weight = x.xp.where(outside, log_weight, -math.inf)
    if is_causal:
        over = blocks_over(layout.tokens, (layout.how, layout.sizes), layout.window)
        log_weight = x.xp.where(with_rank(own.along(over, x.q), x.q.ndim), log_weight, -math.inf)
    out = final_average(gather(x.q, at), near, Keys(kt, beta, log_weight), *rests, scale=x.scale)
    return scatter(out, at, x.q)


def _rests(values: Parted, keys: Parted, cut: Cuts, given: Array | None, group_weight: str) -> Keys:
    """Return for each window the parts outside it of the groups that it cuts, as groups of their own."""
    beta, _ = others(values, cut)
    kt, log_size = others(keys, cut)
    if given is not None:
        kt = backend_of(given).take(given, cut.group_of_cut, axis=-2)
        kt = namespace(kt).reshape(kt, (*kt.shape[:-2], *cut.group_of_cut.shape, kt.shape[-1]))
    return Keys(kt, beta, _weight(log_size, group_weight))


def _weight(log_size: Array, group_weight: str) -> Array:
    """Return the groups' log weights; a group of padding alone has none in any case."""
    if group_weight == "size":
        return log_size
    xp = namespace(log_size)
    return xp.where(log_size == -math.inf, log_size, xp.zeros_like(log_size))
