"""EVA: a window of keys exactly, each group of the others by one control variate.

``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log-size_c]).out``, over the union of the two sets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import Average, Keys
from ._checks import broadcast_shapes, check_flags, check_option, check_real
from ._conclude import conclude
from ._draws import normal_draws
from ._eva_choice import (
    causal_sizes,
    check_exact,
    check_groups,
    check_max_tokens,
    check_unused,
    check_window,
    check_window_bias,
    choose,
)
from ._eva_exact import corrected
from ._eva_step import state_after
from ._fused import attend, lanes_of, take, undisturbed
from ._inputs import check_causal, prepare, with_rank
from ._plans import blocks, blocks_over, cuts, fits_lanes, windows
from ._segments import (
    along,
    blocks_of_queries,
    check_grid,
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
from ._tracing import namespace

if TYPE_CHECKING:
    from ._inputs import Inputs
    from ._plans import Blocks, Cuts, How, Sizes
    from ._segments import Parted

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
    groups: Any = "segments",
    exact: str | tuple[str, ...] = "window",
    window: int | tuple[int, ...] = 64,
    window_bias: Array | None = None,
    num_exact: float = 8,
    num_blocks: int | None = None,
    second_order: bool = False,
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
    r"""EVA: a window of keys exactly, every group of other keys by one control variate.

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
    groups : {"segments", "tree"} or array of int, shape (..., M), default "segments"
        What a group is: consecutive keys; keys that are near each other where these queries are
        concerned, found by halving them along their main directions, `num_groups` rounded down to a
        power of two; or the caller's labels in ``range(num_groups)``.
    exact : {"window", "top"} or a tuple of both, default "window"
        What is computed exactly: a query's window; the keys of which its groups would be most wrong, chosen
        for blocks of queries together.
    window : int or tuple of int, default 64
        Tokens of the window of keys that a query sees exactly: blocks of so many tokens, the last one
        smaller where it does not divide. Of a `grid`, the block's size on each axis, or its number of
        tokens. 0: none, and the only choice where N is not M.
    window_bias : array, shape (..., W, W), optional
        Added to the logits of each query and key of a window, by their places in it: a learned relative
        bias, in nats.
    num_exact : float, default 8
        With ``exact="top"``: how many groups' worth of keys, so many times ``M / num_groups``.
    num_blocks : int, optional
        With ``exact="top"``: in how many blocks of queries near each other, rounded down to a power of
        two, or runs of windows, keys are chosen; by default N / 8, of more than 2,048 queries N / 128,
        and at most 64. More are more accurate and slower.
    second_order : bool, default False
        Weigh a group by the variances of its keys too: right for Gaussian keys. Where there are exact
        keys it has made trained models' inputs worse more often than better.
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

    Notes
    -----
    Softmax attention over the keys E of the window and one key :math:`\tilde k_c` for each group
    :math:`P_c`, its mean, with the value :math:`\beta_c = f(w_c)`, the f of `rfa` over the group's keys
    alone, at :math:`w_c \sim N((\tilde q_c + \tilde k_c)/2, I)` ([1]_, section 4). Exact where every
    group is one key, or the window is the whole sequence. In O(N (C + W)) time; causal, the groups are as
    many as the sequence is long, N / group_size.

    Where a window cuts a group, the part outside the window is a group of its own for its queries.

    With other groups, chosen keys or `second_order`, a group's control variate is the tangent to the
    logarithm of its keys' weight at the mean query, and draws, landmarks, unit weights and causal calls
    are errors; groups and keys are chosen without gradients. Errors on trained models' inputs, and the
    mathematics: docs/accurate.md.

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
    noise_scale = check_real("noise_scale", noise_scale)
    check_flags(disjoint=disjoint, return_state=return_state, second_order=second_order)
    if return_state and (not is_causal or landmarks is not None or query_mask is not None):
        raise ValueError("return_state: expected is_causal=True, and neither landmarks nor query_mask")
    if return_state and window_bias is not None:
        raise NotImplementedError("window_bias: eva_step has none, so that return_state=True has not either")
    also = [*pooling_ranks(landmarks, noise), (groups, 1), (window_bias, 2)]
    x = prepare(
        q,
        k,
        v,
        scale=scale,
        key_mask=key_mask,
        query_mask=query_mask,
        enable_gqa=enable_gqa,
        also=also,
    )
    tokens = check_grid(grid, x.q.shape[-2], x.k.shape[-2])
    check_causal(x, is_causal)
    exactly = check_exact(exact)
    by_segments = isinstance(groups, str) and groups == "segments"
    if not by_segments or "top" in exactly or second_order:
        published = {
            "rng": rng is not None,
            "noise": noise is not None,
            "landmarks": landmarks is not None,
            "group_weight": group_weight != "size",
            "disjoint": not disjoint,
            "is_causal": is_causal,
            "window_bias": window_bias is not None,
            "max_tokens": max_tokens is not None,
        }
        check_unused(published)
        if group_size is not None and not by_segments:
            raise ValueError("group_size: expected num_groups with groups other than 'segments'")
        at, count = groups, num_groups
        if by_segments:
            at = blocks(tokens, *check_groups(tokens, num_groups, group_size, None, None))
            count = at.index.shape[0]
        shape = check_window(x, window, tokens) if "window" in exactly else None
        choice = choose(
            x,
            at,
            count,
            None if shape is None else blocks(tokens, "tiles", shape),
            num_exact if "top" in exactly else 0,
            num_blocks,
            second_order=second_order,
        )
        return x.finish(corrected(x, choice))
    tile: Sizes | None
    if is_causal:
        how: How = "tiles"
        tile, sizes = causal_sizes(tokens, window, num_groups, group_size, grid, disjoint)
    else:
        tile = check_window(x, window, tokens)
        how, sizes = check_groups(tokens, num_groups, group_size, landmarks, noise)
    pair_bias = check_window_bias(x, window_bias, tile, is_causal=is_causal)
    groups = blocks(tokens, how, sizes)
    count = check_max_tokens(max_tokens, is_causal, x.q.shape[-2], sizes, groups)

    # What a window cuts off a group is in the window; the rest is a group of its own.
    lanes = 1 if is_causal else _lanes(x, tokens, tile)
    cut = cuts(tokens, (how, sizes), tile, lanes) if tile is not None and disjoint and not is_causal else None
    rest = cut if cut is not None and cut.is_cut.size else None
    parts = in_pieces(x.k, groups) if rest is None else rest.pieces
    atoms = groups if parts is None else parts.atoms
    pooled = pool(x.k, atoms, x.key_mask)
    (kt, log_size), of_keys = union(pooled, parts)
    if landmarks is None:
        queries = blocks_of_queries(x, groups)
        qt, _ = pool(x.q, queries, x.query_mask)
    else:
        qt, kt = given_landmarks(x, landmarks, groups.index.shape[0])
    w = x.root * (qt + kt) / 2
    lead = w.shape[:-2] if pair_bias is None else broadcast_shapes(w.shape[:-2], pair_bias.shape[:-3])
    eps = normal_draws(x, (count, w.shape[-1]), rng=rng, noise=noise, axes="C, D", lead=lead)
    if eps is not None:
        eps = noise_scale * eps
        w = w + eps[..., : w.shape[-2], :]

    log_weight = _weight(log_size, group_weight)
    centre = w if parts is None or not parts.levels else take(w, parts.group_of_atom, axis=-2)
    values = _control_variates(x, centre, atoms)
    (beta, _), of_values = union(values, parts)
    if tile is None:
        return x.finish(conclude(x.q, Keys(kt, beta, log_weight), scale=x.scale))

    at = windows(tokens, tile, lanes)
    near = Keys(gather(x.k, at), gather(x.v, at), gather_bias(x.k, x.key_mask, at))
    log_weights, rests = log_weight, []
    log_weight = log_weight[..., None, :]
    if cut is not None:
        outside = with_rank(along(cut.outside, x.q), x.q.ndim)
        log_weight = x.xp.where(outside, log_weight, -math.inf)
    if is_causal:
        before = with_rank(along(blocks_over(tokens, (how, sizes), tile), x.q), x.q.ndim)
        log_weight = x.xp.where(before, log_weight, -math.inf)
    if rest is not None:
        given = kt if landmarks is not None else None
        rests = [_rests(of_values, of_keys, rest, given, group_weight)]
    far = Keys(kt[..., None, :, :], beta[..., None, :, :], log_weight)
    if pair_bias is None:
        out = conclude(gather(x.q, at), near, far, *rests, scale=x.scale, is_causal=is_causal)
    else:
        out = conclude(gather(x.q, at), far, *rests, near, scale=x.scale, pair_bias=pair_bias)
    out = x.finish(scatter(out, at, x.q))
    if not return_state:
        return out
    assert tile is not None
    own = Keys(kt, beta, log_weights)
    return out, state_after(x, tile[0], sizes[0], own, eps, count, group_weight == "size")


