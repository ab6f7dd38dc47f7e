"""Decoding a token at a time, a library in a process of its own: `python -m benchmarks.streaming NAME`.

A step of `rfa` and of `eva` is compared with exact attention with a KV cache. Every state has really seen
the tokens before the step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import randattn

from .baselines import open_library
from .cases import case_of
from .harness import race
from .rows import ROOT, Row, time_row
from .sizes import sizes_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from .baselines import Library
    from .harness import Medians
    from .sessions import Say

    Array = Any
    Step = Callable[..., tuple[Array, Any]]

# The products of a step are too small to be shared, and on a machine that is not idle a hand-over between
# threads takes longer than all of them.
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
LIBRARIES = ("numpy", "torch", "jax")
CACHE = "KV cache"
HUNDREDTH = "the step after 100 tokens"
# Tokens of a step on the way to a position: whole windows.
CHUNK = 16384
WINDOW = 64
OPTIONS = {"rfa": "", "eva": f"window={WINDOW}", CACHE: ""}
# Steps whose mean is one time. One of eva's in each window makes the window's groups.
NUMBER = {"rfa": 100, "eva": WINDOW, CACHE: 2}
# JAX's programs in one time, each of a window's steps.
SCANS = {"rfa": 8, "eva": 1}
_HEADS, _SIZE, _FEATURES = 8, 64, 64
_ROUNDS, _SETS = 5, 2
# Seeds that no chunk has.
_NOISE, _TOKEN = 1, 2
# Steps that are timed, and steps to warm up.
_ROOM = (_ROUNDS * _SETS + 1) * WINDOW


class Arrived(NamedTuple):
    """The states after all tokens up to a position."""

    rfa: randattn.RFAState
    eva: randattn.EVAState
    cache: tuple[np.ndarray, np.ndarray]


def in_own_process(name: str, *, quick: bool) -> list[Row]:
    """Measure a library in a fresh process, on one thread."""
    command = (sys.executable, "-m", "benchmarks.streaming", name, *(["--quick"] if quick else []))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"streaming on {name}: the process failed")
    return [Row.from_json(plain) for plain in json.loads(done.stdout.splitlines()[-1])]


def main(name: str, *, quick: bool) -> None:
    """Measure in this process, print the rows."""
    found = measure(
        open_library(name), sizes_for(name, quick=quick).streaming, lambda what: print(what, file=sys.stderr)
    )
    print(json.dumps([row.to_json() for row in found]))


def measure(library: Library, positions: tuple[int, ...], say: Say) -> Iterator[Row]:
    """Measure steps after several numbers of tokens: each kind's in turn, so that the ratios are right."""
    say(f"{library.name}: {max(positions)} tokens")
    seconds: list[float] = []
    arrived = arrive(library, positions, seconds)
    case = case_of(library, "rfa", CHUNK, "rfa_step")
    yield Row("prefill", case, seconds=median(seconds))
    for kind, step in steps(library).items():
        states = {n: _held(library, kind, each) for n, each in arrived.items()}
        count = {n: size(state) for n, state in states.items()}
        say(f"{library.name}: {kind}")
        token = library.own.asarray(_normal(_TOKEN, 3), "float32")
        calls = {n: in_turn(step, token, state) for n, state in states.items()}
        del states
        found = race(calls, wait=library.own.wait, rounds=_ROUNDS, sets=_SETS, number=NUMBER[kind])
        yield from _rows(library, kind, found, count)
        del calls
        if library.name == "jax" and kind != CACHE:
            states = {n: _held(library, kind, each) for n, each in arrived.items()}
            tokens = library.own.asarray(_normal(_TOKEN, 3 * WINDOW), "float32")
            tokens = tokens.reshape(3, WINDOW, *tokens.shape[1:])
            many = scanned(getattr(randattn, f"{kind}_step"))
            calls = {n: in_turn(many, tokens, state) for n, state in states.items()}
            del states
            found = race(calls, wait=library.own.wait, rounds=_ROUNDS, sets=_SETS, number=SCANS[kind])
            each = {n: tuple(x / WINDOW for x in medians) for n, medians in found.items()}
            yield from _rows(library, kind, each, count, mode="scan")


def _rows(
    library: Library, kind: str, found: Mapping[int, Medians], count: Mapping[int, int], **more: str
) -> Iterator[Row]:
    for n, medians in found.items():
        features = _FEATURES if kind == "rfa" else None
        case = case_of(library, kind, n, OPTIONS[kind], features=features, **more)
        baseline = found[100] if n > 100 else None
        yield time_row("streaming", case, medians, HUNDREDTH, baseline, bytes=count[n])


def steps(library: Library) -> dict[str, Step]:
    """Return the timed steps: (q, k, v, state) to (result, state), compiled where the library compiles."""
    plain: dict[str, Step] = {
        "rfa": randattn.rfa_step,
        "eva": randattn.eva_step,
        CACHE: {"numpy": _numpy_cached, "torch": _torch_cached, "jax": _jax_cached()}[library.name],
    }
    if library.name != "jax":
        return plain
    jit = import_module("jax").jit
    return {kind: step if kind == CACHE else jit(step, donate_argnums=3) for kind, step in plain.items()}


