"""Bad input: an error that names the argument, what came and what was expected."""

import re
from functools import partial

import numpy as np
import pytest

from randattn import attend, eva, lara, merge, ra, rfa, softmax_attention
from tests.helpers.forms import ESTIMATORS

N, M, D, E = 6, 5, 4, 3
ESTIMATOR_FUNCTIONS = {
    "softmax": (softmax_attention, {}),
    "rfa": (rfa, {"rng": 0}),
    "ra": (ra, {"rng": 0}),
    "lara": (lara, {}),
    "eva": (eva, {"window": 0}),
    "attend": (attend, {}),
}


def inputs(n=N, m=M):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in ((2, n, D), (2, m, D), (2, m, E))]


def refuses(kind, argument, *texts):
    """The message starts with the argument and has these texts."""
    return pytest.raises(kind, match=re.escape(f"{argument}: ") + ".*" + ".*".join(map(re.escape, texts)))


@pytest.fixture(params=ESTIMATOR_FUNCTIONS)
def estimator(request):
    function, options = ESTIMATOR_FUNCTIONS[request.param]
    return lambda *arrays, **more: function(*arrays, **{**options, **more})


def test_lists_are_not_arrays(lib, estimator):
    q, k, v = lib.arrays(*inputs())
    with refuses(TypeError, "q", "expected an array", "list"):
        estimator([[1.0, 2.0]], k, v)
    with refuses(TypeError, "v", "expected an array", "list"):
        estimator(q, k, [[1.0]])
    with refuses(TypeError, "k", "expected an array", "NoneType"):
        estimator(q, None, v)


def test_another_librarys_array(lib, estimator):
    q, _k, v = lib.arrays(*inputs())
    if lib.name == "numpy":
        other = pytest.importorskip("array_api_strict").zeros((2, M, D))
    else:
        other = np.zeros((2, M, D))
    with refuses(TypeError, "k", "library of q"):
        estimator(q, other, v)


@pytest.mark.only("strict")
def test_another_device(lib, estimator):
    q, k, v = lib.arrays(*inputs())
    with refuses(ValueError, "v", "on the device of q", "device1", "CPU_DEVICE"):
        estimator(q, k, v.to_device(lib.xp.Device("CPU_DEVICE")))


@pytest.mark.only("torch")
def test_another_device_in_torch(lib, estimator):
    q, k, v = lib.arrays(*inputs())
    with refuses(ValueError, "k", "on the device of q", "meta"):
        estimator(q, k.to("meta"), v)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_dtypes_that_are_not_real_floating(lib, estimator, dtype):
    q, k, v = inputs()
    bad = lib.asarray(np.ones_like(k), dtype)
    with refuses(TypeError, "k", "expected a real floating dtype", dtype):
        estimator(lib.asarray(q), bad, lib.asarray(v))


def test_two_dtypes(lib, estimator):
    q, k, v = inputs()
    with refuses(TypeError, "v", "the dtype of q", "float64", "float32"):
        estimator(*lib.arrays(q, k), lib.asarray(v, "float32"))


def test_shapes(lib, estimator):
    q, k, v = inputs()
    for bad, argument, texts in (
        ((q[0, 0], k, v), "q", ("(..., N, D)", "(4,)")),
        ((q, k[..., :3], v), "k", ("4 features of q", "(2, 5, 3)")),
        ((q, k, v[:, :4]), "v", ("5 tokens of k", "(2, 4, 3)")),
        ((q, np.concatenate([k, k[:1]]), np.concatenate([v, v[:1]])), "k", ("leading axes", "(3,)")),
        ((q, k[:, :0], v[:, :0]), "k", ("at least one token", "(2, 0, 4)")),
        ((q[..., :0], k[..., :0], v), "q", ("at least one", "(2, 6, 0)")),
    ):
        with refuses(ValueError, argument, *texts):
            estimator(*lib.arrays(*bad))


def test_key_masks(lib, estimator):
    arrays = lib.arrays(*inputs())
    for mask, kind, texts in (
        (lib.asarray(np.ones(M)), TypeError, ("boolean", "float64")),
        (lib.asarray(np.ones(M - 1, dtype=bool)), ValueError, ("(..., 5)", "(4,)")),
        (lib.asarray(np.ones((3, M), dtype=bool)), ValueError, ("leading axes", "(3,)")),
        ([True] * M, TypeError, ("expected an array", "list")),
    ):
        with refuses(kind, "key_mask", *texts):
            estimator(*arrays, key_mask=mask)


def test_grouped_queries(lib, estimator):
    q, k, v = inputs()
    with refuses(ValueError, "q", "head axis"):
        estimator(*lib.arrays(q[0], k, v), enable_gqa=True)
    three, two = np.zeros((3, N, D)), np.zeros((2, M, D))
    with refuses(ValueError, "q", "multiple of the 2 heads", "3"):
        estimator(*lib.arrays(three, two, v), enable_gqa=True)
    with refuses(ValueError, "v", "2 heads of k"):
        estimator(*lib.arrays(q, k, v[:1]), enable_gqa=True)


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


@pytest.mark.parametrize("function", [softmax_attention, attend])
def test_causal_with_other_keys_than_queries(lib, function):
    with refuses(ValueError, "is_causal", "as many keys as queries (6)", "5"):
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


