"""What ``vmm stress`` found: each figure against the number of vCPUs."""

from __future__ import annotations

from typing import Any

from ...tables import size_text
from .document import Figure, Section, Table, count_text
from .style import colour

__all__ = ["section"]

#: What it is called there, here, in its title, and at its axis.
_FIGURES = (("pages_per_s", "throughput", "Pages dirtied per second", "pages/s, all vCPUs"),
            ("stalled_percent", "stalls", "Share of vCPU time in stalls at full rings", "stalled (%)"),
            ("ring_full_per_s", "full-rings", "Full-ring exits per second", "exits/s, all vCPUs"),
            ("flush_ms", "flush", "Time of a flush, median", "flush (ms)"))


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
    found.warnings += [f"{_line(r['point'])}, {r['point']['vcpus']} vCPUs: {r['error']}" for r in failed]
    if not measured:
        return found
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(measured, key=lambda r: r["point"]["vcpus"]):
        lines.setdefault(_line(row["point"]), []).append(row)
    table = Table("Points, medians over the repetitions", ["point", "vCPUs", *(label for _, _, _, label in _FIGURES),
                                                           "longest flush (ms)", "pages lost"],
                  [[line, str(r["point"]["vcpus"]), *(count_text(r["median"][key]) for key, *_ in _FIGURES),
                    count_text(r["most"]["worst_flush_ms"]), str(r["lost"]) if r["rounds"] else "not verified"]
                   for line, of in lines.items() for r in of])
    for key, name, title, label in _FIGURES:
        best = max(measured, key=lambda r: r["median"][key])
        many = "s" if best["point"]["vcpus"] > 1 else ""
        found.figures.append(Figure(
            f"stress-{name}", title,
            f"Most with {best['point']['vcpus']} vCPU{many} ({_line(best['point'])}): {label}: "
            f"{count_text(best['median'][key])}. Medians; bars from the least to the most of the repetitions."
            + (" The dotted line is the host's number of cores." if host is not None else ""),
            _drawing(lines, key, label, None if host is None else host["cores"]), table, (8.0, 3.6)))
    if document["model"]:
        found.tables.append(Table(
            "Scaling model", ["quantity", "unit", "model", "R²", "points"],
            [[f"{fit['accel']}: {fit['quantity']}", fit["unit"],
              " + ".join(f"{t['value']:.4g}" + ("" if t["name"] == "constant" else f" x {t['name']}")
                         for t in fit["terms"]), f"{fit['r2']:.2f}", str(fit["points"])] for fit in document["model"]]))
    return found


def _line(point: dict[str, Any]) -> str:
    load = point["workload"] + "".join(f" {name} {value:g}" for name, value in point["params"])
    ring = f"ring {point['ring']:,}" if point["ring"] else "bitmap"
    limit = f", at most {point['dirty_limit'] / 1e6:g} MB/s" if point["dirty_limit"] else ""
    return f"{point['accel']}, {load}, {size_text(point['ram'])}, {ring}, {point['reaper']}{limit}"


def _drawing(lines: dict[str, list[dict[str, Any]]], key: str, label: str, cores: int | None) -> Any:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (line, rows) in enumerate(lines.items()):
            middle = [r["median"][key] for r in rows]
            bars = [[m - r["least"][key] for m, r in zip(middle, rows, strict=True)],
                    [r["most"][key] - m for m, r in zip(middle, rows, strict=True)]]
            axes.errorbar([r["point"]["vcpus"] for r in rows], middle, bars, capsize=3, label=line, **colour(number))
        if cores is not None:
            axes.axvline(cores, color="grey", linestyle=":", linewidth=1)
        counts = sorted({r["point"]["vcpus"] for rows in lines.values() for r in rows})
        axes.set(xlabel="vCPUs", ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        figure.legend(loc="outside upper left", ncols=1 if len(lines) < 3 else 2)

    return draw
