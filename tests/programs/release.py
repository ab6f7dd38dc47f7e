"""Make a release, up to the upload: ``python -m tests.programs.release VERSION FOLDER``.

The version goes into the package, CITATION.cff and the changelog; the sdist and the wheel are built, used in an
empty environment, and checked by twine. The last lines are the commands that publish the release.
"""

from __future__ import annotations

import datetime as dt
import re
import sys
from pathlib import Path

from . import wheel

_UNRELEASED = "## [Unreleased]\n"


def numbers(version: str) -> tuple[int, ...]:
    """Return the three numbers of a version; raise ValueError for another form."""
    if re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version) is None:
        raise ValueError(f"version: expected MAJOR.MINOR.PATCH, got {version!r}")
    return tuple(map(int, version.split(".")))


def changelog_of(text: str, version: str, day: str) -> str:
    """Return the changelog with its unreleased changes as those of a version."""
    _, found, rest = text.partition(_UNRELEASED)
    if not found or not re.split(r"^## \[", rest, maxsplit=1, flags=re.MULTILINE)[0].strip():
        raise ValueError("CHANGELOG.md: expected changes under [Unreleased]")
    return text.replace(_UNRELEASED, f"{_UNRELEASED}\n## [{version}] - {day}\n", 1)


def replaced(text: str, pattern: str, line: str) -> str:
    """Return the text with its one line of a pattern replaced."""
    found, count = re.subn(pattern, line, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"expected one line {pattern!r}, got {count}")
    return found


def write_version(root: Path, version: str, day: str) -> None:
    """Write a version into the three files that have it, or into none."""
    package, citation = root / "src" / "randattn" / "__init__.py", root / "CITATION.cff"
    changelog, texts = root / "CHANGELOG.md", {}
    text = package.read_text(encoding="utf-8")
    old = re.findall(r'^__version__ = "(.*)"$', text, flags=re.MULTILINE)[0]
    if numbers(version) < numbers(old):
        raise ValueError(f"version: expected {old} or a later one, got {version}")
    texts[package] = replaced(text, r'^__version__ = ".*"$', f'__version__ = "{version}"')
    text = citation.read_text(encoding="utf-8")
    text = re.sub(r"^date-released: .*\n", "", text, flags=re.MULTILINE)
    texts[citation] = replaced(text, r"^version: .*$", f"version: {version}\ndate-released: {day}")
    texts[changelog] = changelog_of(changelog.read_text(encoding="utf-8"), version, day)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def main(version: str, work: Path) -> None:
    """Write the version, build, check, and say how to go on."""
    root = wheel.ROOT
    if wheel.run("git", "status", "--porcelain").strip():
        sys.exit("expected a checkout without changes: commit them first")
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    try:
        write_version(root, version, today)
    except ValueError as error:
        sys.exit(str(error))
    wheel.main(work)
    made = sorted(map(str, (work / "dist").glob("*")))
    if not all(f"randattn-{version}" in name for name in made):
        sys.exit(f"expected files of version {version}, got {made}")
    print(wheel.run(sys.executable, "-m", "twine", "check", "--strict", *made), end="")
    print("Nothing is published yet. To publish:")
    print(f"  git commit -am 'Release {version}' && git tag v{version} && git push --follow-tags")
    print(f"  python -m twine upload {' '.join(made)}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
