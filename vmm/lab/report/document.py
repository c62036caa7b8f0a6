"""What a report consists of, before it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...tables import digits_text

__all__ = ["Figure", "Section", "Table", "busiest", "bytes_text", "count_text", "left_out_text", "percent_text",
           "seconds_text", "unique_keys"]


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
    """``343 µs``, ``12.3 ms``, ``4.56 s``, ``4,321 s``."""
    rounded = float(f"{seconds:.3g}")
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(rounded) >= unit:
            return f"{digits_text(rounded / unit)} {name}" if abs(rounded) < 1000 else f"{seconds:,.0f} s"
    return f"{digits_text(rounded * 1e6)} µs" if rounded else "0 s"


def bytes_text(size: float) -> str:
    """``12.3 MiB``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if float(f"{size / unit:.4g}") >= 1:
            return f"{digits_text(size / unit, 4)} {name}"
    return f"{size:,.0f} B"


def count_text(number: float) -> str:
    """``12,345``; of less than a hundred, three digits."""
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else digits_text(number)


def percent_text(part: float, whole: float = 1.0) -> str:
    """``12.5 %``: of nothing, nothing."""
    return f"{digits_text(100 * part / whole if whole else 0.0)} %"


def busiest(weights: Mapping[int, float], most: int) -> list[int]:
    """At most so many vCPUs, those of the greatest weights, in the order of their numbers."""
    return sorted(sorted(weights, key=lambda vcpu: -weights[vcpu])[:most])


def left_out_text(shown: int, there: int, which: str) -> str:
    """`` Those 8 of 64 vCPUs that stalled longest.``; "" where none is left out."""
    return f" Those {shown} of {there} vCPUs that {which}." if shown < there else ""
