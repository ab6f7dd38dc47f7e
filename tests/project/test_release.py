"""A version stands in three files, which agree, and a release writes all of them or none."""

from pathlib import Path

import pytest

import randattn
from tests.programs import release

ROOT = Path(__file__).parents[2]


def test_the_files_agree():
    assert f"\nversion: {randattn.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert len(release.numbers(randattn.__version__)) == 3


def checkout(folder, changes="- One.\n"):
    (folder / "src" / "randattn").mkdir(parents=True)
    (folder / "src" / "randattn" / "__init__.py").write_text('"""Doc."""\n\n__version__ = "0.1.0"\n')
    (folder / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.0\ndate-released: 2020-01-01\n")
    (folder / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## [Unreleased]\n\n{changes}\n## [0.0.1] - 2020-01-01\n"
    )
    return folder


def test_a_version_is_written(tmp_path):
    release.write_version(checkout(tmp_path), "0.2.0", "2026-12-01")
    assert '__version__ = "0.2.0"' in (tmp_path / "src" / "randattn" / "__init__.py").read_text()
    assert (tmp_path / "CITATION.cff").read_text().endswith("\nversion: 0.2.0\ndate-released: 2026-12-01\n")
    lines = (tmp_path / "CHANGELOG.md").read_text().split("\n\n")
    assert lines[1:4] == ["## [Unreleased]", "## [0.2.0] - 2026-12-01", "- One."]


@pytest.mark.parametrize(
    ("version", "changes", "text"),
    [
        ("0.0.9", "- One.\n", "expected 0.1.0 or a later one"),
        ("1.0", "- One.\n", "MAJOR.MINOR.PATCH"),
        ("01.0.0", "- One.\n", "MAJOR.MINOR.PATCH"),
        ("0.2.0", "", "expected changes under"),
    ],
)
def test_nothing_is_written(tmp_path, version, changes, text):
    checkout(tmp_path, changes)
    before = {path: path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=text):
        release.write_version(tmp_path, version, "2026-12-01")
    assert before == {path: path.read_text() for path in before}
