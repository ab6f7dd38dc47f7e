"""EVA: a window of keys exactly, each group of the others by one control variate.

``attend(q, [k_E ; kt_c], [v_E ; beta_c], [0 ; log-size_c]).out``, as a `merge` of the two parts.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from ._attend import Average, attend, average, merge
from ._draws import normal_draws
from ._inputs import (
    check_count,
    check_option,
    check_real,
    log_mask,
    namespace,
    placement,
    prepare,
    refuse_causal,
    resolve_count,
    with_rank,
)
from ._segments import (
    blocks,
    blocks_of_queries,
    check_grid,
    check_sizes,
    cuts,
    gather,
    gather_bias,
    given_landmarks,
    pool,
    resolve_query_mask,
    scatter,
    take,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._inputs import Inputs
    from ._segments import Blocks, Cuts, How, Sizes

    Array = Any


def eva(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_groups: int | tuple[int, ...] | None = None,
    group_size: int | tuple[int, ...] | None = None,
    window: int | tuple[int, ...] = 64,
    landmarks: tuple[Array, Array] | None = None,
    group_weight: str = "size",
    disjoint: bool = True,
    noise_scale: float = 1.0,
    rng: Any = None,
    noise: Array | None = None,
    query_mask: Array | None = None,
    grid: tuple[int, ...] | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    check_option("group_weight", group_weight, ("size", "unit"))
    noise_scale = check_real("noise_scale", noise_scale)
    refuse_causal("eva", is_causal)
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, enable_gqa=enable_gqa)
    tokens = check_grid(grid, x.q.shape[-2], x.k.shape[-2])
    tile = _check_window(x, window, tokens)
    how, sizes = _check_groups(tokens, num_groups, group_size, landmarks, noise)
    groups = blocks(tokens, how, sizes)

    kt, log_size = pool(x.k, groups, x.key_mask)
    if landmarks is None:
        queries = blocks_of_queries(x, groups, tokens, how, sizes)
        qt, _ = pool(x.q, queries, resolve_query_mask(x, query_mask))
    else:
        qt, kt = given_landmarks(x, landmarks, groups.index.shape[0])
    eps = normal_draws(x, tuple(kt.shape[-2:]), rng=rng, noise=noise, axes="C, D")
    w = (qt + kt) / 2
    if eps is not None:
        w = w + noise_scale * eps

    if tile is None or not disjoint:
        beta, _ = _control_variates(x, w, groups)
        far = attend(x.q, kt, beta, _weight(log_size, group_weight))
        rest = None
    else:
        # What a window cuts off a group is in the window; the rest is a group of its own.
        cut = cuts(tokens, (how, sizes), tile)
        atoms = _control_variates(x, take(w, cut.group_of_atom, axis=-2), cut.atoms)
        beta, _ = _union(atoms, cut.members, cut.is_member)
        log_weight = _weight(log_size, group_weight)
        far = attend(x.q, kt, beta, log_weight, pair_bias=_outside_window(x, cut))
        rest = _rests(x, atoms, cut, kt if landmarks is not None else None, group_weight)
    if tile is None:
        return x.finish(far.out)
    return x.finish(merge(_windows(x, blocks(tokens, "tiles", tile), rest), far).out)


def _control_variates(x: Inputs, w: Array, at: Blocks) -> Average:
    """``beta_c = f(w_c)`` over the keys of each block alone: (..., B, E), and log Z."""
    beta, log_z = attend(
        w[..., None, :],
        gather(x.k, at),
        gather(x.v, at),
        gather(x.kappa[..., None], at)[..., 0] + gather_bias(x.k, None, at),
    )
    return Average(beta[..., 0, :], log_z[..., 0])


def _union(parts: Average, index: Any, valid: Any) -> Average:
    """The averages over unions of disjoint parts, listed by number (..., parts)."""
    xp = namespace(parts.out)
    log_norm = take(parts.log_norm, index, axis=-1)
    log_norm = xp.reshape(log_norm, (*log_norm.shape[:-1], *index.shape))
    log_norm = xp.where(xp.asarray(valid, device=placement(log_norm)), log_norm, -math.inf)
    out = take(parts.out, index, axis=-2)
    out = xp.reshape(out, (*out.shape[:-2], *index.shape, out.shape[-1]))
    out, log_norm = average(log_norm[..., None, :], out)
    return Average(out[..., 0, :], log_norm[..., 0])


def _rests(
    x: Inputs, atoms: Average, cut: Cuts, given: Array | None, group_weight: str
) -> tuple[Array, Array, Array] | None:
    """For each window the keys, values and log weights of what it leaves of the groups that it cuts."""
    if not cut.rest.size:
        return None
    beta, _ = _union(atoms, cut.rest, cut.is_rest)
    kt, log_size = _union(pool(x.k, cut.atoms, x.key_mask), cut.rest, cut.is_rest)
    if given is not None:
        kt = take(given, cut.rest_group, axis=-2)
        kt = x.xp.reshape(kt, (*kt.shape[:-2], *cut.rest_group.shape, kt.shape[-1]))
    return kt, beta, _weight(log_size, group_weight)


def _windows(x: Inputs, at: Blocks, rest: tuple[Array, Array, Array] | None) -> Average:
    """Each query's own window, exactly, and the rest of the groups that it cuts."""
    q = gather(x.q, at)
    near = attend(q, gather(x.k, at), gather(x.v, at), gather_bias(x.k, x.key_mask, at))
    if rest is not None:
        near = merge(near, attend(q, *rest))
    return Average(scatter(near.out, at), scatter(near.log_norm[..., None], at)[..., 0])


def _outside_window(x: Inputs, cut: Cuts) -> Callable[[slice], Array]:
    """For a slice of the queries, 0 for the groups that their window leaves whole and -inf for others."""
    xp = x.xp
    outside = log_mask(xp.asarray(cut.outside, device=x.device), x.q)
    window_of_token = xp.asarray(cut.window_of_token, device=x.device)
    return lambda rows: with_rank(xp.take(outside, window_of_token[rows], axis=0), x.q.ndim)


def _weight(log_size: Array, group_weight: str) -> Array:
    """The groups' log weights; a group of padding alone has none in any case."""
    if group_weight == "size":
        return log_size
    xp = namespace(log_size)
    return xp.where(log_size == -math.inf, log_size, xp.zeros_like(log_size))


def _check_window(x: Inputs, window: int | Sizes, tokens: Sizes) -> Sizes | None:
    if isinstance(window, numbers.Integral) and check_count("window", window, minimum=0) == 0:
        return None
    n, m = x.q.shape[-2], x.k.shape[-2]
    if n != m:
        raise ValueError(
            f"window: expected 0 where there are not as many queries ({n}) as keys ({m}), got {window}"
        )
    return check_sizes("window", window, tokens)


def _check_groups(
    tokens: Sizes,
    num_groups: int | Sizes | None,
    group_size: int | Sizes | None,
    landmarks: tuple[Array, Array] | None,
    noise: Array | None,
) -> tuple[How, Sizes]:
    """How the keys are laid in groups: so many, or of that size."""
    if group_size is not None:
        if num_groups is not None:
            raise ValueError("group_size: expected either num_groups or group_size, got both")
        return "tiles", check_sizes("group_size", group_size, tokens)
    given = landmarks[-1] if isinstance(landmarks, tuple | list) and landmarks else None
    count = resolve_count("num_groups", num_groups, 64, landmarks=(given, -2), noise=(noise, -2))
    return "segments", check_sizes("num_groups", count, tokens)
