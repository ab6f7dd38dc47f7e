"""The public functions as the suite calls them: on JAX under `jit`.

An eager call there compiles each operation by itself, which takes ten times as long; test_tracing.py
shows that eager calls give the same. On every other library these are the functions as they are.
"""

from __future__ import annotations

import numbers
from functools import partial, wraps
from typing import Any

from array_api_compat import is_array_api_obj, is_jax_array

import randattn
from tests.helpers import blocks

_compiled: dict[Any, Any] = {}
_functions: dict[str, Any] = {}


def _is_dynamic(option: Any) -> bool:
    if isinstance(option, numbers.Number):
        return False
    return all(map(is_array_api_obj, option)) if isinstance(option, tuple) else is_array_api_obj(option)


def _under_jit(function: Any) -> Any:
    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        if not is_jax_array(arrays[0]):
            return function(*arrays, **options)
        import jax

        fixed = {name: option for name, option in options.items() if not _is_dynamic(option)}
        dynamic = {name: option for name, option in options.items() if _is_dynamic(option)}
        # The sizes of blocks are constants of the compiled program.
        key = (function, repr(sorted(fixed.items())), blocks.sizes())
        if key not in _compiled:
            _compiled[key] = jax.jit(partial(function, **fixed))
        return _compiled[key](*arrays, **dynamic)

    return call


def forget() -> None:
    """Let go of the compiled programs."""
    _compiled.clear()


def __getattr__(name: str) -> Any:
    """Give a public function of the library, in the way in which the suite calls it."""
    if name not in randattn.__all__:
        raise AttributeError(name)
    function = getattr(randattn, name)
    return function if name == "merge" else _functions.setdefault(name, _under_jit(function))
