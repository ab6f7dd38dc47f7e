"""A table of the families at the end."""

from __future__ import annotations

import os
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_terminal_summary(terminalreporter):
    found = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            noted = dict(getattr(report, "user_properties", ()))
            if "outcome" in noted and report.when == "call":
                found[noted["outcome"]].append((noted["family"], noted["note"]))
    if not found:
        return
    terminalreporter.section("families by outcome")
    for outcome, families in sorted(found.items()):
        terminalreporter.line(f"{outcome}: {len(families)}")
        for family, note in sorted(families):
            terminalreporter.line(f"    {family}{note and ': '}{note}")
