"""Bad options: an error that names the option, what came and what was expected."""

import numpy as np
import pytest

from randattn import adaptive_eva, attend, eva, lara, ra, rfa, softmax_attention
from tests.helpers.refusals import ESTIMATOR_FUNCTIONS, D, N, inputs, refuses


@pytest.mark.parametrize("name", ["softmax", "rfa", "ra", "lara", "eva"])
def test_scales(lib, name):
    function, options = ESTIMATOR_FUNCTIONS[name]
    arrays = lib.arrays(*inputs())
    for scale in (0, -1.0, np.nan, np.inf):
        with refuses(ValueError, "scale", "positive finite"):
            function(*arrays, scale=scale, **options)
    for scale in ("1", True, [1.0]):
        with refuses(TypeError, "scale", "real number"):
            function(*arrays, scale=scale, **options)


def test_ra_has_no_causal_form(lib):
    with pytest.raises(NotImplementedError, match="is_causal: ra has no causal form"):
        ra(*lib.arrays(*inputs()), is_causal=True, rng=0)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(softmax_attention, "at most as many queries as keys (5)"), (attend, "as many keys as queries (6)")],
)
def test_causal_with_other_keys_than_queries(lib, function, expected):
    with refuses(ValueError, "is_causal", expected):
        function(*lib.arrays(*inputs()), is_causal=True)


COUNTS = [
    (rfa, "num_samples"),
    (ra, "num_samples"),
    (lara, "num_landmarks"),
    (eva, "num_groups"),
    (eva, "group_size"),
]


@pytest.mark.parametrize(("function", "name"), COUNTS)
def test_counts(lib, function, name):
    arrays = lib.arrays(*inputs())
    options = {"window": 0} if function is eva else {"rng": 0}
    for value in (0, -3):
        with refuses(ValueError, name, "at least 1", str(value)):
            function(*arrays, **{name: value}, **options)
    for value in (2.0, "4", True):
        with refuses(TypeError, name, "integer"):
            function(*arrays, **{name: value}, **options)


def test_windows(lib):
    q, k, v = inputs()
    with refuses(ValueError, "window", "queries (6)", "keys (5)", "64"):
        eva(*lib.arrays(q, k, v))
    same = lib.arrays(q, q, q)
    with refuses(ValueError, "window", "at least 0", "-1"):
        eva(*same, window=-1)
    with refuses(TypeError, "window", "2.5"):
        eva(*same, window=2.5)
    with refuses(ValueError, "window", "fits the grid (2, 3)", "(3, 3)"):
        eva(*same, grid=(2, 3), window=(3, 3))
    bias = lib.asarray(np.zeros((3, 3)))
    with refuses(ValueError, "window_bias", "(..., 2, 2)", "(3, 3)"):
        eva(*same, window=2, window_bias=bias)
    with refuses(ValueError, "window_bias", "a window with it"):
        eva(*same, window=0, window_bias=bias)
    with refuses(NotImplementedError, "window_bias", "return_state"):
        eva(*same, window=3, window_bias=bias, is_causal=True, return_state=True)
    with refuses(ValueError, "group_size", "num_groups or group_size"):
        eva(*same, num_groups=2, group_size=3)


@pytest.mark.parametrize("function", [lara, eva])
def test_grids(lib, function):
    q, k, v = inputs(m=N)
    arrays = lib.arrays(q, k, v)
    for grid, texts in (
        ((2, 2), ("queries (6)", "(2, 2)")),
        ((1, 1, 1, 6), ("one, two or three sizes",)),
        (6, ("one, two or three sizes", "6")),
        ((2, -3), ("at least 1", "-3")),
    ):
        with refuses(ValueError, "grid", *texts):
            function(*arrays, grid=grid)
    with refuses(TypeError, "grid", "integer"):
        function(*arrays, grid=(2.0, 3.0))
    name = "num_landmarks" if function is lara else "num_groups"
    with refuses(ValueError, name, "fits the grid (2, 3)", "(2, 2, 1)"):
        function(*arrays, grid=(2, 3), **{name: (2, 2, 1)})
    with refuses(ValueError, name, "fits the grid (2, 3)", "(3, 2)"):
        function(*arrays, grid=(2, 3), **{name: (3, 2)})


