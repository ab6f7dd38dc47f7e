"""Errors name the argument and say what was expected; they never print an array."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import randattn
from randattn import AdaptiveEVAState, EVAState, RFAState

pytestmark = pytest.mark.mathematics

LONGEST = 300
NOT_OF_ARRAYS = (randattn.Average, randattn.Diagnosis, AdaptiveEVAState, EVAState, RFAState)
FUNCTIONS = [
    function
    for function in (getattr(randattn, name) for name in randattn.__all__)
    if function not in NOT_OF_ARRAYS
]
# What a function needs beside arrays for its arguments by place.
NEEDED = {
    "diagnose": {"rng": 0},
    "rfa": {"rng": 0},
    "ra": {"rng": 0},
    "rfa_step": {"rng": 0},
}
# Before an option is looked at, another must be given.
BESIDE = [{}, {"is_causal": True}, {"exact_heads": 1}]


def big(lib):
    return lib.asarray(np.random.default_rng(0).standard_normal((3, 40, 40)))


HOSTILE = {
    "an array": big,
    "a list of arrays": lambda lib: [big(lib)],
    "a pair of arrays": lambda lib: (big(lib), big(lib)),
    "a dictionary of arrays": lambda lib: {"a": big(lib)},
    "NumPy's array": lambda lib: np.arange(3000.0),
    "many numbers": lambda lib: list(range(3000)),
    "many rows": lambda lib: [[0.5] * 100] * 100,
    "a long string": lambda lib: "x" * 3000,
    "a function": lambda lib: big,
}


def arguments(function, lib):
    """Arguments by place that are right."""
    x = big(lib)[..., :4]
    small = {"n": 64, "m": 64, "d": 8, "e": 8}
    places = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.POSITIONAL_ONLY
    ]
    given = {"estimator": randattn.eva, "state": None, **small}
    pair = (x, x[..., 0]) if function is randattn.merge else x
    return [given.get(parameter.name, pair) for parameter in places]


def complaint(function, places, options):
    try:
        function(*places, **options)
    except Exception as error:  # noqa: BLE001
        return str(error)
    return ""


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("ignore")
def test_no_error_prints_an_array(function, hostile, lib):
    value = HOSTILE[hostile](lib)
    needed = NEEDED.get(function.__name__, {})
    parameters = inspect.signature(function).parameters.values()
    said = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY:
            for beside in BESIDE:
                known = {
                    name: other for name, other in beside.items() if name in {one.name for one in parameters}
                }
                said.append(
                    complaint(function, arguments(function, lib), {**needed, **known, parameter.name: value})
                )
    for place in range(len(arguments(function, lib))):
        given = arguments(function, lib)
        given[place] = value
        said.append(complaint(function, given, needed))
    assert any(said)
    for message in said:
        assert len(message) < LONGEST, message[:1000]
        assert not any(sign in message for sign in ("tensor(", "array(", "Array(", "0.5, 0.5, 0.5, 0.5")), (
            message
        )