def _control_variates(x: Inputs, w: Array, at: Blocks) -> Average:
    """``beta_c = f(w_c)`` over the keys of each block alone: (..., B, E), and log Z."""
    keys = Keys(gather(x.k, at), gather(x.v, at), gather_bias(x.k, x.key_mask, at), x.scale)
    beta, log_z = attend(w[..., None, :], keys, scale=x.root)
    return Average(beta[..., 0, :], log_z[..., 0])


def _rests(values: Parted, keys: Parted, cut: Cuts, given: Array | None, group_weight: str) -> Keys:
    """For each window the keys, values and log weights of what it leaves of the groups that it cuts."""
    beta, _ = others(values, cut)
    kt, log_size = others(keys, cut)
    if given is not None:
        kt = take(given, cut.group_of_cut, axis=-2)
        kt = namespace(kt).reshape(kt, (*kt.shape[:-2], *cut.group_of_cut.shape, kt.shape[-1]))
    return Keys(kt, beta, _weight(log_size, group_weight))


def _weight(log_size: Array, group_weight: str) -> Array:
    """The groups' log weights; a group of padding alone has none in any case."""
    if group_weight == "size":
        return log_size
    xp = namespace(log_size)
    return xp.where(log_size == -math.inf, log_size, xp.zeros_like(log_size))


def _lanes(x: Inputs, tokens: Sizes, tile: Sizes | None) -> int:
    """In how many lanes the tokens lie over devices; 1 where a window is longer than one."""
    lanes = lanes_of(x.k)
    return lanes if lanes == 1 or tile is None or fits_lanes(tokens, tile, lanes) else 1
