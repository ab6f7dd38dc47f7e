"""The published code's own numbers, as float64 arrays (tests/helpers/data/README.md tells where they are from)."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.calls import eva, lara, ra

pytestmark = pytest.mark.mathematics

DATA = Path(__file__).parents[1] / "helpers" / "data"
SCALE = 8**-0.25
PUBLISHED_EVA = {"group_weight": "unit", "disjoint": False, "noise_scale": SCALE}

LARA_LINE = {"num_landmarks": 7, "alpha": 0.5, "noise_scale": SCALE}
LARA_GRID = {"num_landmarks": 9, "grid": (7, 8), "noise_scale": SCALE}
# file, result, inputs' prefix, noise, estimator, options
CASES = [
    *[
        ("published", f"lara_{w}", "", f"lara_{w}_noise", lara,
         {"num_landmarks": 6, "weighting": w, "alpha": 2.0, "noise_scale": SCALE})
        for w in ("optimal", "balance", "biased")
    ],
    ("published", "eva", "", "eva_noise", eva, {"num_groups": 6, "window": 8, **PUBLISHED_EVA}),
    *[
        ("published_more", f"line_{w}{kind}", "line_", noise, lara, {"weighting": w, **LARA_LINE, **more})
        for w in ("optimal", "balance", "biased")
        for kind, noise, more in (
            ("", "line_noise", {}),
            ("_inference", None, {}),
            ("_antithetic", "line_noise", {"antithetic": True}),
        )
    ],
    ("published_more", "grid_optimal", "grid_", "grid_noise", lara, LARA_GRID),
    ("published_more", "grid_mixed", "grid_", "grid_noise", lara, {"mix_keys": True, **LARA_GRID}),
    ("published_more", "eva_line", "eva_", "eva_noise", eva, {"num_groups": 16, "window": 16, **PUBLISHED_EVA}),
    ("published_more", "eva_line_large_groups", "eva_", "eva_noise", eva,
     {"num_groups": 4, "window": 8, **PUBLISHED_EVA}),
    ("published_more", "eva_line_inference", "eva_", None, eva, {"num_groups": 16, "window": 16, **PUBLISHED_EVA}),
    ("published_more", "eva_grid", "eva_", "eva_noise", eva,
     {"num_groups": 16, "window": 16, "grid": (8, 8), **PUBLISHED_EVA}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "result", "prefix", "noise", "estimator", "options"), CASES, ids=[c[1] for c in CASES]
)
def test_published_numbers(lib, file, result, prefix, noise, estimator, options):
    data = np.load(DATA / f"{file}.npz")
    q, k, v = lib.arrays(*(data[prefix + name] for name in "qkv"))
    # The published code ignores options that have no effect; here they are errors.
    unused = {"noise_scale"} if noise is None else set()
    unused |= {"alpha"} if options.get("weighting", "optimal") != "optimal" else set()
    options = {name: value for name, value in options.items() if name not in unused}
    if noise is not None:
        count = options.get("num_groups") or options["num_landmarks"]
        options = {**options, "noise": lib.asarray(data[noise][:, :, :count])}
    out = lib.check(estimator(q, k, v, **options), q, data[result].shape)
    np.testing.assert_allclose(out, data[result], rtol=0, atol=1e-12)


def test_published_ra(lib):
    data = np.load(DATA / "published_more.npz")
    q, k, v = lib.arrays(*(data["eva_" + name] for name in "qkv"))
    # One sample, an axis of its own here.
    noise, components = lib.arrays(SCALE * data["ra_noise"][:, :, None], data["ra_components"][:, :, None])
    out = lib.check(ra(q, k, v, noise=noise, components=components), q, data["ra"].shape)
    np.testing.assert_allclose(out, data["ra"], rtol=0, atol=1e-12)
