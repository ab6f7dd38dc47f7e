"""Exact softmax attention: ``attend(q, k, v, 0).out``."""

from __future__ import annotations

from typing import Any

from randattn._backends.dispatch import undisturbed
from randattn._core.average import Keys
from randattn._core.inputs import Inputs, check_last, prepare
from randattn._core.library import Array

from .final_average import final_average


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
    layout: str = "heads_first",
) -> Array:
    r"""Compute exact softmax attention in blocks, without all N x M logits in memory.

    Parameters
    ----------
    q : array, shape (..., N, D)
        Queries, of a real floating dtype, heads first. The leading axes of all arrays broadcast.
    k : array, shape (..., M, D)
        Keys.
    v : array, shape (..., M, E)
        Values.
    scale : float, optional
        Factor of the logits, by default ``D ** -0.5``.
    key_mask : boolean array, shape (M,) or (..., M), optional
        True = attend. Axes before M are those of `k`, each of its size or 1. Masked keys and values are never
        read, even where they hold NaN.
    query_mask : boolean array, shape (N,) or (..., N), optional
        False = padding: the output row is zero, whatever the query holds, and no gradient passes through it.
        Where N = M the default is `key_mask`, as in self-attention. Pass a mask of True for N queries of
        another sequence. Axes before N are those of `q`, each of its size or 1.
    is_causal : bool, default False
        Query n of the N sees the keys up to M - N + n: the queries are the last N of M tokens. Requires N <=
        M.
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
        Inputs that are not arrays of one library and one real floating dtype.
    ValueError
        Shapes, devices or a scale that do not fit.

    Notes
    -----
    With the scale s, :math:`\mathrm{out}_n = \sum_m \mathrm{softmax}_m(s\, q_n \cdot k_m)\, v_m`. Time is O(N
    M D) and memory O(N E). Gradients on PyTorch and JAX recompute the logits block by block; where PyTorch
    compiles or transforms the call, the logits of every block are kept. A program of `torch.export` with
    symbolic sizes keeps the number of blocks of its example: larger inputs make larger blocks.

    Examples
    --------
    >>> import numpy as np
    >>> from randattn import softmax_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    >>> softmax_attention(q, k, v).shape
    (2, 5, 4)
    """
    masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
    x = prepare(q, k, v, scale=scale, enable_gqa=enable_gqa, layout=layout, **masks)
    check_last(x, is_causal)
    return x.finish(exact_attention(x, is_causal=is_causal))


def exact_attention(x: Inputs, *, is_causal: bool) -> Array:
    """Return exact attention of prepared inputs (..., N, E); causal queries are the last of the tokens."""
    keys = Keys(x.k, x.v, x.key_bias)
    sets = keys.for_last(x.q.shape[-2]) if is_causal else (keys,)
    return final_average(x.q, *sets, scale=x.scale)