def test_query_masks(lib):
    arrays = lib.arrays(*inputs())
    for function, options in ((lara, {}), (eva, {"window": 0})):
        with refuses(ValueError, "query_mask", "(..., 6)", "(5,)"):
            function(*arrays, query_mask=lib.asarray(np.ones(M, dtype=bool)), **options)
        with refuses(TypeError, "query_mask", "boolean"):
            function(*arrays, query_mask=lib.asarray(np.ones(N)), **options)


def test_attend_biases(lib):
    arrays = lib.arrays(*inputs())
    with refuses(ValueError, "bias", "(..., 5)", "6"):
        attend(*arrays, lib.asarray(np.zeros(6)))
    with refuses(ValueError, "pair_bias", "(..., 6, 5)", "(5, 6)"):
        attend(*arrays, pair_bias=lib.asarray(np.zeros((M, N))))


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


@pytest.mark.only("numpy")
def test_masked_arrays(lib):
    q, k, v = inputs()
    with refuses(TypeError, "k", "dense", "masked", "key_mask"):
        softmax_attention(q, np.ma.masked_greater(k, 0), v)
    with refuses(TypeError, "key_mask", "dense", "masked"):
        softmax_attention(q, k, v, key_mask=np.ma.masked_array(np.ones(M, dtype=bool)))


def tensors_that_are_not_dense():
    """Make a PyTorch tensor of each kind, of a batch of sequences or of one."""
    import torch

    x = torch.ones(2, M, D)
    jagged = [x[0], x[1, :-1]]
    return {
        "sparse": x.to_sparse(),
        "sparse rows": x[0].to_sparse_csr(),
        "sparse columns": x[0].to_sparse_csc(),
        "nested": torch.nested.nested_tensor(jagged),
        "nested, jagged": torch.nested.nested_tensor(jagged, layout=torch.jagged),
        "MKL-DNN": x.to_mkldnn(),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "masked": torch.masked.masked_tensor(x, x > 0),
    }


# What PyTorch says of the kinds themselves: prototypes, beta, deprecated.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.only("torch")
def test_tensors_that_are_not_dense(lib, estimator):
    """By name, before an operation of PyTorch's fails within; as keys, and as all arrays."""
    for kind, bad in tensors_that_are_not_dense().items():
        q, _, v = lib.arrays(*(x if bad.ndim == 3 else x[0] for x in inputs()), dtype="float32")
        with refuses(TypeError, "k", "dense", kind.split()[0].rstrip(",")):
            estimator(q, bad, v)
        with refuses(TypeError, "q", "dense", kind.split()[0].rstrip(",")):
            estimator(bad, bad, bad)


@pytest.mark.only("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_entries_whose_squares_overflow(lib, dtype):
    """One error instead of a warning for each operation, also where warnings are errors."""
    large = 1e20 if dtype == "float32" else 1e200
    for name, functions in {
        "q": (lara, partial(lara, weighting="balance")),
        "k": (partial(rfa, rng=0), partial(ra, rng=0), lara, partial(eva, num_groups=4, window=0)),
    }.items():
        arrays = dict(zip("qkv", lib.arrays(*inputs(), dtype=dtype), strict=True))
        arrays[name] = arrays[name].copy()
        arrays[name][0, 3] = large
        for function in functions:
            with refuses(ValueError, name, "expected entries up to", dtype):
                function(*arrays.values())
        # Their products with others are within the range.
        assert np.all(np.isfinite(softmax_attention(*arrays.values())))
        with np.errstate(all="ignore"):
            assert not np.all(np.isfinite(functions[-1](*arrays.values())))


def test_tuples_count_on_grids_alone(lib):
    with refuses(TypeError, "num_samples", "integer", "tuple"):
        rfa(*lib.arrays(*inputs()), num_samples=(2, 2), rng=0)


def test_further_arrays_must_broadcast_with_each_other(lib):
    q, k, v = (x[0] for x in inputs(m=N))
    arrays = lib.arrays(q, k, v)
    pair = (lib.asarray(np.zeros((2, 3, D))), lib.asarray(np.zeros((5, 3, D))))
    with refuses(ValueError, "landmarks[1]", "(2,)", "(5,)"):
        lara(*arrays, landmarks=pair)
    with refuses(ValueError, "components", "(2,)", "(5,)"):
        ra(*arrays, noise=lib.asarray(np.zeros((2, 1, N, D))), components=lib.asarray(np.zeros((5, 1, N))))
    with refuses(ValueError, "pair_bias", "(2,)", "(5,)"):
        attend(*arrays, lib.asarray(np.zeros((2, N))), pair_bias=lib.asarray(np.zeros((5, N, N))))


def test_merge_parts(lib):
    part = attend(*lib.arrays(*inputs()))
    with refuses(TypeError, "a", "pair", "Array" if lib.name in ("strict", "dask", "jax") else ""):
        merge(part.out, part)
    with refuses(TypeError, "b", "pair"):
        merge(part, part.out)
    with refuses(ValueError, "b", "(..., N, E) and (..., N)"):
        merge(part, (part.out, part.log_norm[..., :2]))
    with refuses(ValueError, "b", "queries and features of a", "(6, 2)"):
        merge(part, (part.out[..., :2], part.log_norm))
    with refuses(TypeError, "b.out", "array", "int"):
        merge(part, (1, part.log_norm))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_inputs_are_left_alone(lib, name):
    """NumPy's are read-only in all these tests; here the others are compared."""
    data = inputs(m=N)
    arrays = lib.arrays(*data)
    ESTIMATORS[name](*arrays)
    for x, before in zip(arrays, data, strict=True):
        np.testing.assert_array_equal(lib.numpy(x), before)
