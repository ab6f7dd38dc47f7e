"""The documentation: `nox -s docs` builds it, and fails where a page or an example fails."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import site_parts  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "randattn"
version = metadata.version("randattn")
author = "the authors of randattn"
project_copyright = author
html_title = "randattn"
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx_copybutton"]
# A page for each function of the lists in api.md.
autosummary_generate = True
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
numpydoc_show_class_members = False
html_theme = "furo"
html_favicon = "favicon.svg"
html_math_renderer = "mathml"
suppress_warnings = ["myst.header"]

# Examples that need other packages, several devices or processes; their own tests run them.
NOT_EXECUTED = {"dask", "integrations", "sharding", "torch_distributed"}


def on_source(_: Sphinx, page: str, source: list[str]) -> None:
    """Link to pages of the site, fill in generated parts, and run the examples."""
    text = re.sub(r"(?:\.\./)+benchmarks/README\.md", "/benchmarks.md", source[0])
    text = re.sub(
        r"^<!-- (\w+) -->$", lambda found: site_parts.PARTS[found.group(1)](), text, flags=re.MULTILINE
    )
    source[0] = text
    if page not in NOT_EXECUTED:
        site_parts.run_examples(page, text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the site's own renderers and events."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(site_parts.inline_math, None),
        block_renderers=(site_parts.block_math, None),
    )
    app.connect("source-read", on_source)
    app.connect("builder-inited", lambda _: site_parts.draw(HERE / "estimators"))
    return {"parallel_read_safe": False}