def test_a_grid_wants_as_many_queries_as_keys(lib):
    with refuses(ValueError, "grid", "queries (6)", "keys (5)"):
        lara(*lib.arrays(*inputs()), grid=(6,))


OPTIONS = [
    (rfa, "features", "fourier", "'positive', 'optimal', 'trigonometric'"),
    (rfa, "draws", "sobol", "'iid', 'orthogonal'"),
    (lara, "weighting", "best", "'optimal', 'balance', 'biased'"),
    (lara, "normalize", "keys", "'queries', 'landmarks'"),
    (eva, "group_weight", None, "'size', 'unit'"),
]


@pytest.mark.parametrize(("function", "name", "value", "known"), OPTIONS)
def test_unknown_option_values(lib, function, name, value, known):
    with refuses(ValueError, name, f"expected one of {known}", repr(value)):
        function(*lib.arrays(*inputs(m=N)), rng=0, **{name: value})


@pytest.mark.parametrize(("function", "name"), [(lara, "alpha"), (lara, "noise_scale"), (eva, "noise_scale")])
def test_factors(lib, function, name):
    arrays = lib.arrays(*inputs(m=N))
    for value in (-1.0, np.nan, np.inf):
        with refuses(ValueError, name, "at least 0"):
            function(*arrays, **{name: value})
    with refuses(TypeError, name, "real number", "str"):
        function(*arrays, **{name: "1"})


DRAWN = [(rfa, (3, D), "S, D"), (lara, (3, D), "C, D"), (eva, (3, D), "C, D"), (ra, (2, N, D), "S, N, D")]


@pytest.mark.parametrize(("function", "shape", "axes"), DRAWN)
def test_noise(lib, function, shape, axes):
    arrays = lib.arrays(*inputs(m=N))
    more = {"components": lib.asarray(np.full((2, N), 0.5))} if function is ra else {}
    with refuses(ValueError, "noise", "either rng or noise, got both"):
        function(*arrays, rng=0, noise=lib.asarray(np.zeros(shape)), **more)
    for bad in ((*shape[:-1], D + 1), (*shape[:-1], 1), (D,), (5, *shape)):
        with refuses(ValueError, "noise", str(bad) if bad != (5, *shape) else "(5,)"):
            function(*arrays, noise=lib.asarray(np.zeros(bad)), **more)
    count = {rfa: "num_samples", ra: "num_samples", lara: "num_landmarks", eva: "num_groups"}[function]
    with refuses(ValueError, "noise", f"(..., {axes})", str(shape)):
        function(*arrays, noise=lib.asarray(np.zeros(shape)), **{count: 4}, **more)
    with refuses(TypeError, "noise", "array", "list"):
        function(*arrays, noise=np.zeros(shape).tolist(), **more)
    with refuses(TypeError, "noise", "real floating", "int"):
        function(*arrays, noise=lib.asarray(np.zeros(shape, dtype=np.int64)), **more)


@pytest.mark.parametrize("function", [rfa, ra])
def test_draws_are_needed(lib, function):
    with refuses(ValueError, "rng", "expected rng or noise, got neither"):
        function(*lib.arrays(*inputs()))


def test_ra_wants_noise_and_components_together(lib):
    arrays = lib.arrays(*inputs())
    noise, components = lib.asarray(np.zeros((1, N, D))), lib.asarray(np.zeros((1, N)))
    for options in ({"noise": noise}, {"components": components}, {"rng": 0, "components": components}):
        with refuses(ValueError, "components", "noise and components together"):
            ra(*arrays, **options)
    with refuses(ValueError, "components", "(..., S, N)"):
        ra(*arrays, noise=noise, components=lib.asarray(np.zeros((1, N + 1))))


@pytest.mark.parametrize("function", [rfa, ra, lara, eva])
def test_sources_of_draws(lib, function):
    arrays = lib.arrays(*inputs(m=N))
    with refuses(ValueError, "rng", "at least 0", "-1"):
        function(*arrays, rng=-1)
    for bad in (True, 1.5, "0", np.random.RandomState(0), np.random.Philox(0), lib.asarray(np.zeros(2))):
        with refuses(TypeError, "rng", "expected an int seed", type(bad).__name__):
            function(*arrays, rng=bad)
    if lib.name in ("torch", "jax", "cupy"):
        with refuses(TypeError, "rng", "the arrays' own library", "numpy.Generator"):
            function(*arrays, rng=np.random.default_rng(0))


