"""`multiply_adds` against the products that NumPy is asked for."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from randattn import adaptive_eva, eva, lara, multiply_adds, ra, rfa, softmax_attention

N = 128
CALLS = {
    "softmax": (softmax_attention, {}),
    "rfa": (rfa, {"num_samples": 48}),
    "rfa optimal": (rfa, {"features": "optimal"}),
    "rfa trigonometric": (rfa, {"features": "trigonometric"}),
    "ra": (ra, {"num_samples": 2}),
    "lara": (lara, {"num_landmarks": 32}),
    "lara landmarks": (lara, {"normalize": "landmarks"}),
    "lara balance": (lara, {"antithetic": True, "mix_keys": True, "weighting": "balance"}),
    "eva": (eva, {"num_groups": 16, "window": 32}),
    "adaptive_eva": (adaptive_eva, {"group_size": 8, "num_exact": 16}),
    "adaptive_eva, larger blocks": (adaptive_eva, {"group_size": 8, "num_exact": 16, "block_size": 32}),
    "adaptive_eva, a remainder": (adaptive_eva, {"num_exact": 16, "block_size": 48}),
    "adaptive_eva, short": (adaptive_eva, {}),
}


@pytest.mark.parametrize("features", [4, 32])
@pytest.mark.parametrize("name", CALLS)
def test_products(name, features, monkeypatch):
    """All of them; beside, what is weighted and summed element by element."""
    estimator, options = CALLS[name]
    total, product = [], xp.matmul

    def counted(a, b, **options):
        out = product(a, b, **options)
        total.append(out.size * a.shape[-1])
        return out

    monkeypatch.setattr(xp, "matmul", counted)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((N, size)) for size in (features, features, 24))
    needs_draws = estimator in (rfa, ra, lara)
    estimator(q, k, v, **options, **({"rng": 0} if needs_draws else {}))
    count = multiply_adds(estimator, N, N, features, 24, **options)
    assert sum(total) <= count <= 1.05 * sum(total)


def test_errors():
    with pytest.raises(TypeError, match="estimator"):
        multiply_adds(len, 4, 4, 4, 4)
    with pytest.raises(TypeError, match="num_sample"):
        multiply_adds(rfa, 4, 4, 4, 4, num_sample=3)
    with pytest.raises(ValueError, match="m"):
        multiply_adds(rfa, 4, 0, 4, 4)
    with pytest.raises(NotImplementedError, match="is_causal"):
        multiply_adds(rfa, 4, 4, 4, 4, is_causal=True)
