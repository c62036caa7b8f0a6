"""What ``vmm stress`` found: each figure against the number of vCPUs."""

from __future__ import annotations

from typing import Any

from ...tables import digits_text, size_text
from ..stress.sweep import Point
from .document import Figure, Section, Table, count_text
from .style import colour

__all__ = ["section"]

#: What it is called there, here, in its title, and at its axis.
_FIGURES = (("pages_per_s", "throughput", "Pages dirtied per second", "pages/s, all vCPUs"),
            ("stalled_percent", "stalls", "Share of vCPU time in stalls at full rings", "stalled (%)"),
            ("ring_full_per_s", "full-rings", "Full-ring exits per second", "exits/s, all vCPUs"),
            ("flush_ms", "flush", "Time of a flush, median", "flush (ms)"))
_SAYS = {"flush_ms": " What a request takes that flushes nothing is deducted, which can leave less than nothing."}
#: What each panel is of; the rest tells its lines.
_PANEL = ("accel", "load")
_ABREAST = 2        # panels
_LETTERS = 110      # of the legend, side by side


def section(document: dict[str, Any]) -> Section:
    """``document``: as vmm/lab/stress/report.py makes it. Raises LookupError, TypeError, ValueError for another."""
    rows = document["summary"]
    measured = [r for r in rows if r["repetitions"]]
    lost, failed = document["lost_pages"], [r for r in rows if not r["repetitions"]]
    proved = sum(r["rounds"] for r in rows)
    outcome = (f"{lost:,} pages were lost." if lost else "No page was lost." if proved else "It was not verified.")
    found = Section("stress", "Sweep", f"Measured: {len(measured)} of {len(rows)} points. {outcome}")
    host = document["host"]
    if host is not None:
        found.facts.append(("host", f"{host['cpu']}, {host['cores']} cores, {host['memory_mib']:,} MiB, "
                                    f"Linux {host['kernel']}"))
    found.facts += [("verification", f"{proved:,} rounds"),
                   ("repetitions", ", ".join(sorted({str(r["repetitions"]) for r in measured})))]
    if not document["complete"]:
        found.warnings.append("the sweep is not complete: the same command resumes it")
    if document["surplus_pages"]:
        found.warnings.append(f"{document['surplus_pages']:,} pages were logged that had not been written")
    found.warnings += [f"{_point(r)}: {r['error']}" for r in failed]
    if not measured:
        return found
    measured.sort(key=lambda r: r["point"]["vcpus"])
    parts = [_parts(_point(r)) for r in measured]
    shared = [name for name in parts[0] if len({each[name] for each in parts}) == 1]
    if shared:
        found.facts.append(("all points", ", ".join(parts[0][name] for name in shared)))
    panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row, each in zip(measured, parts, strict=True):
        panel, line = (", ".join(each[name] for name in each if name not in shared and (name in _PANEL) is of_panel)
                       for of_panel in (True, False))
        panels.setdefault(panel, {}).setdefault(line, []).append(row)
    table = Table("Points, medians over the repetitions", ["point", "vCPUs", *(label for _, _, _, label in _FIGURES),
                                                           "longest flush (ms)", "pages lost"],
                  [[", ".join(filter(None, (panel, line))) or "all", str(r["point"]["vcpus"]),
                    *(count_text(r["median"][key]) for key, *_ in _FIGURES), count_text(r["most"]["worst_flush_ms"]),
                    str(r["lost"]) if r["rounds"] else "not verified"]
                   for panel, lines in panels.items() for line, of in lines.items() for r in of])
    for key, name, title, label in _FIGURES:
        best = max(measured, key=lambda r: r["median"][key])
        found.figures.append(Figure(
            f"stress-{name}", title,
            f"Most at {_point(best)}: {count_text(best['median'][key])} ({label}). Medians; bars from the least to the "
            "most of the repetitions." + (" The dotted line is the host's number of cores." if host is not None else "")
            + (" Each panel has its own scale." if len(panels) > 1 else "") + _SAYS.get(key, ""),
            _drawing(panels, key, label, None if host is None else host["cores"]), table, (8.0, _height(panels))))
    if document["model"]:
        found.tables.append(Table(
            "Scaling model", ["quantity", "unit", "model", "R²", "points"],
            [[f"{fit['accel']}: {fit['quantity']}", fit["unit"],
              " + ".join(f"{digits_text(t['value'], 4)}" + ("" if t["name"] == "constant" else f" x {t['name']}")
                         for t in fit["terms"]), f"{fit['r2']:.2f}", str(fit["points"])] for fit in document["model"]]))
    return found


def _point(row: dict[str, Any]) -> Point:
    """Raises LookupError, TypeError, ValueError for another version's."""
    point = row["point"]
    return Point(**{**point, "params": tuple((name, value) for name, value in point["params"])})


def _parts(point: Point) -> dict[str, str]:
    """What there is to say of it, but for its number of vCPUs."""
    return {"accel": point.accel, "load": point.load, "ram": size_text(point.ram), "ring": point.rings,
            "reaper": point.reaper, "machines": f"{point.machines} machine{'s' if point.machines > 1 else ''}"}


def _labels(panels: dict[str, dict[str, list[dict[str, Any]]]]) -> tuple[list[str], int]:
    """Of all lines; and in how many columns they fit."""
    labels = [label for label in dict.fromkeys(line for lines in panels.values() for line in lines) if label]
    return labels, max(1, _LETTERS // (max(map(len, labels), default=0) + 6))


def _height(panels: dict[str, dict[str, list[dict[str, Any]]]]) -> float:
    """Inches: for rows of panels, and of the legend."""
    labels, columns = _labels(panels)
    return 0.3 + 3.0 * -(-len(panels) // _ABREAST) + 0.18 * -(-len(labels) // columns)


def _drawing(panels: dict[str, dict[str, list[dict[str, Any]]]], key: str, label: str, cores: int | None) -> Any:
    labels, columns = _labels(panels)

    def draw(figure: Any) -> None:
        across = min(_ABREAST, len(panels))
        grid = figure.subplots(-(-len(panels) // across), across, squeeze=False)
        for axes in grid.flat[len(panels):]:
            axes.remove()
        known: dict[str, Any] = {}
        for axes, (panel, lines) in zip(grid.flat, panels.items(), strict=False):
            for line, rows in lines.items():
                middle = [r["median"][key] for r in rows]
                bars = [[m - r["least"][key] for m, r in zip(middle, rows, strict=True)],
                        [r["most"][key] - m for m, r in zip(middle, rows, strict=True)]]
                known[line] = axes.errorbar([r["point"]["vcpus"] for r in rows], middle, bars, capsize=3,
                                            **colour(labels.index(line) if line else 0))
            if cores is not None:
                axes.axvline(cores, color="grey", linestyle=":", linewidth=1)
            counts = sorted({r["point"]["vcpus"] for rows in lines.values() for r in rows})
            axes.set(title=panel, xlabel="vCPUs", ylabel=label)
            if all(r["least"][key] >= 0 for rows in lines.values() for r in rows):      # a flush may be below it
                axes.set_ylim(0, None)
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(n) for n in counts])
            axes.minorticks_off()
        if labels:
            figure.legend([known[each] for each in labels], labels, loc="outside upper left", ncols=columns)

    return draw
