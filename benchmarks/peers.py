"""Other packages' attention on the same inputs.

Their functions take q, k and v, heads first, as randattn's do. Where a package has no such function apart
from its projections, the row's note says so.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from .baselines import open_library
from .cases import Workbench, case_of
from .harness import race
from .rows import Case, Row, time_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .baselines import Library
    from .sizes import Sizes

    Array = Any
    Say = Callable[[str], None]

_PROJECTIONS = "the peer's time has its three input projections and the output projection in it"
_OTHER_KERNEL = "the peer approximates no softmax: its kernel is a product of softmaxes of q and of k"


def measure(sizes: Sizes, say: Say, device: str = "cpu") -> Iterator[Row]:
    """Measure all rows over peers, PyTorch's first."""
    torch = open_library("torch", device)
    for tokens, passes in ((sizes.peers, "forward"), (sizes.peers_backward, "forward+backward")):
        say(f"{tokens} tokens over PyTorch's peers, {passes}")
        yield from _on_torch(torch, sizes, tokens, passes)
    jax = open_library("jax", device)
    for passes in ("forward", "forward+backward"):
        say(f"{sizes.peers_exact} tokens over {jax.exact_name}, {passes}")
        yield from _on_jax(jax, sizes, passes)


def _on_torch(library: Library, sizes: Sizes, tokens: int, passes: str) -> Iterator[Row]:
    bench = Workbench(library)
    ours = {
        "rfa 64": case_of(library, "rfa", tokens, passes=passes),
        "rfa 256": case_of(library, "rfa", tokens, passes=passes, features=256),
        "lara": case_of(library, "lara", tokens, "weighting=optimal", passes=passes),
        "eva": case_of(library, "eva", tokens, "window=64", passes=passes),
    }
    exact = case_of(library, library.exact_name, tokens, passes=passes, features=None)
    calls: dict[Any, Callable[[], Any]] = {case: bench.call(case) for case in ours.values()}
    calls |= {
        library.exact_name: bench.call(exact),
        "performer-pytorch, 64 features": _performer(bench, ours["rfa 64"]),
        "performer-pytorch, 256 features": _performer(bench, ours["rfa 256"]),
        "linear-attention-transformer": _linear(bench, ours["rfa 64"]),
        "nystrom-attention, 64 landmarks": _nystrom(bench, ours["lara"]),
    }
    medians = race(calls, wait=library.own.wait, number=sizes.number)

    def row(name: str, peer: str, note: str | None = None) -> Row:
        return time_row("peers", ours[name], medians[ours[name]], peer, medians[peer], note=note)

    yield row("rfa 64", "performer-pytorch, 64 features")
    yield row("rfa 256", "performer-pytorch, 256 features")
    yield row("rfa 64", "linear-attention-transformer", note=_OTHER_KERNEL)
    for name in ("lara", "eva"):
        yield row(name, "nystrom-attention, 64 landmarks", note=_PROJECTIONS)
    for name in ours:
        yield row(name, library.exact_name)


def _on_jax(library: Library, sizes: Sizes, passes: str) -> Iterator[Row]:
    bench, tokens = Workbench(library), sizes.peers_exact
    exact = case_of(library, library.exact_name, tokens, passes=passes, features=None)
    ours = [
        case_of(library, estimator, tokens, options, passes=passes)
        for estimator, options in (("rfa", ""), ("lara", "weighting=optimal"), ("eva", "window=64"))
    ]
    calls = {case: bench.call(case) for case in (exact, *ours)}
    medians = race(calls, wait=library.own.wait, number=sizes.number)
    for case in ours:
        yield time_row("peers", case, medians[case], library.exact_name, medians[exact])


def _called(
    bench: Workbench, case: Case, function: Callable[..., Array], *arrays: Array
) -> Callable[[], Any]:
    """Return a call of a peer's function on arrays, with gradients where the case has them."""
    library = bench.library
    if case.passes == "forward":
        no_grad = library.xp.no_grad()
        return no_grad(lambda: function(*arrays))
    cotangent = bench.inputs(case).cotangent
    if len(arrays) == 1:
        cotangent = cotangent.reshape(arrays[0].shape)

    def both() -> Array:
        leaves = [x.detach().requires_grad_() for x in arrays]
        return library.xp.autograd.grad(function(*leaves), leaves, cotangent)

    return both


def _performer(bench: Workbench, case: Case) -> Callable[[], Any]:
    attention = _module("performer_pytorch").FastAttention(
        dim_heads=case.head_dim, nb_features=case.features, causal=False
    )
    arrays = bench.arrays(case)
    return _called(bench, case, attention.to(arrays[0].device), *arrays)


def _linear(bench: Workbench, case: Case) -> Callable[[], Any]:
    module = _module("linear_attention_transformer.linear_attention_transformer")
    return _called(bench, case, module.linear_attn, *bench.arrays(case))


def _nystrom(bench: Workbench, case: Case) -> Callable[[], Any]:
    q, *_ = bench.arrays(case)
    width = case.heads * case.head_dim
    layer = _module("nystrom_attention").NystromAttention(
        dim=width,
        dim_head=case.head_dim,
        heads=case.heads,
        num_landmarks=case.features,
        residual=False,
    )
    x = q.swapaxes(1, 2).reshape(1, case.tokens, width)
    return _called(bench, case, layer.to(x.device), x)


def _module(name: str) -> Any:
    # Warnings of a peer's import do not concern our readers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
