"""Read the sources as a graph of imports, and find in it what the layout forbids.

Each function takes the folder of a package, so that tests can give it one with a planted fault. Each counts the files
that it read: a guard that read none has found nothing out.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

# Names of array libraries in code: modules, and array-api-compat's tests of them.
LIBRARY = re.compile(r"(?:\b|_)(?:torch|jax|cupy|dask|array_api_strict|tensorflow)(?:\b|_)")


class Import(NamedTuple):
    """State that one module imports another, at its top or within a function, not for types alone."""

    importer: str
    imported: str


def modules_of(package: Path) -> dict[str, Path]:
    """Return every module below a package's folder by its dotted name within the package."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
    }


def code_of(path: Path) -> ast.Module:
    """Parse a module, and empty its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            node.value.value = ""
    return tree


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without the branches of `TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield from _at_run_time(child)


def imports_of(package: Path) -> list[Import]:
    """Return the imports among a package's modules."""
    modules = modules_of(package)
    found = []
    for name, path in modules.items():
        parts = name.split(".")
        for node in _at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[list[str]] = []
            if isinstance(node, ast.ImportFrom) and node.level:
                base = parts[: len(parts) - node.level] + (node.module.split(".") if node.module else [])
                targets = [[*base, alias.name] for alias in node.names] + [base]
            elif (
                isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package.name
            ):
                base = node.module.split(".")[1:]
                targets = [[*base, alias.name] for alias in node.names] + [base]
            elif isinstance(node, ast.Import):
                targets = [
                    alias.name.split(".")[1:]
                    for alias in node.names
                    if alias.name.split(".")[0] == package.name
                ]
            known = {".".join(target) for target in targets} & set(modules)
            found += [Import(name, target) for target in sorted(known - {name})]
    return found


def circle(imports: Iterable[Import]) -> list[str]:
    """Return the modules of a circle of imports; an empty list where there is none."""
    graph: dict[str, set[str]] = {}
    for importer, imported in imports:
        graph.setdefault(importer, set()).add(imported)
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        if path[-1] in path[:-1]:
            return path[path.index(path[-1]) :]
        if path[-1] in done:
            return []
        for imported in sorted(graph.get(path[-1], ())):
            found = search([*path, imported])
            if found:
                return found
        done.add(path[-1])
        return []

    return next((found for start in sorted(graph) if (found := search([start]))), [])


def upward(imports: Iterable[Import], floor: Callable[[str], int]) -> list[Import]:
    """Return the imports of a higher floor from a lower one."""
    return [one for one in imports if floor(one.imported) > floor(one.importer)]


def naming_a_library(package: Path) -> set[str]:
    """Return the modules whose code, docstrings and comments aside, names an array library."""
    return {name for name, path in modules_of(package).items() if LIBRARY.search(ast.unparse(code_of(path)))}


def exponentials(package: Path) -> dict[str, int]:
    """Count in each module the exponentials of arrays."""
    return {
        name: len(re.findall(r"\bxp\.exp\(", ast.unparse(code_of(path))))
        for name, path in modules_of(package).items()
    }


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the parameters of a function."""
    own = function.args
    return len(own.posonlyargs) + len(own.args) + len(own.kwonlyargs) + bool(own.vararg) + bool(own.kwarg)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's body, its docstring aside."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1:
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def comment_share(paths: Iterable[Path]) -> float:
    """Return the share of comment lines among all lines that are not empty."""
    lines = [line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    return sum(line.startswith("#") for line in lines) / len(lines)
