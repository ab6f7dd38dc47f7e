"""The recipes of docs/torch_distributed.md, in two processes: results, gradients, and what travels."""

import contextlib
import io
import re
import runpy
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from randattn import eva, lara, rfa

torch = pytest.importorskip("torch")
dist = torch.distributed
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

PAGE = Path(__file__).parents[3] / "docs" / "torch_distributed.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
WORLD, SEED = 2, 3
LEAD, N, D, E = (2, 3), 96, 4, 5
# The first rank has more tokens, the second nothing but padding.
UNEVEN = 70
MASK = torch.arange(N) < 60

# Each recipe: its name in the page, its options, the one-process call, and how many numbers a rank sends.
CASES = {
    "rfa": ("sharded_rfa", {"num_samples": 7}, rfa, {}, 7 * (E + 1)),
    "rfa-causal": ("sharded_causal_rfa", {"num_samples": 7}, rfa, {"is_causal": True}, 7 * (E + 1)),
    **{
        f"lara-{weighting}": (
            "sharded_lara",
            {"num_landmarks": 8, "weighting": weighting},
            *(lara, {}, 4 * 2 * D + 8 * (E + 1)),
        )
        for weighting in ("balance", "biased")
    },
    **{
        f"lara-optimal-{normalize}": (
            "sharded_lara",
            {"num_landmarks": 8, "weighting": "optimal", "normalize": normalize},
            *(lara, {}, 4 * 2 * D + 8 * (E + 1) + more),
        )
        for normalize, more in (("landmarks", 0), ("queries", 8 * 2))
    },
    # A group of several windows, and of one.
    "eva": ("sharded_eva", {"num_groups": 4, "window": 6}, eva, {}, 2 * (D + E)),
    "eva-whole-groups": ("sharded_eva", {"num_groups": 8, "window": 12}, eva, {}, 4 * (D + E)),
}


def tokens(n):
    """Queries, keys and values, and the weights of a sum of the outputs."""
    rng = np.random.default_rng(0)
    return [torch.as_tensor(rng.standard_normal((*LEAD, n, size))) for size in (D, D, E, E)]


def results(function, q, k, v, weights):
    """The output and the gradients, in float64."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    # A causal recipe gives its state, too.
    out = out[0] if isinstance(out, tuple) else out
    gradients = torch.autograd.grad((weights * out).sum(), inputs)
    return [x.detach().numpy() for x in (out, *gradients)]


def shards(arrays):
    return zip(*(x.chunk(WORLD, dim=-2) for x in arrays), strict=True)


def count_what_travels(sent):
    """Write down the bytes of each message; refuse the collectives that are not counted."""
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def counted_gather(parts, own):
        sent["forward"].append(own.nbytes)
        gather(parts, own)

    def counted_scatter(own, parts):
        sent["backward"].append(own.nbytes)
        scatter(own, parts)

    def refused(*args, **options):
        raise AssertionError("a collective that is not counted")

    for name in (
        *("all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "broadcast", "gather"),
        *("isend", "reduce", "scatter", "send"),
    ):
        setattr(dist, name, refused)
    dist.all_gather, dist.reduce_scatter = counted_gather, counted_scatter


def start(rank, directory):
    torch.set_num_threads(1)
    # What the recipes call must not be deprecated.
    warnings.simplefilter("error")
    store = f"file://{directory}/store"
    # Where one process waits for what the other never sends, fail soon.
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=WORLD)


def worker(rank, directory):
    """All that the page has, on one rank's tokens; what it finds, to a file."""
    start(rank, directory)
    page = runpy.run_path(f"{directory}/example.py", run_name="example")
    sent = {}
    count_what_travels(sent)
    found = run_cases(page, rank, sent)

    *_, state = page["sharded_causal_rfa"](*list(shards(tokens(N)[:3]))[rank], num_samples=7, seed=SEED)
    found.update({f"state {field}": x.numpy() for field, x in state._asdict().items()})

    own = [x.split([UNEVEN, N - UNEVEN], dim=-2)[rank] for x in tokens(N)[:3]]
    mask = MASK.split([UNEVEN, N - UNEVEN])[rank]
    found["uneven"] = page["sharded_rfa"](*own, num_samples=7, seed=SEED, key_mask=mask).numpy()

    # The page's own comparison, which closes the group. It is open already.
    dist.init_process_group = lambda backend: None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        page["main"]()
    np.savez(f"{directory}/rank{rank}.npz", printed=printed.getvalue(), **found)


def run_cases(page, rank, sent):
    """Every recipe, for two lengths: results, gradients, and the bytes of the messages."""
    found = {}
    for name, (recipe, options, *_) in CASES.items():
        function = partial(page[recipe], **options, seed=SEED)
        for n in (N, 4 * N):
            sent.update(forward=[], backward=[])
            own = list(shards(tokens(n)))[rank]
            for i, x in enumerate(results(function, *own)):
                found[f"{name} {n} {i}"] = x
            for way, sizes in sent.items():
                found[f"{name} {n} {way}"] = np.asarray(sizes)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Give the results of the ranks, rank by rank."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "example.py").write_text("\n\n".join(BLOCKS))
    torch.multiprocessing.spawn(worker, (directory,), nprocs=WORLD)
    return [np.load(directory / f"rank{rank}.npz") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_process_does(found, name):
    """Results and gradients, of each rank's own tokens."""
    _, options, function, more, _ = CASES[name]
    whole = results(partial(function, **options, **more, rng=SEED), *tokens(N))
    for i, x in enumerate(whole):
        ours = np.concatenate([rank[f"{name} {N} {i}"] for rank in found], axis=-2)
        assert np.linalg.norm(x) > 0
        np.testing.assert_allclose(ours, x, rtol=0, atol=1e-12 * np.abs(x).max())


@pytest.mark.parametrize("name", CASES)
def test_what_travels_does_not_grow(found, name):
    *_, numbers = CASES[name]
    for rank in found:
        for n in (N, 4 * N):
            forward, backward = (rank[f"{name} {n} {way}"] for way in ("forward", "backward"))
            assert forward.sum() == 8 * 6 * numbers
            # The gradient of each message, in reverse.
            assert list(backward) == list(forward[::-1])


def test_the_last_rank_has_the_state_of_the_whole_sequence(found):
    _, whole = rfa(*tokens(N)[:3], num_samples=7, rng=SEED, is_causal=True, return_state=True)
    for field, x in whole._asdict().items():
        np.testing.assert_allclose(found[-1][f"state {field}"], x.numpy(), rtol=1e-12, err_msg=field)


def test_ranks_may_differ_in_tokens_and_padding(found):
    whole = rfa(*tokens(N)[:3], num_samples=7, rng=SEED, key_mask=MASK).numpy()
    ours = np.concatenate([rank["uneven"] for rank in found], axis=-2)
    np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-12 * np.abs(whole).max())


def test_the_page_compares_itself(found):
    for rank in found:
        lines = str(rank["printed"]).splitlines()
        assert [line.rpartition(" ")[0] for line in lines] == ["rfa", "causal rfa", "lara", "eva"]
        assert all(float(line.split()[-1]) < 1e-12 for line in lines)
