"""Send a million tokens through RFA, LARA and EVA, chunk by chunk, on two worker processes.

``python docs/examples/dask_million_tokens.py`` prints the seconds and the peak memory of each.
"""

import argparse
import threading
import time

import dask
import dask.array as da
import psutil
from dask.distributed import Client, LocalCluster, wait

from randattn import eva, lara, rfa

ESTIMATORS = {
    "rfa": lambda q, k, v: rfa(q, k, v, num_samples=64, rng=0),
    "lara balance": lambda q, k, v: lara(q, k, v, num_landmarks=50, weighting="balance", rng=0),
    "lara optimal": lambda q, k, v: lara(q, k, v, num_landmarks=50, rng=0),
    # Windows of 50 tokens in groups of 20,000 in chunks of 40,000: no border lies within a smaller piece.
    "eva": lambda q, k, v: eva(q, k, v, num_groups=50, window=50, rng=0),
    # Windows cut groups, and chunks cut windows: tokens are gathered from the neighbouring chunks.
    "eva, uneven": lambda q, k, v: eva(q, k, v, num_groups=64, window=64, rng=0),
}


class Peak:
    """The most memory of processes, sampled: of each of them, and of all together."""

    def __init__(self, processes):
        self.processes, self.running = processes, True
        self.of_each, self.together = [0] * len(processes), 0

    def __enter__(self):
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    def sample(self):
        """Sample the memory until the end of the block."""
        while self.running:
            now = [process.memory_info().rss for process in self.processes]
            self.of_each = [max(pair) for pair in zip(self.of_each, now, strict=True)]
            self.together = max(self.together, sum(now))
            time.sleep(0.02)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=40_000)
    parser.add_argument("--features", type=int, default=32)
    args = parser.parse_args()

    shape, chunks = (args.tokens, args.features), (args.chunk, args.features)
    # The graph of "eva, uneven" has 10 MiB: the places of a million tokens.
    dask.config.set({"distributed.admin.large-graph-warning-threshold": "20MiB"})
    mib, size = 1 << 20, 4 * args.tokens * args.features
    print(f"{args.tokens} tokens in chunks of {args.chunk}, {args.features} features, float32")
    print(f"q, k and v {3 * size / mib:.0f} MiB, N x N logits {4 * args.tokens**2 / mib:.0f} MiB")
    print(f"{'':14}{'seconds':>8}{'tasks':>8}{'worker 0':>10}{'worker 1':>10}{'together':>10}  (peak MiB)")
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        processes = [psutil.Process(pid) for pid in client.run(lambda: __import__("os").getpid()).values()]

        def report(name, start, tasks, peak):
            each = "".join(f"{x / mib:10.0f}" for x in (*peak.of_each, peak.together))
            print(f"{name:14}{time.perf_counter() - start:8.1f}{tasks:8}{each}")

        with Peak(processes) as idle:
            time.sleep(0.1)
        report("idle", time.perf_counter(), 0, idle)
        for seed, (name, estimator) in enumerate(ESTIMATORS.items()):
            start = time.perf_counter()
            # New arrays for each estimator: the scheduler may still hold the chunks of the last ones.
            rng = da.random.default_rng(seed)
            q, k, v = (rng.standard_normal(shape, chunks=chunks, dtype="float32") for _ in range(3))
            with Peak(processes) as peak:
                mean = estimator(q, k, v).mean(axis=0)
                tasks = len(mean.__dask_graph__())
                wait(mean.persist())
            report(name, start, tasks, peak)


if __name__ == "__main__":
    main()
