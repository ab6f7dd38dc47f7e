"""The cost of sharding a sequence: a model, and a count in compiled programs that the model must equal.

A sequence of N tokens lies on P devices, N / P on each. Bytes are those that one device sends in a forward
pass, by rings: an all-reduce of b bytes sends 2 b (P - 1) / P, an all-gather that gives b bytes half of that,
and a reduce-scatter that leaves b bytes on each device b (P - 1).
Operations are the multiply-adds of the matrix products on one device. `count` compiles the estimator for 8
devices of this machine and reads the collective operations out of the program.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ITEM = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
DEVICES = 8
FORCED = f"--xla_force_host_platform_device_count={DEVICES}"
LABELS = (
    "rfa",
    "lara weighting=balance",
    "lara weighting=optimal",
    "eva window=64",
    "adaptive_eva",
    "ring attention",
)


@dataclass(frozen=True)
class Layout:
    """A sequence on devices: sizes, and the bytes of a number.

    With groups, devices are a divisor or a multiple of them; a window lies on one device.
    """

    devices: int = DEVICES
    tokens: int = 1 << 20
    heads: int = 8
    features: int = 64
    values: int = 64
    groups: int = 64
    window: int = 64
    item: int = 4

    @property
    def pieces(self) -> int:
        """Groups, cut where they lie on several devices."""
        return max(self.groups, self.devices)


class Traffic(NamedTuple):
    """Bytes of the results of the collective operations of one kind each."""

    reduced: int
    gathered: int
    scattered: int = 0

    def sent(self, devices: int) -> float:
        """Bytes that one device sends."""
        return (2 * self.reduced + self.gathered + devices * self.scattered) * (devices - 1) / devices


def traffic(label: str, at: Layout) -> Traffic:
    """Return the traffic of an estimator; that of adaptive_eva and of the ring grows with the tokens."""
    c, d, e = at.groups, at.features, at.values
    # A maximum and a sum for each frequency, and their average of the values.
    average = c * (e + 2)
    if label == "ring attention":
        # Keys and values go around the ring: as many bytes as if all were gathered.
        return _bytes(at, 0, at.tokens * (d + e))
    if label == "adaptive_eva":
        # Every device has all queries; the averages of its keys are summed on the devices of their queries.
        return _bytes(at, at.tokens, at.tokens * d, at.tokens // at.devices * (e + 1))
    if label == "rfa":
        return _bytes(at, average, 0)
    # A group on one device is averaged there; a group on several is merged from its pieces with their sizes.
    cut = at.devices > c
    landmarks = at.pieces * d
    if label.startswith("lara"):
        over_queries = 2 * c if "optimal" in label else 0
        return _bytes(at, average + over_queries, 2 * landmarks)
    windows_cut = at.tokens // c > at.window
    # Log sizes, which XLA reduces, and log Z.
    sizes = at.pieces if cut or windows_cut else 0
    return _bytes(at, sizes, 2 * landmarks + at.pieces * e + sizes)


def _bytes(at: Layout, *numbers: int) -> Traffic:
    return Traffic(*(at.heads * at.item * number for number in numbers))


def operations(label: str, at: Layout) -> float:
    """Count the multiply-adds of one device: its share of the tokens' work, and all of the groups' work."""
    n, c, d, e = at.tokens / at.devices, at.groups, at.features, at.values
    if label == "ring attention":
        return at.heads * n * at.tokens * (d + e)
    if label == "adaptive_eva":
        from randattn import adaptive_eva, multiply_adds

        keys = at.tokens // at.devices
        return at.heads * multiply_adds(adaptive_eva, at.tokens, keys, d, e, num_exact=max(128, keys // 8))
    if label == "rfa":
        return at.heads * 2 * n * c * (d + e)
    if label.startswith("lara"):
        # The mixture's densities, and with "optimal" two products with the queries' landmarks.
        own = c * c * 2 * d
        moved = 2 * n * c * d if "optimal" in label else 0
        return at.heads * (2 * n * c * (d + e) + moved + own)
    rest = 1 if at.tokens // c > at.window else 0
    return at.heads * n * ((at.window + c + rest) * (d + e) + d + e)


def collectives(text: str) -> Iterator[tuple[str, list[tuple[int, ...]], int]]:
    """Yield the collective operations of a compiled program: kind, shapes of the results, bytes."""
    for line in text.splitlines():
        found = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if found:
            results = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            shapes = [tuple(int(size) for size in sizes.split(",") if size) for _, sizes in results]
            size = sum(ITEM[kind] * math.prod(s) for (kind, _), s in zip(results, shapes, strict=True))
            yield found[2], shapes, size


def count(label: str, at: Layout) -> Traffic:
    """Count the traffic in the program that JAX compiles for these devices."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((at.devices,), ("tokens",), axis_types=(AxisType.Auto,))
    layout = NamedSharding(mesh, PartitionSpec(None, "tokens", None))
    dtype = {4: "float32", 8: "float64"}[at.item]
    inputs = [
        jax.ShapeDtypeStruct((at.heads, at.tokens, size), dtype, sharding=layout)
        for size in (at.features, at.features, at.values)
    ]
    text = jax.jit(_estimator(label, at)).lower(*inputs).compile().as_text()
    totals = dict.fromkeys(KINDS, 0)
    for kind, _, size in collectives(text):
        totals[kind] += size
    found = Traffic(*(totals.pop(kind) for kind in ("all-reduce", "all-gather", "reduce-scatter")))
    if any(totals.values()):
        raise AssertionError(f"{label}: expected no other operations between devices, got {totals}")
    return found


