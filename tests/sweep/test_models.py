"""Families of transformers' models by "randattn_softmax", against their own exact attention.

Each agrees, or is in `OTHERS` with what is said of it; a family that is there and agrees fails.
"""

from __future__ import annotations

import re

import pytest
import torch

from .checks import CHECKS, Counted, distance, softmax
from .families import BuildError, build, families

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = 1e-6
OTHERS: dict[str, str] = {}


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


def refusal(error):
    """The name that a refusal begins with."""
    return re.match(r"\w+", str(error)).group()


def looked_at(family):
    """What is to be said of a family, and notes."""
    kind, model_type, name = family
    try:
        model = build(kind, model_type, name)
    except BuildError as error:
        return "not built", str(error).partition("\n")[0][:110]
    counted, notes, alone = Counted(), [], "agrees"
    for title, check in CHECKS.items():
        if kind == "masked" and title not in ("padding", "training"):
            continue
        model.set_attn_implementation("eager")
        try:
            exact = check(model)
        except Exception as error:  # noqa: BLE001
            why = f"{type(error).__name__}: {error}".partition("\n")[0][:80]
            if title == "padding":
                return "fails by itself", why
            notes.append(f"no {title}, {why}")
            continue
        if title == "padding":
            model.set_attn_implementation("sweep alone")
            try:
                check(model)
            except NotImplementedError as error:
                alone = f"falls back: {refusal(error)}"
        model.set_attn_implementation("sweep")
        try:
            ours = check(model)
        except NotImplementedError as error:
            return f"refused: {refusal(error)}", ""
        if title == "padding" and not counted.calls:
            return "attention of its own", ""
        if title == "padding" and alone == "agrees" and not counted.estimates:
            return "nothing estimated", ""
        far = distance(exact, ours)
        if not far <= NEAR:
            return f"differs: {title}", f"{far:.1e}"
    if not counted.contiguous:
        return "differs: not contiguous", ""
    return alone, "; ".join(notes)


@pytest.mark.parametrize("family", families(), ids=lambda family: f"{family[0]}-{family[2]}")
def test_family(family, record_property):
    outcome, note = looked_at(family)
    name = f"{family[0]} {family[2]}"
    for title, value in (("outcome", outcome), ("family", name), ("note", note)):
        record_property(title, value)
    assert outcome == OTHERS.get(name, "agrees"), note


def test_what_is_listed_is_there():
    assert OTHERS.keys() <= {f"{kind} {name}" for kind, _, name in families()}