@pytest.mark.only("torch")
def test_a_generator_on_another_device(lib):
    arrays = lib.arrays(*inputs())
    assert rfa(*(x.to("meta") for x in arrays), rng=lib.xp.Generator()).device.type == "meta"
    if lib.xp.cuda.is_available():
        other = "cpu" if lib.device.type == "cuda" else "cuda"
        with refuses(ValueError, "rng", "on the device of q", other):
            rfa(*arrays, rng=lib.xp.Generator(other))


@pytest.mark.parametrize("function", [lara, eva])
def test_landmarks(lib, function):
    q, k, v = inputs(m=N)
    arrays = lib.arrays(q, k, v)
    name = "num_landmarks" if function is lara else "num_groups"
    good = lib.asarray(q[:, :3])
    for bad, kind, argument, texts in (
        (good, TypeError, "landmarks", ("pair",)),
        ((good,), TypeError, "landmarks", ("pair",)),
        ((good, lib.asarray(k[:, :2])), ValueError, "landmarks[0]", ("(..., 2, 4)", "(2, 3, 4)")),
        ((good, lib.asarray(k[:, :3, :2])), ValueError, "landmarks[1]", ("(..., 3, 4)", "(2, 3, 2)")),
        ((good, q[:, :3].tolist()), TypeError, "landmarks[1]", ("array", "list")),
        ((good, lib.asarray(np.zeros((5, 3, 4)))), ValueError, "landmarks[1]", ("leading axes", "(5,)")),
    ):
        with refuses(kind, argument, *texts):
            function(*arrays, landmarks=bad)
    with refuses(ValueError, "landmarks[0]", "(..., 4, 4)", "(2, 3, 4)"):
        function(*arrays, landmarks=(good, good), **{name: 4})


def test_flags(lib):
    arrays = lib.arrays(*inputs(m=N))
    for function, name in (
        (softmax_attention, "is_causal"),
        (softmax_attention, "enable_gqa"),
        (attend, "is_causal"),
        (rfa, "is_causal"),
        (lara, "is_causal"),
        (eva, "is_causal"),
        (lara, "mix_keys"),
        (lara, "antithetic"),
        (eva, "disjoint"),
    ):
        for value, shown in (
            ("False", "'False'"),
            (1, "1"),
            (None, "None"),
            (np.zeros(2, dtype=bool), "(2,)"),
        ):
            with refuses(TypeError, name, "expected True or False", shown):
                function(*arrays, **{name: value})
        function(*arrays, **{name: np.bool_(False)}, **({"rng": 0} if function is rfa else {}))


def test_tuples_count_on_grids_alone(lib):
    with refuses(TypeError, "num_samples", "integer", "tuple"):
        rfa(*lib.arrays(*inputs()), num_samples=(2, 2), rng=0)


@pytest.mark.parametrize(
    ("function", "options", "name", "need"),
    [
        (rfa, {"draws": "orthogonal", "noise": True}, "draws", "rng"),
        (lara, {"alpha": 2.0, "weighting": "balance"}, "alpha", "weighting='optimal'"),
        (lara, {"normalize": "landmarks", "weighting": "biased"}, "normalize", "weighting='optimal'"),
        (lara, {"antithetic": True}, "antithetic", "rng or noise"),
        (lara, {"noise_scale": 0.5}, "noise_scale", "rng or noise"),
        (lara, {"window": 4}, "window", "is_causal=True"),
        (eva, {"noise_scale": 0.5}, "noise_scale", "rng or noise"),
        (eva, {"window": 0, "disjoint": False}, "disjoint", "a window"),
        (adaptive_eva, {"max_tokens": 9}, "max_tokens", "return_state=True"),
    ],
)
def test_an_option_without_effect(lib, function, options, name, need):
    q, k, v = lib.arrays(*inputs(m=N))
    if "noise" in options:
        options = {**options, "noise": lib.asarray(np.zeros((4, D)))}
    with refuses(ValueError, name, need):
        function(q, k, v, **options)
