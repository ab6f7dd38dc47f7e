"""Write down what CuPy offers: its public names, and the signature of each that can be called.

``python tests/libraries/cupy_standin/record.py`` where CuPy's wheel is installed: it can be imported without a device.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

RECORDING = Path(__file__).with_name("cupy.json")
OWNERS = (
    "cupy",
    "cupy.fft",
    "cupy.linalg",
    "cupy.random",
    "cupy.cuda.Device",
    "cupy.ndarray",
    "cupy.random.Generator",
)


def record() -> dict[str, Any]:
    """Give the version, and for each owner its names with their signatures."""
    cupy = importlib.import_module("cupy")
    names: dict[str, Any] = {}
    for owner in OWNERS:
        found = cupy
        for part in owner.split(".")[1:]:
            found = getattr(found, part)
        # What a module loads when it is asked for is not in its directory.
        listed = {*dir(found), *(one.rpartition(".")[2] for one in OWNERS if one.rpartition(".")[0] == owner)}
        members = {name: getattr(found, name) for name in sorted(listed) if not name.startswith("_")}
        names[owner] = {
            name: signature(member) for name, member in members.items() if not inspect.ismodule(member)
        }
    return {"version": cupy.__version__, "names": names}


def signature(member: Any) -> str | None:
    """Give the parameters, less the first one of a method; None for a class, a constant or a property."""
    if isinstance(member, type) or not callable(member):
        return None
    try:
        found = inspect.signature(member)
        bare = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
        text = str(inspect.Signature(bare))
    except ValueError:
        text = from_docstring(member.__doc__)
    # A default that is an object has no text that Python reads.
    text = re.sub(r"<[^>]*>|numpy\.\w+", "...", text)
    return re.sub(r"^\((self|cls)(, )?", "(", text)


def from_docstring(doc: str) -> str:
    """Give the signature that Cython or a ufunc writes into the first line, without the types of C."""
    text = re.sub(r" ->.*", "", doc.strip().partition("\n")[0])
    # A ufunc's star is escaped, and its optional results stand in brackets.
    text = text.replace("\\*", "*").replace(" [, out=(None, None)]", ", out=None")
    text = re.sub(r"\[, (out1), (out2)\]", r", \1=None, \2=None", text)
    parameters = text[text.index("(") + 1 : text.rindex(")")].split(", ")
    return f"({', '.join(re.sub(r'^[A-Za-z_]+ (?=[a-z])', '', parameter) for parameter in parameters)})"


if __name__ == "__main__":
    RECORDING.write_text(json.dumps(record(), indent=1) + "\n")
