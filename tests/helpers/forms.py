"""Every estimator in every form, with an int seed: what the wide checks run over."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.calls import adaptive_eva, eva, lara, ra, rfa, softmax_attention

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ESTIMATORS = {
    "softmax": softmax_attention,
    "rfa positive": partial(rfa, num_samples=8, rng=0),
    "rfa trigonometric": partial(rfa, num_samples=8, features="trigonometric", rng=0),
    "rfa orthogonal": partial(rfa, num_samples=8, draws="orthogonal", rng=0),
    "rfa optimal": partial(rfa, num_samples=8, features="optimal", precondition=True, draws="simplex", rng=0),
    "ra": partial(ra, num_samples=2, rng=0),
    "lara optimal": partial(lara, num_landmarks=5, rng=0),
    "lara landmarks": partial(lara, num_landmarks=5, normalize="landmarks", antithetic=True, rng=0),
    "lara balance": partial(lara, num_landmarks=5, weighting="balance", mix_keys=True, rng=0),
    "lara biased": partial(lara, num_landmarks=5, weighting="biased", rng=0),
    "lara deterministic": partial(lara, num_landmarks=5),
    "eva": partial(eva, num_groups=5, window=4, rng=0),
    "eva unit": partial(eva, group_size=3, window=5, group_weight="unit", rng=0),
    "eva overlapping": partial(eva, num_groups=5, window=4, disjoint=False, rng=0),
    "eva deterministic": partial(eva, num_groups=5, window=0),
    "adaptive_eva": partial(adaptive_eva, group_size=4, num_exact=4, block_size=4),
    "adaptive_eva remainder": partial(adaptive_eva, group_size=3, num_exact=5, block_size=7),
    "adaptive_eva causal": partial(
        adaptive_eva, group_size=3, num_exact=5, block_size=4, exact_heads=0, is_causal=True
    ),
    "rfa causal": partial(rfa, num_samples=8, is_causal=True, rng=0),
    "lara causal": partial(lara, num_landmarks=5, window=3, is_causal=True, rng=0),
    "eva causal": partial(eva, group_size=2, window=4, is_causal=True, rng=0),
}
# Forms that share their code with another one of the same estimator, up to a few lines.
VARIANTS = frozenset(
    {
        *("rfa orthogonal", "rfa optimal", "rfa trigonometric"),
        *("lara landmarks", "lara balance", "lara biased", "lara deterministic"),
        *("eva unit", "eva overlapping", "eva deterministic", "adaptive_eva remainder"),
    }
)


def beyond(names: Iterable[str], kept: Sequence[str], *libraries: str) -> list[Any]:
    """Give parameters of a test: on these libraries the suite leaves out all but some, without `--thorough`."""
    mark = pytest.mark.thorough(*libraries)
    return [name if name in kept else pytest.param(name, marks=mark) for name in names]
