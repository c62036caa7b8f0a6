"""What came of the tests, as a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .running import Outcome, Test
from .wanted import WHY

__all__ = ["Row", "text_of"]

_LONGEST = 160


@dataclass
class Row:
    """Of a test. ``said``: the first thing that went wrong inside, of those that pass natively."""

    name: str
    about: str
    native: str
    inside: str
    said: str = ""
    missing: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, test: Test, native: Outcome, inside: Outcome) -> Row:
        row = cls(test.name, test.about, native.kind, inside.kind)
        if row.differs:
            row.said, row.missing = first_fault(inside.output), sorted(inside.missing)
        return row

    @property
    def differs(self) -> bool:
        return self.native == "passed" != self.inside

    def data(self) -> dict[str, Any]:
        return asdict(self)


def first_fault(output: str) -> str:
    """A line that tells of it, or the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"\b(TFAIL|TBROK|TCONF)\b\s*:", line)]
    found = re.sub(r"^\S+:\d+: ", "", (told or lines[-1:] or [""])[0])
    return re.sub(r"[0-9a-f]{8,}|/tmp/LTP_\w+", "…", found)[:_LONGEST]


def text_of(rows: Sequence[Row]) -> str:
    """Counts, then each test that passes natively and not inside, by why."""
    native = [row for row in rows if row.native == "passed"]
    differ = [row for row in native if row.differs]
    others = Counter(row.native for row in rows if row.native != "passed")
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    parts = [f"{len(rows)} tests; natively, {len(native)} pass ({left_out}). "
             f"Of these {len(native)}, **{len(native) - len(differ)} pass in a machine**.", ""]
    for title, some in grouped(differ):
        parts += [f"### {title}", "", *table(some), ""]
    return "\n".join(parts)


def grouped(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(why(row), []).append(row)
    return sorted(found.items())


def why(row: Row) -> str:
    """What is known about it, or what can be seen."""
    for title, pattern in WHY.items():
        if re.fullmatch(pattern, row.name):
            return title
    if row.missing:
        return "A call that is not served"
    if re.search(r"/(proc|sys)/", row.said):
        return "Something of /proc or /sys that is not there"
    return "Other differences"


def table(rows: Iterable[Row]) -> list[str]:
    lines = ["| test | inside | what it says |", "| --- | --- | --- |"]
    for row in rows:
        said = row.said.replace("|", "\\|").replace("<", "&lt;")
        said = f"{said} (not served: {', '.join(row.missing)})" if row.missing else said
        lines.append(f"| {row.name} | {row.inside} | {said} |")
    return lines
