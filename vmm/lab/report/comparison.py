"""What ``vmm compare`` found: what each mode of dirty tracking costs."""

from __future__ import annotations

import re
from typing import Any

from ..compare.measure import MODES, Point, summarise
from ..compare.report import verdict
from .document import Figure, Section, Table, count_text
from .style import colour

__all__ = ["rows_of", "section"]

_LABEL = re.compile(r"(\d+) MiB, (\d+) vCPUs?, spin (\d+), ring (\d+), every ([0-9.e+-]+) ms")
_PANELS = (("relative", "guest speed, without tracking = 1", False), ("collect_ms", "time to collect (ms)", True))
_SAYS = {"relative": "Medians; bars from the least to the most of the windows, and on where they reach the edge.",
         "collect_ms": "The median time of a sync, as its client sees it. Modes without a log have none."}


def rows_of(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a results.json, which has what was measured at each point. Raises LookupError, TypeError,
    ValueError."""
    rows = []
    for key, windows in kept["points"].items():
        match = _LABEL.match(key)
        if match is None:
            raise ValueError(f"there is no such point: {key}")
        ram, vcpus, spin, ring = map(int, match.groups()[:4])
        rows += summarise(Point(ram, vcpus, spin, ring, float(match[5])), windows)
    return rows


def section(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Section:
    """Raises LookupError, TypeError, ValueError for what is no comparison."""
    said = verdict(rows)
    found = Section("compare", "Modes of dirty tracking", f"{said[0][0].upper()}{said[0][1:]}.")
    found.facts = [("guest", f"{settings['workload']}, {settings['accel']}"),
                   ("measured", f"{settings['rounds']} windows of {settings['seconds']:g} s for each mode and point"),
                   *((what, rest) for what, _, rest in (line.partition(": ") for line in said[1:]))]
    points: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        points.setdefault(_point(row), []).append(row)
    table = Table("Points", ["point and mode", "writes/s", "of the speed without tracking", "least to most",
                             "guest (µs/page)", "host (µs/page)", "time to collect (ms)"],
                  [[f"{point}: {r['mode']}", count_text(r["speed"]), f"{r['relative']:.3f}",
                    f"{r['relative_low']:.2f} to {r['relative_high']:.2f}", _or_dash(r["lost_us"]),
                    _or_dash(r["host_us"]), _or_dash(r["collect_ms"])] for point, of in points.items() for r in of])
    for key, label, logarithmic in _PANELS:
        found.figures.append(Figure(
            f"compare-{key.replace('_', '-')}", f"{label[0].upper()}{label[1:]}, at each point",
            _SAYS[key],
            _drawing(points, key, label, logarithmic), table, (8.0, 1.6 + 0.42 * len(points))))
    return found


def _point(row: dict[str, Any]) -> str:
    return (f"{row['ram_mib']} MiB, {row['vcpus']} vCPU{'s' if row['vcpus'] > 1 else ''}, spin {row['spin']}, "
            f"ring {row['ring']:,}, {row['interval_ms']:g} ms")


def _or_dash(value: float | None) -> str:
    return "-" if value is None else count_text(value)


def _drawing(points: dict[str, list[dict[str, Any]]], key: str, label: str, logarithmic: bool) -> Any:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        modes = [m for m in MODES if any(r["mode"] == m and r[key] is not None for of in points.values() for r in of)]
        for number, mode in enumerate(modes):
            found = [(at, r) for at, of in enumerate(points.values()) for r in of
                     if r["mode"] == mode and r[key] is not None]
            places = [at + (number - (len(modes) - 1) / 2) * 0.1 for at, _ in found]
            bars = [[r[key] - r["relative_low"] for _, r in found], [r["relative_high"] - r[key] for _, r in found]]
            style = colour(MODES.index(mode)) | {"linestyle": "none"}
            axes.errorbar([r[key] for _, r in found], places, xerr=bars if key == "relative" else None, label=mode,
                          capsize=2, **style)
        axes.set_yticks(range(len(points)), list(points))
        axes.invert_yaxis()
        axes.set(xlabel=label)
        if logarithmic:
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, 1.1 * max(1.0, *(r[key] for of in points.values() for r in of)))
        figure.legend(loc="outside upper left", ncols=7)

    return draw
