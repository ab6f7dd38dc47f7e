"""Use the installed wheel, in an environment that has nothing but what it requires.

Run by the `build` session, with ``python -I``, away from the checkout.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from functools import partial
from pathlib import Path

HEAVY = ("cupy", "dask", "jax", "matplotlib", "rich", "torch")

import randattn  # noqa: E402

loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & set(HEAVY), f"import randattn loads {loaded & set(HEAVY)}"
assert not any(map(importlib.util.find_spec, HEAVY)), "the environment is not empty"
assert Path(sys.prefix) in Path(randattn.__file__).parents, f"{randattn.__file__} is not the installed one"

import numpy as np  # noqa: E402

from randattn._estimators.registry import ESTIMATORS  # noqa: E402

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 100, 8)) for _ in range(3))


def streamed(estimator, step, options):
    """Half of the tokens in a call, half in steps."""
    (*first,), (*later,) = ([x[:, half] for x in (q, k, v)] for half in (slice(50), slice(50, None)))
    places = {} if step is randattn.rfa_step else {"max_tokens": 100}
    out, state = estimator(*first, is_causal=True, return_state=True, **options, **places)
    return np.concat([out, step(*later, state)[0]], axis=1)


calls = {
    "attend": lambda: randattn.attend(q, k, v).out,
    "merge": lambda: randattn.merge(randattn.attend(q, k, v), randattn.attend(q, k, v)).out,
}
for name, row in ESTIMATORS.items():
    draws = {} if row.draws == "never" else {"rng": 0}
    calls[name] = partial(row.function, q, k, v, **draws)
    if row.step is not None:
        calls[row.step.__name__] = partial(streamed, row.function, row.step, draws)
# Functions about attention.
assert randattn.diagnose(randattn.rfa, q, k, v, rng=0).relative_standard_error > 0
assert randattn.multiply_adds(randattn.rfa, 100, 100, 8, 8, num_samples=4) == 4 * 200 * 16 + 800
public = {name for name in randattn.__all__ if inspect.isfunction(getattr(randattn, name))} - {
    "diagnose",
    "multiply_adds",
}
assert public == set(calls), f"not called: {public - set(calls)}; not public: {set(calls) - public}"
for name, function in calls.items():
    out = function()
    assert out.shape == v.shape, (name, out.shape)
    assert np.all(np.isfinite(out)), name
    assert np.all(np.abs(out) <= np.abs(v).max()), name
where = Path(randattn.__file__).parent
print(f"{len(calls)} public functions run on NumPy {np.__version__} alone, from {where}")
