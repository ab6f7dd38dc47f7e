"""The programs that JAX compiles for sequences on 8 devices, as JSON: ``python -m tests.programs.sharded``.

A process of its own: the number of devices is fixed when JAX starts. `tests/libraries/across/test_sharded.py` reads it.
"""

from __future__ import annotations

import functools
import json

from benchmarks import sharding
from tests.helpers.libraries import FOR_GRADIENTS

HEADS, FEATURES, VALUES = 2, 8, 6
LENGTHS = (512, 1024)
WINDOW = 16

# The estimators with their options. Of 8 devices 24 groups are 3 on each, 20 are cut by the devices' borders,
# 4 lie on two each; windows of 24 lie across borders, too, as blocks of (3, 3) on a grid 16 wide do.
CASES = {
    "rfa": ("rfa", {"num_samples": 24}),
    "rfa trigonometric": ("rfa", {"num_samples": 24, "features": "trigonometric"}),
    "lara balance": ("lara", {"num_landmarks": 24, "weighting": "balance"}),
    "lara biased": ("lara", {"num_landmarks": 24, "weighting": "biased"}),
    "lara optimal": ("lara", {"num_landmarks": 16}),
    "lara landmarks": ("lara", {"num_landmarks": 24, "normalize": "landmarks", "mix_keys": True}),
    "lara antithetic": ("lara", {"num_landmarks": 20, "antithetic": True, "mix_keys": True}),
    "lara grid": ("lara", {"num_landmarks": (5, 3), "grid": (-1, 16)}),
    "lara few": ("lara", {"num_landmarks": 4, "weighting": "balance"}),
    "lara masked": ("lara", {"num_landmarks": 24, "key_mask": True}),
    "eva aligned": ("eva", {"num_groups": 16, "window": WINDOW}),
    "eva ragged": ("eva", {"num_groups": 20, "window": WINDOW}),
    "eva few": ("eva", {"num_groups": 4, "window": WINDOW}),
    "eva far": ("eva", {"num_groups": 20, "window": 0}),
    "eva unit": ("eva", {"num_groups": 16, "window": WINDOW, "group_weight": "unit", "disjoint": False}),
    "eva across": ("eva", {"num_groups": 20, "window": 24}),
    "eva grid": ("eva", {"num_groups": (2, 2), "window": (3, 3), "grid": (-1, 16)}),
    "eva masked": ("eva", {"num_groups": 20, "window": 24, "key_mask": True}),
    # As many groups as tokens allow: they travel, and nothing else.
    "eva group_size": ("eva", {"group_size": WINDOW, "window": WINDOW}),
}
# Nothing is promised of what these send: windows longer than a device's tokens, every query and key.
OTHERS = {
    "eva long": ("eva", {"num_groups": 20, "window": 100}),
    "softmax": ("softmax_attention", {}),
    "eva causal": ("eva", {"window": WINDOW, "is_causal": True}),
    "adaptive_eva causal": ("adaptive_eva", {"group_size": 128, "num_exact": 128, "is_causal": True}),
    "adaptive_eva exact": ("adaptive_eva", {"group_size": 8, "num_exact": 512}),
}
WITH_GRADIENTS = ("rfa", "lara optimal", "eva across")
EXPLICIT = ("rfa", "lara antithetic", "eva across")
# With blocks of few logits, so that there are loops along lanes.
IN_BLOCKS = ("rfa", "lara optimal")
# Estimator, groups and window: groups that windows cut, that devices cut, that nothing cuts.
COUNTED = [
    *((label, groups, 16) for groups in (16, 4) for label in sharding.LABELS[:-1]),
    ("eva window=64", 16, 64),
]


def layout_of(groups: int, window: int) -> sharding.Layout:
    """Give the layout that the cost model is asked for, and held to."""
    return sharding.Layout(tokens=1024, heads=2, features=16, values=8, groups=groups, window=window)


def main() -> None:
    """Print a row for each case and length."""
    sharding.force_devices()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import randattn
    from randattn._core import block_sizes

    jax.config.update("jax_enable_x64", True)
    spec = PartitionSpec(None, "tokens", None)

    def row(name: str, n: int, kind: AxisType, *, gradient: bool = False) -> dict[str, object]:
        estimator, options = (CASES | OTHERS)[name]
        options = {**options, **({} if name == "softmax" or "adaptive" in name else {"rng": 0})}
        if "grid" in options:
            options["grid"] = (n // 16, 16)
        if "key_mask" in options:
            options["key_mask"] = jnp.arange(n) % 5 != 0
        function = functools.partial(getattr(randattn, estimator), **options)
        if gradient:
            whole, argnums = function, (0, 1, 2)
            function = jax.grad(lambda *x: jnp.sum(whole(*x) ** 2), argnums)
        layout = NamedSharding(jax.make_mesh((sharding.DEVICES,), ("tokens",), axis_types=(kind,)), spec)
        rng = np.random.default_rng(0)
        inputs = [jnp.asarray(rng.standard_normal((HEADS, n, size))) for size in (FEATURES, FEATURES, VALUES)]
        compiler = FOR_GRADIENTS if gradient else {}
        lowered = jax.jit(function).lower(*(jax.device_put(x, layout) for x in inputs))
        program = lowered.compile(compiler_options=compiler)
        found = jax.tree.leaves(program(*(jax.device_put(x, layout) for x in inputs)))
        if gradient:
            expected = jax.jit(function).lower(*inputs).compile(compiler_options=compiler)(*inputs)
        else:
            options = {key: np.asarray(x) if key == "key_mask" else x for key, x in options.items()}
            expected = [getattr(randattn, estimator)(*map(np.asarray, inputs), **options)]
        operations = list(sharding.collectives(program.as_text()))
        return {
            "case": name,
            "tokens": n,
            "kind": kind.name + (" gradient" if gradient else ""),
            "bytes": sum(size for *_, size in operations),
            "longest": max(size for _, shapes, _ in operations for shape in shapes for size in (*shape, 1)),
            "error": max(
                float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / np.max(np.abs(np.asarray(y))))
                for x, y in zip(found, expected, strict=True)
            ),
            "along_tokens": all(x.sharding.is_equivalent_to(layout, x.ndim) for x in found),
        }

    rows = [row(name, n, AxisType.Auto) for name in CASES for n in LENGTHS]
    rows += [row(name, n, AxisType.Explicit) for name in EXPLICIT for n in LENGTHS]
    rows += [row(name, n, AxisType.Auto, gradient=True) for name in WITH_GRADIENTS for n in LENGTHS]
    others = [row(name, LENGTHS[0], AxisType.Auto) for name in OTHERS]
    block_sizes.COMPILED_MOST_LOGITS = 1 << 9
    blocks = [row(name, n, AxisType.Auto) for name in IN_BLOCKS for n in LENGTHS]
    rows += [{**one, "kind": "Auto in blocks"} for one in blocks]

    jax.config.update("jax_enable_x64", False)
    counts = [(*case, sharding.count(case[0], layout_of(*case[1:]))) for case in COUNTED]
    print(json.dumps({"rows": rows, "others": others, "counts": counts}))


if __name__ == "__main__":
    main()
