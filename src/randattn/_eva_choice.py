"""What EVA groups and what it computes exactly: the caller's options, checked."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

from ._attend import past
from ._checks import check_broadcast, check_count, check_like, check_option, check_real, resolve_count
from ._fused import known
from ._plans import Blocks
from ._segments import check_sizes
from ._shown import shown

if TYPE_CHECKING:
    from ._inputs import Inputs
    from ._plans import How, Sizes

    Array = Any

# Coordinates that keys are chosen by: a third of the features, and not fewer than these.
_LEAST_RANK = 8
# So many blocks of queries choose from one list.
FAMILY = 4
# Tokens below which exact attention is the faster one, whatever the blocks.
_SHORT = 2048


class Choice(NamedTuple):
    """What is grouped and what is exact.

    Attributes
    ----------
    groups : Blocks, array of int (..., M), or None
        Given ones; labels; or by a tree.
    num_groups : int
        Groups C, of the tree and of labels.
    windows : Blocks or None
        Of queries whose own keys are exact.
    num_keys : int
        Keys that a block of queries has exactly for what they weigh; 0 for none.
    num_blocks : int
        Blocks of queries that choose.
    second_order : bool
        Weigh groups by their keys' variances too.
    """

    groups: Any
    num_groups: int
    windows: Blocks | None
    num_keys: int
    num_blocks: int
    second_order: bool


def check_exact(exact: Any) -> tuple[str, ...]:
    """What is exact, in a tuple."""
    names = tuple(exact) if isinstance(exact, tuple | list) and exact else (exact,)
    for name in names:
        check_option("exact", name, ("window", "top"))
    return names


def check_unused(options: dict[str, bool]) -> None:
    """What EVA as published has alone."""
    for name, is_given in options.items():
        if is_given:
            raise ValueError(
                f"{name}: expected groups='segments', exact='window', second_order=False with it"
            )


def choose(
    x: Inputs,
    groups: Any,
    num_groups: Any,
    windows: Blocks | None,
    num_exact: Any,
    num_blocks: Any,
    *,
    second_order: bool,
) -> Choice:
    """What the caller asks for, checked."""
    n, m = x.q.shape[-2], x.k.shape[-2]
    count = 64 if num_groups is None else check_count("num_groups", num_groups)
    if isinstance(groups, str):
        check_option("groups", groups, ("segments", "tree"))
        groups, count = None, 2 ** depth_of(count, m)
    elif not isinstance(groups, Blocks):
        groups = _check_labels(x, groups, count, m)
    keys = keys_of(check_real("num_exact", num_exact), m, count)
    blocks = default_blocks(n) if num_blocks is None else check_count("num_blocks", num_blocks)
    if not keys and windows is None:
        raise ValueError("num_exact: expected more than 0 where there is no window")
    return Choice(groups, count, windows, keys, blocks, second_order)


def _check_labels(x: Inputs, labels: Any, count: int, m: int) -> Array:
    check_like("groups", labels, x.q)
    if not x.xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"groups: expected 'segments', 'tree' or integers, got dtype {labels.dtype}")
    if labels.ndim < 1 or labels.shape[-1] != m:
        raise ValueError(f"groups: expected shape (..., {m}), got {tuple(labels.shape)}")
    xp = x.xp
    if xp.iinfo(labels.dtype).bits < 32:
        # What is computed from labels overflows fewer bits.
        labels = xp.astype(labels, xp.int32)
    if known(labels) and not xp.all((labels >= 0) & (labels < count)):
        raise ValueError(f"groups: expected labels in range(num_groups={count})")
    # array-api-compat's clip reads masks, for which CuPy waits.
    labels = xp.where(labels < count, xp.where(labels < 0, 0, labels), count - 1)
    return x.with_heads("groups", labels, 1)


def depth_of(count: int, tokens: int) -> int:
    """How often tokens are halved, to be in at most so many groups."""
    return min(count, tokens).bit_length() - 1


def rank_of(features: int) -> int:
    """The coordinates that keys are chosen by."""
    return min(features, max(_LEAST_RANK, features // 3))


def keys_of(num_exact: float, keys: int, groups: int) -> int:
    """So many groups' worth of keys."""
    return min(keys, math.ceil(num_exact * -(-keys // groups)))


def list_of(num_keys: int, keys: int, blocks: int) -> int:
    """The keys on a list, or all where lists would not make choosing cheaper."""
    listed = max(3 * num_keys, -(-keys // 4))
    return listed if blocks >= FAMILY and FAMILY * listed + keys < FAMILY * keys else keys


def default_blocks(tokens: int) -> int:
    """At most 64: of 8 queries, or of 128 where the call is long enough for its time to matter."""
    size = 8 if tokens <= _SHORT else 128
    return min(64, -(-tokens // size))


def check_window(x: Inputs, window: int | Sizes, tokens: Sizes) -> Sizes | None:
    """The window's sizes; None for none."""
    if isinstance(window, numbers.Integral) and check_count("window", window, minimum=0) == 0:
        return None
    n, m = x.q.shape[-2], x.k.shape[-2]
    if n != m:
        raise ValueError(
            f"window: expected 0 where there are not as many queries ({n}) as keys ({m}), got {shown(window)}"
        )
    return check_sizes("window", window, tokens)


def causal_sizes(
    tokens: Sizes, window: Any, num_groups: Any, group_size: Any, grid: Any, disjoint: bool
) -> tuple[Sizes, Sizes]:
    """A window, and groups that are over where one begins; of a shorter sequence, too."""
    if window == 0 or len(tokens) != 1:
        raise ValueError(
            "is_causal: eva expects a window and tokens in a row, "
            f"got window {shown(window)}, grid {shown(grid)}"
        )
    if num_groups is not None or not disjoint:
        raise ValueError("is_causal: expected group_size, not num_groups, and disjoint=True")
    sizes = [
        check_count(name, *size)
        if isinstance(size, tuple | list) and len(size) == 1
        else check_count(name, size)
        for name, size in (("window", window), ("group_size", window if group_size is None else group_size))
    ]
    if sizes[0] % sizes[1]:
        raise ValueError(
            f"group_size: expected a divisor of the window ({sizes[0]}) where is_causal, got {sizes[1]}"
        )
    return (sizes[0],), (sizes[1],)


def check_max_tokens(value: Any, is_causal: bool, n: int, sizes: Sizes, groups: Blocks) -> int:
    """The groups to draw for."""
    if value is None:
        return int(groups.index.shape[0])
    if not is_causal:
        raise ValueError("max_tokens: expected is_causal=True with it")
    return -(-check_count("max_tokens", value, minimum=n) // sizes[0])


def check_groups(
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
    count = num_groups
    if not isinstance(count, tuple | list):
        count = resolve_count("num_groups", count, 64, landmarks=(given, -2), noise=(noise, -2))
    return "segments", check_sizes("num_groups", count, tokens)


def check_window_bias(x: Inputs, bias: Any, tile: Sizes | None, *, is_causal: bool) -> Array | None:
    """What is added to the logits of a query and a key of a window, (..., 1, W, W)."""
    if bias is None:
        return None
    if tile is None:
        raise ValueError("window_bias: expected a window with it")
    size = math.prod(tile)
    own = x.match("window_bias", bias, 2)
    if len(tile) == 1 and own.shape[-2] == own.shape[-1] >= x.q.shape[-2] <= size:
        # A window longer than the sequence is the sequence.
        size = x.q.shape[-2]
        own = bias = own[..., :size, :size]
    if bias.ndim < 2 or tuple(own.shape[-2:]) != (size, size):
        raise ValueError(f"window_bias: expected shape (..., {size}, {size}), got {tuple(bias.shape)}")
    check_broadcast(q=(x.q, 2), k=(x.k, 2), v=(x.v, 2), window_bias=(own, 2))
    if is_causal:
        own = x.xp.where(x.xp.matrix_transpose(past(own, size, 0, 0)), own, -math.inf)
    return own[..., None, :, :]
