"""Inputs that nobody meant: how many, what they must not do, and what came of them.

``--fuzz N`` tries about N inputs in all, or more; without it there are a few of each. No input may make a reader touch
a file outside the test's folder, start a process or open a connection; none may take longer than a bound, or more
memory (surface.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from surface import SHORT, Surface

#: Among which the inputs are shared out; not all of them have a full share.
_SURFACES = 9


@pytest.fixture
def surface(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Surface]:
    wanted = request.config.getoption("--fuzz")
    found = Surface(tmp_path, max(SHORT, wanted // _SURFACES))
    try:
        yield found
    finally:
        request.node.user_properties.append(("fuzz", {**found.counts, "seconds": time.monotonic() - found.began}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = [(report.nodeid.partition("::")[2], dict(report.user_properties)["fuzz"])
            for reports in terminalreporter.stats.values() for report in reports
            if getattr(report, "when", "") == "teardown" and "fuzz" in dict(report.user_properties)]
    if not rows:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line("| surface | inputs | taken | refused | seconds |")
    terminalreporter.write_line("| --- | --- | --- | --- | --- |")
    for name, counts in [*rows, ("all", {key: sum(c.get(key, 0) for _, c in rows)
                                         for key in ("taken", "refused", "seconds")})]:
        taken, refused = counts.get("taken", 0), counts.get("refused", 0)
        terminalreporter.write_line(f"| {name.removeprefix('test_').replace('_', ' ')} | {taken + refused:,} | "
                                    f"{taken:,} | {refused:,} | {counts['seconds']:.0f} |")
