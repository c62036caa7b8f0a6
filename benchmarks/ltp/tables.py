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

_LONGEST = 80
_OTHERS = "Other differences"


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
    return shortened((told or lines[-1:] or [""])[0])


def shortened(said: str) -> str:
    """Without where it was said, and by which of the tests of a program; numbers that differ are left out."""
    found = re.sub(r"^(\S+:\d+: |\S+ +\d+ +(?=T[A-Z]+ +:))|\S+\.[ch]:\d+: ", "", said)
    found = re.sub(r"[0-9a-f]{8,}|/tmp/LTP_\w+|tfile_\d+", "…", found)
    return re.sub(r" +", " ", found)[:_LONGEST]


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
    titles = [*dict.fromkeys(title for title, _, _ in WHY), _OTHERS]
    return sorted(found.items(), key=lambda pair: titles.index(pair[0]))


def why(row: Row) -> str:
    """What is known about it."""
    for title, names, said in WHY:
        if (names and re.fullmatch(names, row.name)) or (said and re.search(said, row.said)):
            return title
    return "A call is not served" if row.missing else _OTHERS


def table(rows: Iterable[Row]) -> list[str]:
    lines = ["| test | inside | what it says |", "| --- | --- | --- |"]
    for row in rows:
        said = row.said[:_LONGEST].replace("|", "\\|").replace("<", "\\<")
        said = f"{said} (not served: {', '.join(row.missing)})" if row.missing else said
        lines.append(f"| {row.name} | {row.inside} | {said} |")
    return lines
