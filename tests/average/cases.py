"""Queries, sets of keys and options, as every backend's `attend` is tested with them."""

import math

import numpy as np

from randattn._core.average import Keys, PairWeight
from randattn._core.library import namespace

N, M, D, E = 11, 13, 3, 4


def factors(ops, q, mask, k, offset):
    """Some weights that depend on the query, in the operations that blocks may take in place."""
    xp = namespace(q)
    x = ops.add(ops.products("t", k, q), offset)
    if mask is not None:
        x = xp.where(mask[..., None, :], x, -math.inf)
    return ops.at_least(ops.multiply(ops.exp(ops.at_most(x, 0.0)), 2.0), 0.1)


def make_cases():
    """Queries, sets of keys and options: what estimators call `attend` with, and what they might."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape)

    def keys(*lead, m=M, e=E, bias=None):
        return Keys(draw(*lead, m, D), draw(*lead, m, e), None if bias is None else draw(*bias, m))

    holes = keys(2, 3, bias=(2, 3))
    holes.bias[0, :, ::2] = -np.inf
    holes.bias[1, 1] = -np.inf
    tiles = keys(2, 1, m=5, bias=(1, 4))
    tiles.bias[0, 2, :3] = -np.inf
    alike = keys(1, m=3, bias=(4,))
    alike.bias[...] = alike.bias[0]
    holed = alike._replace(bias=np.where(np.eye(4, 3, 1, dtype=bool), -np.inf, alike.bias))
    apart = keys(2, 1, m=3, bias=(2, 1))
    seen = np.ones((2, 4, 3), dtype=bool)
    seen[0, [0, 1, 3], [0, 2, 1]] = seen[1, 2, :2] = False
    apart = apart._replace(bias=np.where(seen, apart.bias, -np.inf))
    weight = PairWeight(factors, None, (draw(2, 3, M, D), draw(2, 1, M, 1)))
    mask = rng.random((2, 1, N)) < 0.7
    # Keys of larger and larger logits; biases that logits make up for.
    growing = keys(2, 3, m=40, bias=(2, 3))
    growing.k[...] *= np.geomspace(1, 300, 40)[:, None]
    opposed = keys(2, 3, m=5)
    opposed = opposed._replace(bias=np.array([86.0, 80.0, 60.0, -np.inf, 0.0]) + np.zeros((2, 3, 1)))
    along = np.ones((2, 3, 40, D))
    opposed.k[...] = -(np.maximum(opposed.bias, 0.0)[..., None] + 12.0) / D
    return {
        "plain": (draw(2, 3, N, D), [keys(2, 3)], {}),
        "of one width": (draw(2, 3, N, D), [keys(2, 3, e=D)], {"scale": 0.5}),
        "one row of heads": (draw(2, N, D), [keys(2, e=D, bias=(2,))], {}),
        "no leading axis": (draw(N, D), [keys(e=D, bias=())], {"scale": 2.0}),
        "few queries": (draw(2, 3, 2, D), [keys(2, 3, m=40, e=D, bias=(2, 3))], {"scale": 0.3}),
        "many queries": (draw(2, 3, 40, D), [keys(2, 3, m=2, e=D, bias=(2, 3))], {"scale": 0.3}),
        "no key left": (draw(2, 3, N, D), [holes], {}),
        "no key left, of one width": (draw(2, 3, N, D), [holes._replace(v=holes.v[..., :D])], {}),
        "no head": (draw(0, N, D), [keys(0, e=D)], {}),
        "no head, causal": (draw(0, M, D), [keys(0)._replace(is_causal=True)], {}),
        "shared keys": (draw(2, 3, N, D), [keys(1, 3, bias=(2, 1))], {"scale": 0.7}),
        "shared queries": (draw(1, 3, N, D), [keys(2, 1, e=D, bias=(1, 3))], {"scale": 0.7}),
        "grouped queries": (draw(2, 3, 2, N, D), [keys(2, 3, 1, bias=(2, 3, 1))], {}),
        "bias of more heads": (draw(1, 3, N, D), [keys(1, 3, e=D, bias=(4, 3))], {}),
        "bias of more heads, few keys": (draw(1, 40, D), [alike], {}),
        "bias of more heads, a hole": (draw(1, 40, D), [holed], {}),
        "values of more heads": (draw(1, N, D), [keys(1)._replace(v=draw(3, M, E))], {}),
        "by features": (draw(2, 3, N, D), [keys(2, 3, e=D)._replace(kappa=0.7)], {"scale": 0.7}),
        "by features, biased": (
            draw(2, 3, N, D),
            [keys(1, 3, bias=(2, 3))._replace(kappa=0.7)],
            {"scale": 0.7},
        ),
        "by features, few of them": (
            draw(2, 3, 40, D),
            [keys(2, 3, m=2)._replace(kappa=0.5)],
            {"scale": 0.7},
        ),
        "growing logits": (draw(2, 3, N, D), [growing], {}),
        "few queries, growing logits": (draw(2, 3, 2, D), [growing], {}),
        "logits far below zero": (along, [keys(2, 3)._replace(k=draw(2, 3, M, D) - 32.0)], {}),
        "biases that logits oppose": (along, [opposed], {}),
        "no values": (draw(2, 3, N, D), [keys(2, 3, e=0)], {}),
        "causal": (draw(2, 3, M, D), [keys(2, 3)._replace(is_causal=True)], {}),
        "causal, of one width": (
            draw(2, 3, M, D),
            [keys(2, 3, e=D)._replace(is_causal=True)],
            {"scale": 0.5},
        ),
        "causal, biased": (draw(2, 3, M, D), [keys(2, 3, e=D, bias=(2, 3))._replace(is_causal=True)], {}),
        "two sets": (draw(2, 3, N, D), [keys(2, 3), keys(2, 1, m=4, bias=(1, 3))], {"scale": 0.7}),
        "windows": (draw(2, 4, 3, D), [keys(2, 4, m=3), tiles, keys(2, 4, m=1, bias=(2, 4))], {"scale": 0.7}),
        "windows that leave out keys": (draw(2, 4, 3, D), [keys(2, 4, m=3), apart], {"scale": 0.7}),
        "weighted": (
            draw(2, 3, N, D),
            [keys(2, 3, bias=(2, 3))._replace(pair_weight=weight)],
            {"scale": 0.6},
        ),
        "weighted, masked": (
            draw(2, 3, N, D),
            [keys(2, 3, bias=(2, 3))._replace(pair_weight=weight._replace(mask=mask))],
            {"scale": 0.6},
        ),
        "weighted, beside another set": (
            draw(2, 3, N, D),
            [keys(2, 1, m=4, bias=(1, 3)), keys(2, 3)._replace(pair_weight=weight)],
            {"scale": 0.6},
        ),
        "causal, second of two sets": (
            draw(2, 3, M, D),
            [keys(2, 3, m=4, bias=(2, 3)), keys(2, 3)._replace(is_causal=True)],
            {},
        ),
        "biased by pairs": (
            draw(2, 3, N, D),
            [keys(2, 3)._replace(pair_bias=draw(2, 1, N, M))],
            {"scale": 0.7},
        ),
        "biased by pairs, between two sets": (
            draw(2, 3, N, D),
            [keys(2, 3, m=4), keys(2, 3)._replace(pair_bias=draw(2, 1, N, M)), keys(2, 1, m=5, bias=(2, 3))],
            {},
        ),
    }


CASES = make_cases()


def arrays_of(q, sets, options):
    """All arrays with a gradient, in order, and what makes a call of such arrays."""
    arrays = [q]
    for keys in sets:
        arrays += [x for x in (*keys[:3], keys.pair_bias) if x is not None]
        arrays += () if keys.pair_weight is None else keys.pair_weight.arrays

    def call(attend, mask, *arrays):
        q, *rest = arrays
        rest, given = iter(rest), []
        for keys in sets:
            own = [None if x is None else next(rest) for x in (*keys[:3], keys.pair_bias)]
            weight = keys.pair_weight
            if weight is not None:
                weight = PairWeight(factors, mask, tuple(next(rest) for _ in weight.arrays))
            *own, pair_bias = own
            given.append(Keys(*own, keys.kappa, pair_bias, weight, keys.is_causal))
        return attend(q, *given, **options)

    return arrays, call


def prepared(lib, case):
    q, sets, options = CASES[case]
    arrays, call = arrays_of(q, sets, options)
    masks = [keys.pair_weight.mask for keys in sets if keys.pair_weight is not None]
    mask = masks[0] if masks else None
    return lib.arrays(*arrays), call, None if mask is None else lib.asarray(mask)
