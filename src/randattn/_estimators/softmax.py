"""Exact softmax attention: ``attend(q, k, v, 0).out``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from randattn._backends.dispatch import undisturbed
from randattn._core.average import Keys
from randattn._core.inputs import check_causal, prepare

from .final_average import final_average

if TYPE_CHECKING:
    Array = Any


@undisturbed
def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Array:
    r"""Exact softmax attention, in blocks: the N x M logits are never whole in memory.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, real floating, heads first. Leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (..., M), optional
        True = attend. What lies under False is never read, whatever it holds.
    query_mask : boolean array, shape (..., N), optional
        False = padding: a row of zeros, whatever the query holds, and no gradient from or to it. By default
        `key_mask` where N = M, as in self-attention: pass all True where other queries are as many.
    is_causal : bool, default False
        Query n sees the keys up to n; N = M.
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
        Not arrays, or of different libraries or dtypes, or not of a real floating dtype.
    ValueError
        Shapes, devices or a scale that do not fit.

    Notes
    -----
    :math:`\mathrm{out}_n = \sum_m \mathrm{softmax}_m(s\, q_n \cdot k_m)\, v_m`, in O(N M D) time and
    O(N E) memory. Gradients on PyTorch and JAX make the logits again, block by block; where PyTorch
    compiles or transforms the call, those of every block are kept. A program of `torch.export` with
    symbolic sizes has as many blocks as its example needed, which grow with what it is called with.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    >>> softmax_attention(q, k, v).shape
    (2, 5, 4)
    """
    x = prepare(q, k, v, scale=scale, key_mask=key_mask, query_mask=query_mask, enable_gqa=enable_gqa)
    check_causal(x, is_causal)
    keys = Keys(x.k, x.v, x.key_bias, is_causal=is_causal)
    return x.finish(final_average(x.q, keys, scale=x.scale))
