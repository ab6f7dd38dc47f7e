"""Errors, times and perplexity of estimators on the inputs of a trained language model.

Time is that of exact attention of the same library, side by side: PyTorch's kernel, and `softmax_attention`
on NumPy and JAX.
"""

from __future__ import annotations

import json
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from randattn import adaptive_eva, adaptive_eva_step, eva, lara, rfa, softmax_attention

from .language_model import LanguageModel, exact_attention, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Say = Callable[[str], None]

# The options of adaptive_eva were chosen on the first of these layers of the language reference.
TUNED, HELD_OUT = (3, 7, 12, 18, 20, 25), (1, 5, 10, 15, 22, 28)
# Of longer inputs the first layers alone: each layer takes 12 seconds of exact attention.
EARLY = (2, 5, 8)
# Tokens of a text that the model reads at once: as many as it was trained on, and more.
_CAPTURED = (8192, 32768)
# Steps that follow a call on all tokens before them: by their results the error, by their times the time.
_STEPS = 64
_PAIRS = 5  # pairs of calls whose ratio's median is given


class Case(NamedTuple):
    """One kind of call on captured inputs."""

    name: str
    tokens: int
    is_causal: bool = True
    last: int | None = None  # queries; None for all
    before: bool = False  # over the keys before these queries alone
    errors_of: int | None = None  # the last queries, whose error is given; None for all
    heads: int | None = None  # query heads, each with its key head repeated; None for all, grouped
    layers: tuple[int, ...] = (*TUNED, *HELD_OUT)
    is_scaled: bool = True  # rotary frequencies of inputs that are longer than the model's training
    is_step: bool = False
    # For each call: without options a call of few keys would be exact attention.
    options: tuple[dict[str, int], ...] = ({},)
    texts: tuple[str, ...] = ("language reference", "sources")

    @property
    def captured(self) -> int:
        """Return the tokens of the text from which the inputs are cut."""
        return next(tokens for tokens in _CAPTURED if tokens >= self.tokens)

    def cut(self, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        """Return the inputs of this case."""
        if self.heads is not None:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, : self.heads] for x in (k, v))
            q = q[:, : self.heads]
        q, k, v = (x[:, :, : self.tokens] for x in (q, k, v))
        if self.before:
            k, v = (x[:, :, : -(self.last or 0)] for x in (k, v))
        return (q if self.last is None else q[:, :, -self.last :]), k, v


_WITHOUT: tuple[dict[str, int], ...] = ({}, {"exact_heads": 0})
_LONG: dict[str, Any] = {"heads": 4, "layers": EARLY, "texts": ("language reference",)}
_UNSCALED = ", rotary frequencies as trained"
CASES = (
    Case("last 1,024 queries over 7,168 keys", 8192, is_causal=False, last=1024, before=True),
    Case("causal, last 1,024 of 8,192 tokens", 8192, last=1024, options=_WITHOUT),
    Case("causal, 2,048 tokens", 2048, options=({"num_exact": 128},)),
    Case("causal, 4,096 tokens", 4096, options=({"num_exact": 256},)),
    Case("causal, 8,192 tokens", 8192, options=_WITHOUT),
    *(
        Case(
            f"causal, 32,768 tokens{kind}; error of the last 1,024",
            32768,
            errors_of=1024,
            is_scaled=not kind,
            options=_WITHOUT,
            **_LONG,
        )
        for kind in ("", _UNSCALED)
    ),
    *(
        Case(f"16,384 tokens{kind}", 16384, is_causal=False, is_scaled=not kind, **_LONG)
        for kind in ("", _UNSCALED)
    ),
    Case("a step over 8,192 tokens", 8192, is_step=True, options=({}, {"num_exact": 512})),
    Case(
        "a step over 32,768 tokens",
        32768,
        is_step=True,
        layers=EARLY,
        texts=("language reference",),
        options=({}, {"num_exact": 2048}),
    ),
)


class Row(NamedTuple):
    """A measurement.

    Attributes
    ----------
    error, worst : float
        The relative error, the mean over heads, layers and texts, and that of the worst layer.
    time : float
        The time of a call over exact attention of the same library, the median of pairs of calls.
    exact_seconds, first_seconds : float
        The time of exact attention, and of the first call, with the time to compile it.
    """

    library: str
    case: str
    options: str
    error: float
    worst: float
    time: float
    exact_seconds: float
    first_seconds: float


