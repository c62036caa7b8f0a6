"""What a report consists of, before it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Figure", "Section", "Table", "bytes_text", "count_text", "seconds_text", "unique_keys"]


@dataclass(frozen=True, slots=True)
class Table:
    """``columns``: their heads, with units; the first column names the row. ``rows``: text, as it is to be shown."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """``key``: its file's name. ``says``: what is to be seen in it, for who reads and for who does not see it. ``draw``
    is given a matplotlib Figure of ``size`` (inches). ``data``: what is drawn, as numbers."""

    key: str
    title: str
    says: str
    draw: Callable[[Any], None]
    data: Table
    size: tuple[float, float] = (8.0, 3.4)


@dataclass(slots=True)
class Section:
    """``key``: of its figures' names. ``outcome``: one sentence, before all else. ``facts``: what there is to know of
    it as a whole. ``warnings``: what is wrong, or unsure."""

    key: str
    title: str
    outcome: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def unique_keys(sections: Sequence[Section]) -> list[Section]:
    """The same, so that no two sections and no two figures have one key: the second of a kind has a 2 at its end."""
    counts: dict[str, int] = {}
    found = []
    for section in sections:
        counts[section.key] = number = counts.get(section.key, 0) + 1
        end = f"-{number}" if number > 1 else ""
        found.append(replace(section, key=section.key + end,
                             figures=[replace(figure, key=figure.key + end) for figure in section.figures]))
    return found


def seconds_text(seconds: float) -> str:
    """``343 µs``, ``12.3 ms``, ``4.56 s``."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= unit:
            return f"{seconds / unit:,.3g} {name}" if seconds / unit < 1000 else f"{seconds / unit:,.0f} {name}"
    return f"{seconds * 1e6:,.3g} µs" if seconds else "0 s"


def bytes_text(size: float) -> str:
    """``12.3 MiB``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.4g} {name}"
    return f"{size:,.0f} B"


def count_text(number: float) -> str:
    """``12,345``; of less than a hundred, three digits."""
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"
