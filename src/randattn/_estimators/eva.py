"""EVA: exact attention to a window of keys, and one control variate for each group of the other keys.

``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log-size_c]).out``, over the union of the two sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from randattn._backends.dispatch import attend, backend_of, undisturbed
from randattn._core.average import Average, Keys
from randattn._core.checks import as_real, broadcast_shapes, check_effect, check_flags, check_option
from randattn._core.draws import normal_draws
from randattn._core.inputs import Inputs, check_causal, prepare, with_rank
from randattn._core.library import Array, namespace
from randattn._tokens.device_parts import Cuts, Pieces, cuts, fits_lanes, windows
from randattn._tokens.grids import Blocks, blocks_over
from randattn._tokens.pooling import (
    Parted,
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
from .options import Layout, bias_of_window, eva_layout, groups_to_draw


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
    layout: str = "heads_first",
) -> Any:
    r"""Attend to a window of keys exactly, and to each group of other keys by one control variate (EVA).

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. The leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_groups : int or tuple of int, optional
        Number C of groups of consecutive keys, at most M; by default 64, or as many as `landmarks` or `noise`
        has. On a `grid`, a tuple gives the number on each axis, and an int gives the largest number up to
        it that fits, in blocks as square as that number allows (a prime number gives strips).
    group_size : int or tuple of int, optional
        Tokens of a group, in place of the number of groups; the last group may be smaller. On a `grid`, the
        size on each axis or the number of tokens.
    window : int or tuple of int, default 64
        Tokens of a window. Windows cut the sequence into blocks of this size, the last one possibly smaller,
        and a query sees the keys of its own window exactly. On a `grid`, the size on each axis or the number
        of tokens. 0 means no window, the only choice where N is not M.
    window_bias : array, shape (..., W, W), optional
        Bias in nats that is added to the logits within a window, by the places of query and key in it: a
        learned relative bias, for example.
    landmarks : tuple of arrays, shapes (..., C, D), optional
        The caller's ``(q_landmarks, k_landmarks)``, in the units of `q` and `k`, in place of the means of the
        groups.
    group_weight : {"size", "unit"}, default "size"
        "size": a group weighs ``exp(q . kt)`` times its number of keys, which is calibrated without training.
        "unit": a group weighs ``exp(q . kt)``, as the published models were trained.
    disjoint : bool, default True
        True leaves the keys of the query's window out of the groups. False counts them twice, as published.
    noise_scale : float, default 1.0
        Factor of the draws. The authors' code uses ``D ** -0.25``.
    rng : int, numpy.random.Generator, torch.Generator, cupy.random.Generator or JAX key, optional
        Source of the draws. One int gives the same draws on every library. Without `rng` and `noise` each
        frequency is the mean of its proposal: a deterministic form, for inference.
    noise : array, shape (..., C, D), optional
        The standard normal draws, in place of `rng`; the array broadcasts.
    query_mask : boolean array, shape (N,) or (..., N), optional
        False = padding: the output row is zero, whatever the query holds, no gradient passes through it, and
        no landmark includes it. Where N = M the default is `key_mask`, as in self-attention. Pass a mask of
        True for N queries of another sequence. Axes before N are those of `q`, each of its size or 1.
    grid : tuple of int, optional
        One, two or three sizes of the grid on which the tokens lie in row-major order. Requires N = M.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (M,) or (..., M), optional
        True = attend. Axes before M are those of `k`, each of its size or 1. Masked keys and values are never
        read, even where they hold NaN. A group of padding alone has no weight. Padding may move the borders
        of the groups and has no other effect.
    is_causal : bool, default False
        Query n sees the keys of its window up to n exactly, and the groups that end before its window begins.
        Requires N = M and a `group_size` that divides `window`; the default is `window`.
    return_state : bool, default False
        With ``is_causal=True``: also return the state after the last token, for `eva_step`.
    max_tokens : int, optional
        With ``is_causal=True``: number of tokens, by default N, for whose groups noise is drawn and, with
        ``return_state=True``, room is kept.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v` and the result: (..., H, N, D), or (..., N, H, D). Masks of tokens-first arrays
        may leave the axis of heads out. Other arguments are heads first.

    Returns
    -------
    array, shape (..., N, E), or a pair of it and an `EVAState` with ``return_state=True``
        The output, of the inputs' library, dtype and device; half precision is summed in float32. A query
        without keys gets zeros.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and one real floating dtype; a generator of another library.
    ValueError
        Shapes, devices, counts or options that do not fit; both `rng` and `noise`.
    NotImplementedError
        `window_bias` with ``return_state=True``.

    See Also
    --------
    adaptive_eva : The estimator for models that were trained with softmax attention.

    Notes
    -----
    The result is softmax attention over the keys E of the window and one key :math:`\tilde k_c` for each
    group :math:`P_c` ([1]_, section 4). This key is the mean of the group. Its value is the control variate
    :math:`\beta_c = f(w_c)`, the f of `rfa` over the keys of the group alone, at a draw
    :math:`w_c \sim N((\tilde q_c + \tilde k_c)/2, I)`. The result is exact where every group is one key, or
    where the window is the whole sequence. Time is O(N (C + W)); a causal call has C = N / group_size groups.

    Where a window cuts a group, the keys of the group outside the window are a group of their own, the rest
    of the group, for the queries of this window.

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
        raise NotImplementedError("window_bias: expected None with return_state=True: eva_step has no bias")
    if is_causal and not disjoint:
        raise ValueError("is_causal: expected disjoint=True")
    has_draws = rng is not None or noise is not None
    check_effect("rng or noise", is_met=has_draws, noise_scale=noise_scale != 1)
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask, "is_whole": not return_state}
    also = [*pooling_ranks(landmarks, noise), (window_bias, 2)]
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, layout=layout, also=also, **masks)
    check_causal(x, is_causal)
    blocks = eva_layout(
        x.q.shape[-2],
        x.k.shape[-2],
        grid=grid,
        window=window,
        num_groups=num_groups,
        group_size=group_size,
        is_causal=is_causal,
        like=(landmarks, noise),
    )
    check_effect("a window", is_met=blocks.window is not None, disjoint=not disjoint)
    pair_bias = bias_of_window(x, window_bias, blocks.window, is_causal=is_causal)
    count = groups_to_draw(max_tokens, x.q.shape[-2], blocks, is_causal=is_causal)

    split = _split(x, blocks, is_causal=is_causal, disjoint=disjoint)
    # kt_c, the mean key of each group, and log |P_c|; the groups are merged from the pieces that windows cut.
    (kt, log_size), of_keys = union(pool(x.k, split.atoms, x.key_mask), split.parts)
    if landmarks is None:
        qt, _ = pool(x.q, blocks_of_queries(x, blocks.groups), x.query_mask)
    else:
        qt, kt = given_landmarks(x, landmarks, blocks.groups.index.shape[0])
    # Equation: w_c ~ N((qt_c + kt_c)/2, I). The root of the scale goes to both means, not to the noise.
    w = x.root * (qt + kt) / 2
    lead = w.shape[:-2] if pair_bias is None else broadcast_shapes(w.shape[:-2], pair_bias.shape[:-3])
    eps = normal_draws(x, (count, w.shape[-1]), rng=rng, noise=noise, axes="C, D", lead=lead)
    if eps is not None:
        eps = noise_scale * eps
        # The draws of groups to come, up to `max_tokens`, go into the state.
        w = w + eps[..., : w.shape[-2], :]

    # Equation: beta_c = f(w_c) over P_c. The rests of groups that windows cut take the same frequency.
    (beta, _), of_values = union(_control_variates(x, w, split), split.parts)
    groups = Keys(kt, beta, _weight(log_size, group_weight))
    if blocks.window is None:
        return x.finish(final_average(x.q, groups, scale=x.scale))
    rests = []
    if split.rest is not None:
        given = kt if landmarks is not None else None
        rests = [_rests(of_values, of_keys, split.rest, given, group_weight)]
    out = x.finish(_by_windows(x, blocks, split, groups, rests, pair_bias, is_causal=is_causal))
    if not return_state:
        return out
    (window,), (size,) = blocks.window, blocks.sizes
    return out, state_after(x, window, size, groups, eps, count, by_size=group_weight == "size")


def eva_landmarks(x: Inputs, options: Mapping[str, Any], is_causal: bool) -> tuple[Array, Array]:
    """Return the mean queries and mean keys (..., C, D) of the groups."""
    given: dict[str, Any] = {name: options.get(name) for name in ("grid", "num_groups", "group_size")}
    window, n, m = options.get("window", 64), x.q.shape[-2], x.k.shape[-2]
    groups = eva_layout(n, m, window=window if n == m else 0, is_causal=is_causal, **given).groups
    (qt, _), (kt, _) = pool(x.q, blocks_of_queries(x, groups), x.query_mask), pool(x.k, groups, x.key_mask)
    return qt, kt


class _Split(NamedTuple):
    """The split of groups by windows, and over devices.

    Attributes
    ----------
    lanes : int
        The number of parts of the sequence that lie on devices of their own; 1 on one device.
    cut : Cuts or None
        The cut of the groups by the windows; None where groups keep all keys: without a window, in a causal
        call, or with ``disjoint=False``.
    rest : Cuts or None
        `cut` where a window cuts at least one group, or else None.
    parts : Pieces or None
        The pieces from which groups are merged; None where each group is one piece.
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
        # A window across more than two lanes needs tokens that no neighbour sends: all tokens in one lane.
        lanes = 1
    cut = None
    if tile is not None and disjoint and not is_causal:
        cut = cuts(layout.tokens, (layout.how, layout.sizes), tile, lanes)
    rest = cut if cut is not None and cut.is_cut.size else None
    parts = in_pieces(x.k, layout.groups) if rest is None else rest.pieces
    return _Split(lanes, cut, rest, parts, layout.groups if parts is None else parts.atoms)


def _control_variates(x: Inputs, w: Array, split: _Split) -> Average:
    """Return the averages ``f(w_c)`` over the keys of each atom alone, (..., A, E), and their log Z."""
    at = split.atoms
    if split.parts is not None and split.parts.levels:
        w = backend_of(w).take(w, split.parts.group_of_atom, axis=-2)
    # Equation: f(w), log Z(w) = attend(w, k, v, kappa). All atoms of a group have its w, so that `merge` of
    # their averages is f(w_c) over the group, and over its rest.
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
    """Attend from each window to its own keys exactly, and to the groups: (..., N, E)."""
    assert layout.window is not None
    at, own = windows(layout.tokens, layout.window, split.lanes), backend_of(x.q)
    near = Keys(gather(x.k, at), gather(x.v, at), gather_bias(x.k, x.key_mask, at))
    # A pair bias for causal windows has -inf at the keys to come already (`bias_of_window`).
    near = near._replace(pair_bias=pair_bias, is_causal=is_causal and pair_bias is None)
    assert groups.bias is not None
    kt, beta, log_weight = groups.k[..., None, :, :], groups.v[..., None, :, :], groups.bias[..., None, :]
    if split.cut is not None:
        # A group that has keys in the window would count them twice: only groups outside it weigh.
        outside = with_rank(own.along(split.cut.outside, x.q), x.q.ndim)
        log_weight = x.xp.where(outside, log_weight, -math.inf)
    if is_causal:
        # A group that ends within the window or after it holds keys to come.
        over = blocks_over(layout.tokens, (layout.how, layout.sizes), layout.window)
        log_weight = x.xp.where(with_rank(own.along(over, x.q), x.q.ndim), log_weight, -math.inf)
    # Equation: out = attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log |P_c|]), with the rests as more groups.
    out = final_average(gather(x.q, at), near, Keys(kt, beta, log_weight), *rests, scale=x.scale)
    return scatter(out, at, x.q)


def _rests(values: Parted, keys: Parted, cut: Cuts, given: Array | None, group_weight: str) -> Keys:
    """Return, for each window, the rests of the groups that it cuts, as groups of their own."""
    beta, _ = others(values, cut)
    kt, log_size = others(keys, cut)
    if given is not None:
        # The caller's landmark stands for the whole group, and so for its rest too.
        kt = backend_of(given).take(given, cut.group_of_cut, axis=-2)
        kt = namespace(kt).reshape(kt, (*kt.shape[:-2], *cut.group_of_cut.shape, kt.shape[-1]))
    return Keys(kt, beta, _weight(log_size, group_weight))


def _weight(log_size: Array, group_weight: str) -> Array:
    """Return the log weights of the groups: of their sizes, or 0; -inf for a group of padding alone."""
    if group_weight == "size":
        return log_size
    xp = namespace(log_size)
    return xp.where(log_size == -math.inf, log_size, xp.zeros_like(log_size))
