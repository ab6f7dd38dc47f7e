"""The streaming session: every step is that of the tokens before it, and its rows reach file and plot."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import randattn
from benchmarks import rows, streaming
from benchmarks.app import app
from benchmarks.baselines import open_library
from benchmarks.sizes import sizes_for

LIBRARIES = [
    pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason="not installed")
    )
    for name in streaming.LIBRARIES
]
N = 150


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """A library, and chunks of a window."""
    monkeypatch.setattr(streaming, "CHUNK", streaming.WINDOW)
    return open_library(request.param)


def tokens(count):
    """Queries, keys, values of the chunks beside each other."""
    chunks = [streaming._normal(start, 3, streaming.CHUNK) for start in range(0, count, streaming.CHUNK)]
    return np.concatenate(chunks, axis=-2)[..., :count, :]


def test_a_step_is_that_of_all_tokens_before_it(library):
    """In several chunks, whose groups are joined, and with a step that is compiled where the library does."""
    seconds = []
    arrived = streaming.arrive(library, (1, N), seconds)[N]
    assert len(seconds) == 2
    steps = streaming.steps(library)
    last = streaming._normal(5, 3)
    everything = np.concatenate([tokens(N), last], axis=-2)
    noise = streaming._normal(streaming._NOISE, 1, streaming._FEATURES)[0]
    expected = {
        "rfa": randattn.rfa(*everything, noise=noise, is_causal=True),
        "eva": randattn.eva(*everything, window=streaming.WINDOW, is_causal=True),
        streaming.CACHE: randattn.softmax_attention(*everything, is_causal=True),
    }
    for kind, whole in expected.items():
        state = streaming._held(library, kind, arrived)
        arrays = [library.own.asarray(x, "float32") for x in last]
        out, after = steps[kind](*arrays, state)
        np.testing.assert_allclose(np.asarray(out), whole[..., -1:, :], rtol=2e-3, atol=2e-4)
        if kind != streaming.CACHE:
            assert int(getattr(after, "tokens", N + 1)) == N + 1
            assert streaming.size(after) > 0


def test_calls_go_on_from_their_last_state(library):
    state = streaming.arrive(library, (3,), [])[3].eva
    token = library.own.asarray(streaming._normal(5, 3), "float32")
    seen = []

    def step(q, k, v, state):
        out, state = randattn.eva_step(q, k, v, state)
        seen.append(int(state.tokens))
        return out, state

    call = streaming.in_turn(step, token, state)
    for _ in range(3):
        call()
    assert seen == [4, 5, 6]


def test_a_scan_is_its_steps():
    pytest.importorskip("jax")
    library = open_library("jax")
    arrived = streaming.arrive(library, (3,), [])[3]
    several = library.own.asarray(streaming._normal(5, 3 * 4), "float32").reshape(3, 4, 1, 8, 1, 64)
    for kind, step in (("rfa", randattn.rfa_step), ("eva", randattn.eva_step)):
        out, _ = streaming.scanned(step)(*several, streaming._held(library, kind, arrived))
        state = getattr(arrived, kind)
        for n in range(4):
            expected, state = step(*several[:, n], state)
            np.testing.assert_allclose(np.asarray(out[n]), np.asarray(expected), rtol=2e-4, atol=2e-5)


def test_states_of_rfa_have_one_size_and_caches_grow():
    arrived = streaming.arrive(open_library("numpy"), (1, 40, 100), [])
    count = {
        n: (streaming.size(a.rfa), streaming.size(a.eva), streaming.size(a.cache)) for n, a in arrived.items()
    }
    assert len({rfa for rfa, _, _ in count.values()}) == 1
    assert [cache for _, _, cache in count.values()] == [2 * 8 * 64 * 4 * (n + 1) for n in (1, 40, 100)]
    assert count[1][1] < count[100][1]


def test_every_eva_step_has_its_place():
    """So many steps follow each position: beyond its places the results would be NaN."""
    timed = streaming._ROUNDS * streaming._SETS + 1
    assert timed * streaming.NUMBER["eva"] <= streaming._ROOM
    assert timed * streaming.SCANS["eva"] * streaming.WINDOW <= streaming._ROOM
    assert sizes_for("numpy").streaming[-1] == 1_000_000


def test_the_session_writes_rows_and_a_plot(tmp_path, monkeypatch):
    """With the process of its own on NumPy alone, and few steps."""
    monkeypatch.setattr(streaming, "_ROUNDS", 1)
    monkeypatch.setattr(streaming, "CHUNK", streaming.WINDOW)
    monkeypatch.setattr(streaming, "NUMBER", dict.fromkeys(streaming.NUMBER, 1))

    def here(name, *, quick):
        assert quick
        return list(streaming.measure(open_library(name), (1, 100, N), lambda _: None))

    monkeypatch.setattr(streaming, "in_own_process", here)
    done = CliRunner().invoke(
        app, ["streaming", "numpy", "--quick", "--output", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    found = rows.read(tmp_path / "streaming-cpu.json")
    assert {row.measure for row in found} == {"streaming", "prefill"}
    steps = [row for row in found if row.measure == "streaming"]
    assert {(row.case.estimator, row.case.tokens) for row in steps} == {
        (kind, n) for kind in streaming.OPTIONS for n in (1, 100, N)
    }
    for row in steps:
        assert row.seconds > 0
        assert row.bytes > 0
        assert (row.ratio is not None) == (row.case.tokens > 100)
    assert (tmp_path / "streaming-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_rows_come_out_of_the_process(monkeypatch):
    found = [rows.Row("prefill", rows.Case("numpy", "cpu", "rfa", 5), seconds=1.0)]
    text = f"import json; print('first'); print({json.dumps([row.to_json() for row in found])!r})"
    run = streaming.subprocess.run
    monkeypatch.setattr(
        streaming.subprocess, "run", lambda *_, **options: run((sys.executable, "-c", text), **options)
    )
    assert streaming.in_own_process("numpy", quick=True) == found