def measure(library: str, say: Say, *, long: bool, steps: bool) -> Iterator[Row]:
    """Measure calls of adaptive_eva or steps; calls of all queries and fewer layers for NumPy and JAX.

    The errors are those of PyTorch: NumPy takes six times as long.
    """
    model, own = LanguageModel(), _LIBRARIES[library]
    cases = [case for case in CASES if case.is_step == steps and (long or case.tokens <= 8192)]
    if library != "torch":
        few = {"layers": HELD_OUT[::2], "texts": ("language reference",)}
        cases = [
            case if case.tokens > 8192 else case._replace(**few)
            for case in cases
            if steps or (case.is_causal and case.last is None and case.tokens <= 8192)
        ]
    layers: dict[tuple[int, bool, str], set[int]] = {}
    for case in cases:
        for name in case.texts:
            layers.setdefault((case.captured, case.is_scaled, name), set()).update(case.layers)
    captured = {}
    for (tokens, is_scaled, name), wanted in layers.items():
        say(f"capture {tokens} tokens of the {name}")
        inputs = model.capture(model.tokens(texts()[name], tokens), wanted, is_scaled=is_scaled)
        captured[tokens, is_scaled, name] = inputs
    del model
    for case in cases:
        of_case = [captured[case.captured, case.is_scaled, name] for name in case.texts]
        for options in case.options:
            say(f"{library}: {case.name} {options}")
            yield (_row_of_steps if case.is_step else _row)(library, own, case, options, of_case)


def _row(library: str, own: Any, case: Case, options: dict[str, Any], captured: list[Any]) -> Row:
    errors, first = [], math.nan
    gqa = case.heads is None
    for of_text in captured:
        for layer in case.layers:
            arrays = [own.array(x) for x in case.cut(*of_text[layer])]
            call = partial(adaptive_eva, *arrays, is_causal=case.is_causal, enable_gqa=gqa, **options)
            exact = partial(own.exact, *arrays, is_causal=case.is_causal, enable_gqa=gqa)
            start = time.perf_counter()
            own.wait(out := call())
            first = time.perf_counter() - start if math.isnan(first) else first
            last = slice(None if case.errors_of is None else -case.errors_of, None)
            errors.append(mean_error(*(np.asarray(x)[..., last, :] for x in (out, exact()))))
    ratios, seconds = [], []
    for _ in range(_PAIRS):
        at = [time.perf_counter()]
        for function in (exact, call):
            own.wait(function())
            at.append(time.perf_counter())
        seconds.append(at[1] - at[0])
        ratios.append((at[2] - at[1]) / seconds[-1])
    return _rounded(library, case, options, errors, ratios, seconds, first)


def _row_of_steps(library: str, own: Any, case: Case, options: dict[str, Any], captured: list[Any]) -> Row:
    """Measure steps of one token, after a call on the tokens before them, against exact attention of each."""
    errors, ratios, seconds, first = [], [], [], math.nan
    gqa = {"enable_gqa": True}
    step = own.compiled(partial(adaptive_eva_step, **options, **gqa), donate_argnums=3)
    # Eager on JAX too, where it is one program: inside another program it takes more than twice the time.
    exactly = partial(own.exact, is_causal=False, **gqa)
    for of_text in captured:
        for layer in case.layers:
            arrays = [own.array(x[:, :, : case.tokens]) for x in of_text[layer]]
            start = case.tokens - _STEPS
            prompt = (x[:, :, :start] for x in arrays)
            # An exact head of a prompt takes longer than all steps: here the state alone is of interest.
            begun = {"is_causal": True, "exact_heads": 0, "return_state": True, "max_tokens": case.tokens}
            _, state = adaptive_eva(*prompt, **begun, **gqa)
            outs = []
            for n in range(start, case.tokens):
                one = [x[:, :, n : n + 1] for x in arrays]
                at = [time.perf_counter()]
                # All keys, of one shape: JAX would compile a program for each number of keys.
                own.wait(exactly(one[0], *arrays[1:]))
                at.append(time.perf_counter())
                out, state = step(*one, state)
                # The state too: its update would go on in the time of the next call.
                own.wait((out, state))
                at.append(time.perf_counter())
                first = at[2] - at[1] if math.isnan(first) else first
                seconds.append(at[1] - at[0])
                ratios.append((at[2] - at[1]) / seconds[-1])
                outs.append(np.asarray(out))
            last = (arrays[0][:, :, start:], *arrays[1:])
            exact = softmax_attention(*last, is_causal=True, **gqa)
            errors.append(mean_error(np.concatenate(outs, axis=2), np.asarray(exact)))
    return _rounded(library, case, options, errors, ratios, seconds, first)


def _rounded(
    library: str,
    case: Case,
    options: dict[str, Any],
    errors: list[float],
    ratios: list[float],
    seconds: list[float],
    first: float,
) -> Row:
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    found = (np.mean(errors), max(errors), np.median(ratios), np.median(seconds), first)
    return Row(library, case.name, shown, *(float(f"{x:.3g}") for x in found))


