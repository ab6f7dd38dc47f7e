"""Bad arrays: an error that names the argument, what came and what was expected."""

from functools import partial

import numpy as np
import pytest

from randattn import attend, eva, lara, merge, ra, rfa, softmax_attention
from tests.helpers.forms import ESTIMATORS
from tests.helpers.refusals import ESTIMATOR_FUNCTIONS, D, M, N, inputs, refuses


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
        (lib.asarray(np.ones(M - 1, dtype=bool)), ValueError, ("(5,) or (2 or 1, 5)", "(4,)")),
        (lib.asarray(np.ones((3, M), dtype=bool)), ValueError, ("(5,) or (2 or 1, 5)", "(3, 5)")),
        ([True] * M, TypeError, ("expected an array", "list")),
    ):
        with refuses(kind, "key_mask", *texts):
            estimator(*arrays, key_mask=mask)


def test_a_mask_has_the_axes_of_the_keys(lib, estimator):
    """Axes matched from the right would take a batch for heads where there are as many, or widen the result."""
    arrays = [np.stack([x, x]) for x in inputs()]
    expected = "(5,) or (2 or 1, 2 or 1, 5)"
    for shape, remedy in (
        ((2, M), "pass key_mask[:, None, :] for a mask of the batch"),
        ((2, 1, 1, M), "pass key_mask[..., 0, :] for a mask of logits"),
        ((1, 2, 2, M), ""),
        ((4, 1, M), ""),
        ((), ""),
    ):
        with refuses(ValueError, "key_mask", expected, str(shape), remedy):
            estimator(*lib.arrays(*arrays), key_mask=lib.asarray(np.ones(shape, dtype=bool)))
        if len(shape) > 1:
            mask = lib.asarray(np.ones((*shape[:-1], N), dtype=bool))
            with refuses(ValueError, "query_mask", "(6,) or (2 or 1, 2 or 1, 6)"):
                estimator(*lib.arrays(*arrays), query_mask=mask)
    keep = np.arange(M) > 1
    plain = lib.numpy(_out(estimator(*lib.arrays(*arrays), key_mask=lib.asarray(keep))))
    for shape in ((2, 2), (2, 1), (1, 2), (1, 1)):
        mask = lib.asarray(np.broadcast_to(keep, (*shape, M)).copy())
        lib.close(_out(estimator(*lib.arrays(*arrays), key_mask=mask)), plain, rtol=1e-12)


def test_a_mask_of_shared_keys_may_be_for_each_sequence(lib):
    q, k, v = inputs()
    mask = np.arange(M) < np.asarray([[2], [4]])
    out = lib.numpy(softmax_attention(*lib.arrays(q, k[0], v[0]), key_mask=lib.asarray(mask)))
    for number, of_sequence in enumerate(mask):
        arrays = lib.arrays(q[number], *(x[0][of_sequence] for x in (k, v)))
        np.testing.assert_allclose(out[number], lib.numpy(softmax_attention(*arrays)), rtol=1e-12)


def _out(found):
    return found if hasattr(found, "shape") else found.out


def test_grouped_queries(lib, estimator):
    q, k, v = inputs()
    with refuses(ValueError, "q", "head axis"):
        estimator(*lib.arrays(q[0], k, v), enable_gqa=True)
    three, two = np.zeros((3, N, D)), np.zeros((2, M, D))
    with refuses(ValueError, "q", "multiple of the 2 heads", "3"):
        estimator(*lib.arrays(three, two, v), enable_gqa=True)
    with refuses(ValueError, "v", "2 heads of k"):
        estimator(*lib.arrays(q, k, v[:1]), enable_gqa=True)


def test_query_masks(lib):
    arrays = lib.arrays(*inputs())
    for function, options in ((lara, {}), (eva, {"window": 0})):
        with refuses(ValueError, "query_mask", "(6,) or (2 or 1, 6)", "(5,)"):
            function(*arrays, query_mask=lib.asarray(np.ones(M, dtype=bool)), **options)
        with refuses(TypeError, "query_mask", "boolean"):
            function(*arrays, query_mask=lib.asarray(np.ones(N)), **options)


def test_attend_biases(lib):
    arrays = lib.arrays(*inputs())
    with refuses(ValueError, "bias", "(..., 5)", "6"):
        attend(*arrays, lib.asarray(np.zeros(6)))
    with refuses(ValueError, "pair_bias", "(..., 6, 5)", "(5, 6)"):
        attend(*arrays, pair_bias=lib.asarray(np.zeros((M, N))))


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
