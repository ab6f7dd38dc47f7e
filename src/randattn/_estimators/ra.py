"""Randomized attention: the mean over s of ``f(w_ns)``, unbiased at quadratic cost."""

from __future__ import annotations

import math
from typing import Any

from randattn._backends.dispatch import attend, backend_of, undisturbed
from randattn._core.average import Keys, finite, rows_of_block
from randattn._core.checks import check_broadcast, resolve_count
from randattn._core.draws import no_draws, normal_draws, uniform_draws
from randattn._core.inputs import Inputs, prepare, refuse_causal, with_rank
from randattn._core.library import Array, namespace


@undisturbed
def ra(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_samples: int | None = None,
    rng: Any = None,
    noise: Array | None = None,
    components: Array | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    layout: str = "heads_first",
) -> Array:
    r"""Attend by randomized attention (RA), without bias, at quadratic cost.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. The leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_samples : int, optional
        Number S of frequencies for each query, by default 1, or as many as `noise` has.
    rng : int, numpy.random.Generator, torch.Generator, cupy.random.Generator or JAX key, optional
        Source of the draws. One int gives the same draws on every library. Either `rng` or `noise` is
        required.
    noise : array, shape (..., S, N, D), optional
        The standard normal draws, together with `components` in place of `rng`; the array broadcasts.
    components : array, shape (..., S, N), optional
        Uniform draws in [0, 1), together with `noise`. Each chooses the key m' of a proposal by inversion of
        the distribution function of the softmax.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (M,) or (..., M), optional
        True = attend. Axes before M are those of `k`, each of its size or 1. Masked keys and values are never
        read, even where they hold NaN. Padding leaves the other outputs unchanged up to rounding.
    query_mask : boolean array, shape (N,) or (..., N), optional
        False = padding: the output row is zero, whatever the query holds, and no gradient passes through it.
        Where N = M the default is `key_mask`, as in self-attention. Pass a mask of True for N queries of
        another sequence. Axes before N are those of `q`, each of its size or 1.
    is_causal : bool, default False
        Not supported: each draw comes from a softmax over all keys.
    enable_gqa : bool, default False
        Allow `q` a multiple of the heads (axis -3) of `k` and `v`.
    layout : {"heads_first", "tokens_first"}, default "heads_first"
        Axes of `q`, `k`, `v` and the result: (..., H, N, D), or (..., N, H, D). Masks of tokens-first arrays
        may leave the axis of heads out. Other arguments are heads first.

    Returns
    -------
    array, shape (..., N, E)
        The output, of the inputs' library, dtype and device; half precision is summed in float32. A query
        without keys gets zeros.

    Raises
    ------
    TypeError
        Inputs that are not arrays of one library and one real floating dtype; a generator of another library.
    ValueError
        Shapes, devices, counts or options that do not fit; both or neither of `rng` and `noise`.
    NotImplementedError
        ``is_causal=True``.

    Notes
    -----
    .. math::

        \mathrm{out}_n = \frac1S \sum_s f(w_{ns}), \qquad w_{ns} = q_n + k_{m'} + \epsilon, \quad
        m' \sim \mathrm{softmax}(q_n \cdot k), \quad \epsilon \sim N(0, I),

    with f as in `rfa`: softmax attention is the expectation of f under this mixture ([1]_, section 3). Time
    is O(S N M). Memory is O(S N D), for the draws, and that of a block of queries. Gradients take the choice
    of the keys m' as constant.

    References
    ----------
    .. [1] L. Zheng, C. Wang, L. Kong, "Linear Complexity Randomized Self-attention Mechanism",
       ICML 2022, arXiv 2204.04667.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import ra, softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    >>> estimate = ra(q, k, v, num_samples=4096, rng=0)
    >>> bool(np.max(np.abs(estimate - softmax_attention(q, k, v))) < 0.1)
    True
    """
    refuse_causal("ra", is_causal)
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
    also = [(noise, 3), (components, 2)]
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, layout=layout, also=also, **masks)
    count = resolve_count("num_samples", num_samples, 1, noise=(noise, -3), components=(components, -2))
    n, d = x.q.shape[-2:]
    if (noise is None) != (components is None):
        raise ValueError("components: expected noise and components together, or rng instead of both")
    eps = normal_draws(x, (count, n, d), rng=rng, noise=noise, axes="S, N, D")
    if eps is None:
        raise no_draws("ra")
    u = uniform_draws(x, (count, n), rng=rng, components=components, axes="S, N")
    check_broadcast(noise=(eps, 3), components=(u, 2))

    xp = x.xp
    # The frequencies of a query are queries to the same keys: samples are an axis before that of tokens.
    bias = None if x.key_bias is None else x.key_bias[..., None, :]
    keys = Keys(x.k[..., None, :, :], x.v[..., None, :, :], bias, x.scale).biased()

    def mean(q: Array, u: Array, eps: Array) -> Array:
        # Equation: w_ns = q_n + k_m' + eps, then out_n = mean over s of f(w_ns).
        w = x.root * (q[..., None, :, :] + _sample_keys(x, q, u)) + eps
        f, _ = attend(w, keys, scale=x.root)
        return xp.mean(f, axis=-3)

    # A block of queries at a time: all S N frequencies would have S times the logits of exact attention.
    rows = rows_of_block(math.prod(x.lead) * count * x.k.shape[-2])
    eps = xp.broadcast_to(eps, (*eps.shape[:-2], n, d))
    u = xp.broadcast_to(u, (*u.shape[:-1], n))
    return x.finish(backend_of(x.q).by_rows(mean, rows, (x.q, -2), (u, -1), (eps, -2)))


def _sample_keys(x: Inputs, q: Array, u: Array) -> Array:
    """Return the keys (..., S, N, D) at which the summed softmax of a query passes each of its uniforms."""
    xp = x.xp
    logits = xp.matmul(x.scale * q, xp.matrix_transpose(x.k))
    if x.key_mask is not None:
        logits = xp.where(x.key_mask[..., None, :], logits, -math.inf)
    mass = xp.exp(logits - finite(xp.max(logits, axis=-1, keepdims=True)))
    passed = backend_of(mass).cumulative_sum(mass, -1)[..., None, :, :]
    total = passed[..., -1:]
    # Equation: m' is the number of keys whose running sum is at most u times the total. Rounding can make
    # that product the total: the second count ends the range before keys without mass at the end.
    first = xp.minimum(_count(passed <= u[..., None] * total), _count(passed < total))
    index = xp.arange(x.k.shape[-2], dtype=first.dtype, device=x.device)
    # A product takes the keys: Dask has no take along an axis, and its gradient needs no scatter.
    one_hot = xp.astype(first[..., None] == with_rank(index, first.ndim + 1), q.dtype)
    return xp.matmul(one_hot, x.k[..., None, :, :])


def _count(found: Array) -> Array:
    xp = namespace(found)
    return xp.sum(xp.astype(found, xp.int32), axis=-1, dtype=xp.int32)