def mean_error(out: np.ndarray, exact: np.ndarray) -> float:
    """Return the relative error of each head, averaged over heads."""
    return float((np.linalg.norm(out - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))).mean())


class _Numpy:
    exact = staticmethod(softmax_attention)

    def array(self, x: torch.Tensor) -> Any:
        return x.numpy()

    def wait(self, x: Any) -> None:
        pass

    def compiled(self, function: Any, **_: Any) -> Any:
        return function


class _Torch(_Numpy):
    def array(self, x: torch.Tensor) -> Any:
        return x.contiguous()

    @staticmethod
    def exact(q: Any, k: Any, v: Any, *, is_causal: bool, enable_gqa: bool) -> Any:
        if is_causal and q.shape[-2] != k.shape[-2]:
            # PyTorch's own flag aligns the first query with the first key.
            return softmax_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
        if q.shape[-2] == 1:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


class _Jax(_Numpy):
    def array(self, x: torch.Tensor) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(x.numpy())

    def wait(self, x: Any) -> None:
        import jax

        jax.block_until_ready(x)

    def compiled(self, function: Any, **donated: Any) -> Any:
        import jax

        return jax.jit(function, **donated)


_LIBRARIES = {"numpy": _Numpy(), "torch": _Torch(), "jax": _Jax()}


class Perplexity(NamedTuple):
    """The perplexity of a text with one attention in all layers, and its seconds over exact attention's."""

    text: str
    tokens: int
    attention: str
    perplexity: float
    over_exact: float
    time: float


def attentions(tokens: int) -> dict[str, Any]:
    """Return the attentions whose perplexity is measured, by name; the exact one first."""
    causal = {"is_causal": True, "enable_gqa": True}
    short = {} if tokens > 4096 else {"num_exact": tokens // 16}
    found: dict[str, Any] = {
        "exact": exact_attention,
        "adaptive_eva": _of(adaptive_eva, **short, **causal),
        "adaptive_eva, exact_heads=0": _of(adaptive_eva, exact_heads=0, **short, **causal),
    }
    if tokens <= 4096:
        found |= {
            "eva": _of(eva, window=128, group_size=16, **causal),
            "lara": _of(lara, num_landmarks=128, window=128, **causal),
            "rfa": _of(rfa, num_samples=256, rng=0, **causal),
            "first 4 and last 128 keys": partial(_masked, function=_first_and_recent),
            "true top 64 keys": partial(_masked, function=_true_top),
        }
    return found


def _of(estimator: Any, **options: Any) -> Any:
    return lambda _, q, k, v: estimator(q, k, v, **options)


def _masked(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, function: Any) -> torch.Tensor:
    """Attend to the keys that a function keeps, a block of queries at a time."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    done, size = [], 256
    for start in range(0, q.shape[2], size):
        rows = q[:, :, start : start + size]
        logits = rows @ k.mT * q.shape[-1] ** -0.5
        number = torch.arange(start, start + rows.shape[2])[:, None]
        later = torch.arange(k.shape[2]) - number
        logits = logits.masked_fill(later > 0, -math.inf)
        done.append(logits.masked_fill(~function(logits, later), -math.inf).softmax(-1) @ v)
    return torch.cat(done, dim=2)


def _first_and_recent(logits: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    return (torch.arange(logits.shape[-1]) < 4) | (later > -128)


def _true_top(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return logits >= logits.topk(64, dim=-1).values[..., -1:]


def perplexities(say: Say, lengths: tuple[int, ...]) -> Iterator[Perplexity]:
    """Measure the perplexity of both texts with each attention."""
    model = LanguageModel()
    for tokens in lengths:
        for name, text in texts().items():
            exact = None
            for label, attention in attentions(tokens).items():
                say(f"{name}, {tokens} tokens: {label}")
                found = model.score(model.tokens(text, tokens), attention)
                exact = exact or found
                ratios = found.perplexity / exact.perplexity - 1, found.seconds / exact.seconds
                yield Perplexity(
                    name, tokens, label, *(float(f"{x:.4g}") for x in (found.perplexity, *ratios))
                )


def table(rows: list[Any]) -> Table:
    """Return a table of rows of one kind."""
    found = Table(*(name.replace("_", " ") for name in rows[0]._fields))
    for row in rows:
        found.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    return found


def write(path: Path, about: dict[str, Any], rows: list[Any]) -> None:
    """Write the file that is committed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"about": about, "rows": [row._asdict() for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
