"""What a sweep found, for people and programs: the table, the model in words, the pictures, results.json."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ... import optional
from ...errors import VmmError
from ...tables import digits_text, print_table, size_text, table
from ..hoststat import cores, describe_host
from .model import Fit, busy_at, fit_all
from .sweep import Point, PointResult, Sweep

__all__ = ["document", "draw", "draw_pictures", "print_model", "print_results", "write_report"]

VERSION = 1
_PICTURES = {"throughput.png": ("pages_per_s", "pages dirtied per second, all vCPUs"),
             "stalls.png": ("stalled_percent", "vCPU time stalled at ring-full (%)"),
             "ring-full-exits.png": ("ring_full_per_s", "ring-full exits per second, all vCPUs"),
             "flush.png": ("flush_ms", "flush, median (ms)")}


def _summary(result: PointResult) -> dict[str, float]:
    """One number per figure: sums over the machines of what adds up, the worst of what does not."""
    figures = result.figures
    flushes = [[us for us, _ in f.flushes] for f in figures if f.flushes]
    return {
        "pages_per_s": sum(f.pages_per_s for f in figures),
        "least_pages_per_s": min(f.pages_per_s for f in figures),
        "reaped_per_s": sum(f.reaped_per_s for f in figures),
        "ring_full_exits": sum(f.ring_full_exits for f in figures),
        "ring_full_per_s": sum(f.ring_full_per_s for f in figures),
        "stalled_percent": 100 * max(f.stalled_share for f in figures),
        "stall_us": max(f.stall_us for f in figures),
        "resets": sum(f.resets for f in figures),
        "reap_us": max(f.reap_us for f in figures),
        "flush_ms": max((statistics.median(f) for f in flushes), default=0.0) / 1e3,
        "worst_flush_ms": max((max(f) for f in flushes), default=0.0) / 1e3,
        "coordinator_percent": 100 * sum(f.coordinator_cpu for f in figures),
        "workers_percent": 100 * sum(f.workers_cpu for f in figures),
        "launch_s": max(f.launch_s for f in figures),
        "worker_pss_mib": max(f.worker_pss_mib for f in figures),
        "pss_mib": sum(f.pss_mib for f in figures),
    }


def _group(results: Sequence[PointResult]) -> dict[Point, list[PointResult]]:
    """Repetitions of a point together, under its first."""
    groups: dict[Point, list[PointResult]] = {}
    for result in results:
        groups.setdefault(replace(result.point, repetition=0), []).append(result)
    return groups


def summaries(results: Sequence[PointResult]) -> list[dict[str, Any]]:
    """A row per point: median, least and most of each figure over its repetitions; pages lost and surplus in
    all."""
    rows = []
    for point, group in _group(results).items():
        measured = [_summary(r) for r in group if r.figures]
        row: dict[str, Any] = {
            "point": point, "repetitions": len(measured), "lost": sum(r.lost for r in group),
            "surplus": sum(r.surplus for r in group), "rounds": sum(p.rounds for r in group for p in r.proof),
            "error": next((r.error for r in group if r.error), ""), "median": {}, "least": {}, "most": {}}
        for name in measured[0] if measured else ():
            values = [m[name] for m in measured]
            row["median"][name] = statistics.median(values)
            row["least"][name], row["most"][name] = min(values), max(values)
        rows.append(row)
    return rows


# --- table --------------------------------------------------------------------------------------------


def print_results(results: Sequence[PointResult], console: Console) -> None:
    """The table: medians over the repetitions. Columns that are the same in all rows stand in its title."""
    whole, keys = _results_table(results)
    print_table(whole, console, keys)


def _results_table(results: Sequence[PointResult]) -> tuple[Table, int]:
    """And how many of its columns say which point it is."""
    rows = summaries(results)
    columns: dict[str, Callable[[Point], str]] = {
        "accel": lambda p: p.accel, "workload": lambda p: p.load, "RAM": lambda p: size_text(p.ram),
        "ring": lambda p: f"{p.ring:,}" if p.ring else "bitmap", "reaper": lambda p: p.reaper,
        "machines": lambda p: str(p.machines), "vCPUs": lambda p: str(p.vcpus)}
    common = {name: text(rows[0]["point"]) for name, text in columns.items()
              if name != "vCPUs" and len({text(r["point"]) for r in rows}) == 1}
    title = ", ".join(f"{name} {value}" for name, value in common.items())
    shown = [name for name in columns if name not in common]
    made = table(title=title or None)
    for name in shown:
        made.add_column(name, justify="left" if name in ("accel", "workload", "reaper") else "right", no_wrap=True)
    for name in ("pages/s", "ring full/s", "stalled %", "flush ms", "worst", "coord. %", "PSS MiB", "launch s",
                 "lost"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        point = [columns[name](row["point"]) for name in shown]
        if row["repetitions"] == 0:
            made.add_row(*point, "[red]failed[/red]")       # why is said below the table
            continue
        m = row["median"]
        lost = f"[red]{row['lost']}[/red]" if row["lost"] else "0" if row["rounds"] else "not verified"
        if row["surplus"]:
            lost += f", {row['surplus']} surplus"
        made.add_row(*point, f"{m['pages_per_s']:,.0f}", f"{m['ring_full_per_s']:.1f}",
                      f"{m['stalled_percent']:.2f}", f"{m['flush_ms']:.2f}", f"{row['most']['worst_flush_ms']:.1f}",
                      f"{m['coordinator_percent']:.1f}", f"{m['worker_pss_mib']:.1f}", f"{m['launch_s']:.2f}", lost)
    return made, len(shown)


def print_model(fits: Sequence[Fit], console: Console) -> None:
    for fit in fits:
        terms = " + ".join(f"{digits_text(t.value, 4)} (±{digits_text(t.error, 2)})"
                           + ("" if t.name == "constant" else f" x {t.name}") for t in fit.terms)
        left = f"; no cost found for: {', '.join(fit.free)}" if fit.free else ""
        left += f"; not varied: {', '.join(fit.left_out)}" if fit.left_out else ""
        crowd = f"; {fit.contended} excluded for lack of a free core" if fit.contended else ""
        console.print(f"{fit.accel}: {fit.quantity} [{fit.unit}] = {terms}   "
                      f"(R2 {fit.r2:.2f}, {fit.points} points{crowd}{left})", markup=False, soft_wrap=True)
        if fit.quantity == "coordinator CPU":
            for ring in (1024, 4096, 65536):
                many = busy_at(fit, 100_000, ring)
                if many is not None:
                    console.print(f"    extrapolated: with rings of {ring:,} entries and 100,000 pages/s per vCPU, "
                                  f"one reaper saturates a core at {many:,.0f} vCPUs", markup=False, soft_wrap=True)


# --- files --------------------------------------------------------------------------------------------


def document(sweep: Sweep, results: Sequence[PointResult], complete: bool) -> dict[str, Any]:
    """results.json."""
    return {
        "version": VERSION, "complete": complete, "host": describe_host(), "sweep": sweep.model_dump(mode="json"),
        "lost_pages": sum(r.lost for r in results), "surplus_pages": sum(r.surplus for r in results),
        "summary": [{**row, "point": asdict(row["point"])} for row in summaries(results)],
        "model": [f.as_dict() for f in fit_all(results)],
        "results": [r.as_dict() for r in results],
    }


def write_report(sweep: Sweep, results: Sequence[PointResult], complete: bool, directory: Path) -> dict[str, Any]:
    """DIR/results.json; the document. Raises VmmError."""
    found = document(sweep, results, complete)
    try:
        aside = directory / "results.json.new"
        aside.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(aside, directory / "results.json")
    except OSError as exc:
        raise VmmError(f"{directory}: cannot be written: {exc.strerror}") from None
    return found


def draw_pictures(results: Sequence[PointResult], directory: Path) -> None:
    """Raises VmmError; MissingPackage without matplotlib."""
    try:
        for name, (figure, label) in _PICTURES.items():
            draw(results, figure, label, directory / name)
    except OSError as exc:
        raise VmmError(f"{directory}: cannot be written: {exc.strerror}") from None


def draw(results: Sequence[PointResult], figure: str, label: str, path: Path) -> None:
    """One figure against the number of vCPUs: a panel for each accelerator and load, a line for each ring size and
    reaper; medians, with bars from the least to the most of the repetitions."""
    rows = [r for r in summaries(results) if r["repetitions"]]
    if not rows:
        return
    panels: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    many_sizes = len({r["point"].ram for r in rows}) > 1
    for row in rows:
        point = row["point"]
        line = f"{point.rings}, {point.reaper}"
        line += f", {size_text(point.ram)}" if many_sizes else ""
        panels.setdefault((point.accel, point.load), {}).setdefault(line, []).append(row)
    wide = min(3, len(panels))
    tall = -(-len(panels) // wide)
    picture = optional.figure(figsize=(4.6 * wide + 0.4, 3.6 * tall + 0.4), layout="constrained")
    grid = picture.subplots(tall, wide, squeeze=False)
    for axes in grid.flat[len(panels):]:
        axes.remove()
    for axes, ((accel, load), lines) in zip(grid.flat, panels.items(), strict=False):
        for line, of_line in lines.items():
            of_line.sort(key=lambda r: r["point"].vcpus)
            middle = [r["median"][figure] for r in of_line]
            bars = [[m - r["least"][figure] for m, r in zip(middle, of_line, strict=True)],
                    [r["most"][figure] - m for m, r in zip(middle, of_line, strict=True)]]
            axes.errorbar([r["point"].vcpus for r in of_line], middle, bars, fmt="o-", capsize=3, label=line)
        axes.axvline(cores(), color="grey", linestyle=":", linewidth=1)
        axes.set(title=f"{accel}, {load}", xlabel="vCPUs (dotted: the host's cores)", ylabel=label)
        if all(r["least"][figure] >= 0 for of_line in lines.values() for r in of_line):     # a flush may be below it
            axes.set_ylim(0, None)
        counts = sorted({r["point"].vcpus for of_line in lines.values() for r in of_line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture.savefig(path, dpi=90)
