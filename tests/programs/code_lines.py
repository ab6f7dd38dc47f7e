"""Count the lines of code of commits, without comments, docstrings and blank lines.

Usage: python -m tests.programs.code_lines [COMMIT ...], by default HEAD. Each count is given twice: as the lines
are written, and as `ast` writes them, which a change of the layout or of the line length cannot shorten.
"""

import ast
import subprocess
import sys
from collections import Counter


def without_docstrings(source: str) -> ast.Module:
    """Return a module's tree without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def written_lines(source: str) -> int:
    """Return the number of lines as they are written."""
    found = list(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            found[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in found)


def count(commit: str) -> dict[str, str]:
    """Return the lines of code of each folder, and of all, at a commit: as written / as `ast` writes them."""
    written: Counter[str] = Counter()
    parsed: Counter[str] = Counter()
    names = subprocess.check_output(["git", "ls-tree", "-r", "--name-only", commit], text=True).splitlines()
    for name in names:
        if name.endswith(".py"):
            source = subprocess.check_output(["git", "show", f"{commit}:{name}"], text=True)
            lines = ast.unparse(without_docstrings(source)).splitlines()
            for folder in (name.partition("/")[0], "all"):
                written[folder] += written_lines(source)
                parsed[folder] += sum(bool(line.strip()) for line in lines)
    return {folder: f"{written[folder]:,} / {parsed[folder]:,}" for folder in sorted(written)}


if __name__ == "__main__":
    for commit in sys.argv[1:] or ["HEAD"]:
        print(commit, count(commit))