def _estimator(label: str, at: Layout) -> Callable[..., Any]:
    from randattn import adaptive_eva, eva, lara, rfa

    if label == "adaptive_eva":
        return lambda q, k, v: adaptive_eva(q, k, v, num_exact=at.groups)
    if label == "rfa":
        return lambda q, k, v: rfa(q, k, v, num_samples=at.groups, rng=0)
    if label.startswith("lara"):
        weighting = label.partition("=")[2]
        return lambda q, k, v: lara(q, k, v, num_landmarks=at.groups, weighting=weighting, rng=0)
    return lambda q, k, v: eva(q, k, v, num_groups=at.groups, window=at.window, rng=0)


def force_devices() -> None:
    """Give JAX, which must not have started, 8 devices on the CPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FORCED}"


def table(at: Layout, devices: Sequence[int]) -> Table:
    """Return a table of the bytes sent and the multiply-adds, of one device in one forward pass."""
    title = (
        f"{at.tokens:,} tokens, {at.heads} heads of {at.features}, C = {at.groups}, window {at.window}, "
        f"{at.item} bytes a number"
    )
    found = Table(title=title)
    for name in ("estimator", *(f"{number} devices: sends" for number in devices)):
        found.add_column(name, justify="right" if "sends" in name else "left")
    for label in LABELS:
        here = [replace(at, devices=number) for number in devices]
        sent = [_short(traffic(label, one).sent(one.devices), "B") for one in here]
        found.add_row(
            label, *(f"{s}, {_short(operations(label, o), '')}" for s, o in zip(sent, here, strict=True))
        )
    return found


def _short(value: float, unit: str) -> str:
    thousands = max(0, math.floor(math.log10(value) / 3)) if value else 0
    return f"{value / 1000**thousands:.3g} {'kMGTP'[thousands - 1] if thousands else ''}{unit}".rstrip()


def check() -> Iterator[tuple[str, Layout, Traffic, Traffic]]:
    """Yield for small layouts the traffic by the model and in the compiled program."""
    for groups, tokens in ((64, 4096), (64, 8192), (64, 16384), (4, 4096)):
        at = Layout(tokens=tokens, heads=2, groups=groups)
        for label in LABELS[:-1]:
            yield label, at, traffic(label, at), count(label, at)