def scanned(step: Step) -> Step:
    """Return a step of many tokens (tokens, ...) in one program of JAX."""
    jax = import_module("jax")

    def many(q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        def one(state: Any, token: tuple[Array, ...]) -> tuple[Any, Array]:
            out, state = step(*token, state)
            return state, out

        state, out = jax.lax.scan(one, state, (q, k, v))
        return out, state

    many_jitted: Step = jax.jit(many, donate_argnums=3)
    return many_jitted


def in_turn(step: Step, token: Array, state: Any) -> Callable[[], Array]:
    """Return a call without arguments; each call starts from the last one's state."""
    q, k, v = token
    held = [state]

    def call() -> Array:
        out, held[0] = step(q, k, v, held[0])
        return out

    return call


# Exact attention of one query, by the fastest way on one thread: the library's own function, or plain
# formulas. The last place of the cache is the token's.


def _numpy_cached(q: Array, k: Array, v: Array, cache: tuple[Array, Array]) -> tuple[Array, Any]:
    keys, values = cache
    keys[..., -1:, :], values[..., -1:, :] = k, v
    logits = (_SIZE**-0.5 * q) @ np.swapaxes(keys, -1, -2)
    logits -= np.max(logits, axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    return (logits @ values) / np.sum(logits, axis=-1, keepdims=True), cache


def _torch_cached(q: Array, k: Array, v: Array, cache: tuple[Array, Array]) -> tuple[Array, Any]:
    keys, values = cache
    keys[..., -1:, :], values[..., -1:, :] = k, v
    return import_module("torch").nn.functional.scaled_dot_product_attention(q, keys, values), cache


def _jax_cached() -> Step:
    jax = import_module("jax")

    def put(cache: tuple[Array, Array], k: Array, v: Array) -> tuple[Array, ...]:
        return tuple(old.at[..., -1:, :].set(new) for old, new in zip(cache, (k, v), strict=True))

    def attend(q: Array, keys: Array, values: Array) -> Array:
        logits = keys @ (_SIZE**-0.5 * q).swapaxes(-1, -2)
        return jax.nn.softmax(logits.swapaxes(-1, -2), axis=-1) @ values

    # In one program both would take seven times as long: XLA's products are slow beside the update. Its own
    # attention, which is for many queries, takes four times as long as these products.
    put, attend = jax.jit(put, donate_argnums=0), jax.jit(attend)

    def step(q: Array, k: Array, v: Array, cache: tuple[Array, Array]) -> tuple[Array, Any]:
        cache = put(cache, k, v)
        return attend(q, *cache), cache

    return step


def size(state: Any) -> int:
    """Count the bytes of a tuple of arrays."""
    total: int = sum(x.nbytes for x in state)
    return total


def _held(library: Library, kind: str, arrived: Arrived) -> Any:
    """Return the state in arrays of its own: JAX's steps consume them, a cache's steps write to them."""
    if kind == CACHE:
        return tuple(library.own.asarray(x, "float32") for x in arrived.cache)
    state = getattr(arrived, kind)
    return type(state)(*(library.own.copy(x) for x in state)) if library.name == "jax" else state


def arrive(library: Library, positions: tuple[int, ...], seconds: list[float]) -> dict[int, Arrived]:
    """Return the states at these positions, made chunk by chunk; append the chunks' times to `seconds`."""
    noise = library.own.asarray(_normal(_NOISE, 1, _FEATURES)[0], "float32")
    compiled = library.compile[library.mode]
    begin = compiled(lambda *x: randattn.rfa(*x, noise=noise, is_causal=True, return_state=True)[1])
    go_on = compiled(lambda *x: randattn.rfa_step(*x)[1])
    caches = {n: np.empty((2, 1, _HEADS, n + 1, _SIZE), np.float32) for n in positions}
    groups_of = compiled(partial(_eva_of, places=CHUNK))
    found: dict[int, Arrived] = {}
    before: tuple[randattn.RFAState, ...] = ()
    groups: list[randattn.EVAState] = []
    for start in range(0, max(positions), CHUNK):
        drawn = _normal(start, 3, CHUNK)
        tokens = [library.own.asarray(x, "float32") for x in drawn]
        for n, cache in caches.items():
            here = cache[..., start : min(n, start + CHUNK), :]
            here[...] = drawn[1:, ..., : here.shape[-2], :]
            if start < n <= start + CHUNK:
                part = [x[..., : n - start, :] for x in tokens]
                eva = joined(library, groups, _eva_of(*part, places=n - start + _ROOM))
                rfa = go_on(*part, *before) if before else begin(*part)
                found[n] = Arrived(rfa, eva, (cache[0], cache[1]))
        began = time.perf_counter()
        state = go_on(*tokens, *before) if before else begin(*tokens)
        library.own.wait(state)
        if before or max(positions) <= CHUNK:
            seconds.append(time.perf_counter() - began)
        before = (state,)
        groups.append(groups_of(*tokens))
    return found


def _eva_of(*tokens: Array, places: int) -> randattn.EVAState:
    options = {"window": WINDOW, "is_causal": True, "return_state": True, "max_tokens": places}
    state: randattn.EVAState = randattn.eva(*tokens, **options)[1]
    return state


def joined(library: Library, runs: list[randattn.EVAState], last: randattn.EVAState) -> randattn.EVAState:
    """Return the state after several runs of tokens, all but the last of whole windows.

    Groups do not depend on each other. A call on all tokens would give the same state, and compute all their
    results too: at a million tokens, that is exact attention to 15,625 groups.
    """
    runs = [*runs, last]
    fields = {
        name: library.xp.concat([getattr(run, name) for run in runs], axis=-1 if name == "weight" else -2)
        for name in ("mean_key", "beta", "weight", "noise")
    }
    return last._replace(**fields, tokens=sum(run.tokens for run in runs))


def _normal(seed: Any, count: int, tokens: int = 1) -> np.ndarray:
    """Draw standard normal queries, keys, values."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 1, _HEADS, tokens, _SIZE), dtype=np.float32)


if __name__ == "__main__":
    main(sys.argv[1], quick="--quick" in sys.argv[2:])
