"""Random-feature attention: ``attend(q, W, f(W), log Z(W)).out`` with ``W ~ N(0, I)``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._attend import Keys, finite
from ._draws import no_draws, normal_draws
from ._fused import attend, full_precision
from ._inputs import check_option, dot, namespace, prepare, refuse_causal, resolve_count

if TYPE_CHECKING:
    from ._inputs import Inputs

    Array = Any


@full_precision
def rfa(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    num_samples: int | None = None,
    features: str = "positive",
    draws: str = "iid",
    rng: Any = None,
    noise: Array | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    r"""Random-feature attention (RFA, Performer): linear time, consistent.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, real floating, heads first. Leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    num_samples : int, optional
        Frequencies S, by default 64, or as many as `noise` has.
    features : {"positive", "trigonometric"}, default "positive"
        "positive": ``exp(w.x - |x|^2/2)`` (FAVOR+), an average of the values. "trigonometric":
        cosines and sines, whose signs can take the estimate out of the range of the values, to
        which it is cut.
    draws : {"iid", "orthogonal"}, default "iid"
        "orthogonal": the frequencies of each D are orthogonal, each still standard normal.
    rng : int, numpy.random.Generator, torch.Generator, cupy.random.Generator or JAX key, optional
        Where the draws come from. One int gives the same draws on every library. One of `rng` and
        `noise` is needed.
    noise : array, shape (..., S, D), optional
        The frequencies themselves, standard normal; leading axes broadcast.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (..., M), optional
        True = attend. What lies under False is never read, whatever it holds; any amount of it
        leaves the other outputs unchanged to rounding.
    is_causal : bool, default False
        Not there yet.
    enable_gqa : bool, default False
        Let `q` have a multiple of the heads (axis -3) of `k` and `v`.

    Returns
    -------
    array, shape (..., N, E)
        Of the inputs' library, dtype and device; half precision is summed in float32. A query with
        no key left gets zeros.

    Raises
    ------
    TypeError
        Not arrays, or of different libraries or dtypes, or not floating; a generator of another library.
    ValueError
        Shapes, devices, counts or options that do not fit; both or neither of `rng` and `noise`.
    NotImplementedError
        ``is_causal=True``.

    Notes
    -----
    With :math:`\xi(x, w) = \exp(w \cdot x - |x|^2/2)` and :math:`w_s \sim N(0, I)`,

    .. math::

        f(w) = \frac{\sum_m \xi(k_m, w)\, v_m}{Z(w)}, \quad Z(w) = \sum_m \xi(k_m, w), \qquad
        \mathrm{out}_n = \frac{\sum_s \xi(q_n, w_s) Z(w_s) f(w_s)}{\sum_s \xi(q_n, w_s) Z(w_s)},

    the self-normalized importance sampler of [1]_ with the proposal N(0, I), in O(S (N + M)) time.
    Computed in log space: no additive epsilon, no maximum over the sequence, no overflow. Its variance
    grows as :math:`\exp(|q + k|^2)`: on inputs of a trained model it is often worse than the mean of
    the values.

    References
    ----------
    .. [1] L. Zheng, C. Wang, L. Kong, "Linear Complexity Randomized Self-attention Mechanism",
       ICML 2022, arXiv 2204.04667.
    .. [2] K. Choromanski et al., "Rethinking Attention with Performers", arXiv 2009.14794: the
       positive features, orthogonal draws.
    .. [3] H. Peng et al., "Random Feature Attention", arXiv 2103.02143: the trigonometric features.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import rfa, softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    >>> estimate = rfa(q, k, v, num_samples=4096, draws="orthogonal", rng=0)
    >>> bool(np.max(np.abs(estimate - softmax_attention(q, k, v))) < 0.2)
    True
    """
    check_option("features", features, ("positive", "trigonometric"))
    check_option("draws", draws, ("iid", "orthogonal"))
    refuse_causal("rfa", is_causal)
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, enable_gqa=enable_gqa, also=[(noise, 2)])
    count = resolve_count("num_samples", num_samples, 64, noise=(noise, -2))
    w = normal_draws(
        x, (count, x.q.shape[-1]), rng=rng, noise=noise, axes="S, D", orthogonal=draws == "orthogonal"
    )
    if w is None:
        raise no_draws("rfa")
    if features == "trigonometric":
        return x.finish(_trigonometric(x, w))
    f, log_z = attend(w, Keys(x.k, x.v, x.key_bias, x.scale), scale=x.root)
    out, _ = attend(x.q, Keys(w, f, log_z), scale=x.root)
    return x.finish(out)


def _trigonometric(x: Inputs, w: Array) -> Array:
    """Peng et al. (2021), equation 5: ``exp(q.k)`` as ``exp((|q|^2 + |k|^2)/2) E cos(w.(q - k))``.

    The features have signs, so that this is no average and can leave the range of V, where the
    estimate (never the truth) is cut to it.
    """
    xp = x.xp
    log_weight = 0.5 * x.scale * dot(x.k, x.k)[..., None]
    lowest, highest = x.v, x.v
    if x.key_mask is not None:
        attended = x.key_mask[..., None]
        log_weight = xp.where(attended, log_weight, -math.inf)
        lowest, highest = xp.where(attended, x.v, math.inf), xp.where(attended, x.v, -math.inf)
    weight = xp.exp(log_weight - finite(xp.max(log_weight, axis=-2, keepdims=True)))
    total = xp.sum(weight, axis=-2, keepdims=True)

    w = x.root * w
    phi_q, phi_k = _waves(x.q, w), _waves(x.k, w) * weight
    values = xp.matmul(phi_q, xp.matmul(xp.matrix_transpose(phi_k), x.v))
    norm = xp.matmul(phi_q, xp.matrix_transpose(xp.sum(phi_k, axis=-2, keepdims=True)))
    # Below this the normalizer is rounding alone; with no key at all any divisor gives the zero.
    smallest = xp.where(total == 0, 1.0, w.shape[-2] * xp.finfo(norm.dtype).eps * total)
    out = values / xp.where(xp.abs(norm) < smallest, smallest, norm)
    lowest = xp.where(total == 0, 0.0, xp.min(lowest, axis=-2, keepdims=True))
    highest = xp.where(total == 0, 0.0, xp.max(highest, axis=-2, keepdims=True))
    return xp.minimum(xp.maximum(out, lowest), highest)


def _waves(x: Array, w: Array) -> Array:
    xp = namespace(x)
    angle = xp.matmul(x, xp.matrix_transpose(w))
    return xp.concat([xp.cos(angle), xp.sin(angle)], axis=-1)
