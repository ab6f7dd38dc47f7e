"""On `dask.distributed`, with two worker processes."""

from __future__ import annotations

import tracemalloc
from functools import partial

import dask.array as da
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster, wait

from randattn import eva, lara, rfa

N, D, CHUNK = 1 << 17, 32, 1 << 13

CALLS = {
    "rfa": partial(rfa, rng=0),
    "lara optimal": partial(lara, rng=0),
    "lara balance": partial(lara, weighting="balance", rng=0),
    "lara biased": partial(lara, weighting="biased", rng=0),
    "eva": partial(eva, rng=0),
    "eva, groups that windows cut": partial(eva, num_groups=50, rng=0),
}


@pytest.fixture(scope="module")
def client():
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        yield client


def normal(seeds, n, chunk):
    return [
        da.random.default_rng(seed).standard_normal((n, D), chunks=(chunk, D), dtype="float32")
        for seed in seeds
    ]


def halves(client, x):
    """The same array, half of its chunks in each process."""
    middle = x.shape[0] // 2
    placed = zip((x[:middle], x[middle:]), client.has_what(), strict=True)
    x = da.concatenate([client.persist(half, workers=[worker]) for half, worker in placed])
    wait(x)
    return x


def executed(dask_worker):
    """The tasks that a worker has done."""
    return dask_worker.state.executed_count


@pytest.mark.parametrize("number", range(len(CALLS)), ids=CALLS)
def test_two_processes(client, number):
    """The same as in this one, by both of them, each of which has half of the tokens."""
    function = [*CALLS.values()][number]
    q, k, v = normal(range(3 * number, 3 * number + 3), 3000, 375)
    expected = function(*(x.compute(scheduler="synchronous") for x in (q, k, v)))
    q, k, v = (halves(client, x) for x in (q, k, v))
    before = client.run(executed)
    out = function(q, k, v).compute()
    after = client.run(executed)
    assert len(after) == 2
    assert all(after[worker] > before[worker] for worker in after)
    assert np.linalg.norm(out - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["rfa", "eva"])
def test_peak_memory(client, name):
    """Each process takes a few times the keys' bytes, how many depends on which tasks meet: 4 to 60 MiB.

    A dense matrix of logits has 64 GiB.
    """
    q, k, v = normal(range(100, 103), N, CHUNK)
    mean = CALLS[name](q, k, v).mean(axis=0)
    client.run(tracemalloc.start)
    assert np.isfinite(mean.compute()).all()
    peaks = [peak for _, peak in client.run(tracemalloc.get_traced_memory).values()]
    client.run(tracemalloc.stop)
    assert len(peaks) == 2

    assert max(peaks) < 8 * k.nbytes
