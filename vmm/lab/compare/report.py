"""``vmm compare`` to look at: the table, the verdict on ``auto``, the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ... import optional
from ...tables import print_table, table
from .measure import FIXED, MODES

__all__ = ["draw", "print_rows", "verdict"]

_COLOURS = {"none": "black", "ring": "tab:blue", "bitmap": "tab:orange", "uffd": "tab:green",
            "sampling": "tab:purple", "idle": "tab:gray", "auto": "tab:red"}
_PANELS = (("relative", "guest speed (none = 1)", False), ("lost_us", "guest cost, us per dirty page", False),
           ("host_us", "host cost, us per dirty page", True), ("collect_ms", "time to collect, ms", True))
_AXES = {"spin": "pauses per write", "ram_mib": "RAM, MiB", "vcpus": "vCPUs", "ring": "ring entries",
         "interval_ms": "sync interval, ms"}


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


_KEYS = ("RAM", "vCPUs", "spin", "ring", "interval", "tracking")


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, a line for each mode at each point."""
    print_table(_table(rows), console, len(_KEYS))


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = table(*_KEYS, numbers=("writes/s", "vs none", "spread", "dirty/s", "guest us/page", "host us/page",
                                   "collect ms", "us/MiB", "us/page", "stale ms", "vs best"))
    last = None
    for r in rows:
        point = (f"{r['ram_mib']} MiB", str(r["vcpus"]), str(r["spin"]), str(r["ring"]), f"{r['interval_ms']:g} ms")
        shown.add_row(*(point if point != last else [""] * 5), r["mode"], f"{r['speed']:,.0f}",
                      _number(r["relative"], 3), f"{r['relative_low']:.2f}-{r['relative_high']:.2f}",
                      f"{r['dirty_per_s']:,.0f}" if r["collect_ms"] is not None else "-", _number(r["lost_us"]),
                      _number(r["host_us"]), _number(r["collect_ms"]), _number(r["collect_us_per_mib"], 1),
                      _number(r["collect_us_per_page"]), _number(r["stale_ms"], 1), _number(r.get("of_best"), 3))
        last = point
    return shown


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """A line per finding: which mode was fastest how often, and how auto did."""
    points: dict[Any, list[dict[str, Any]]] = {}
    for r in rows:
        points.setdefault(tuple(r[a] for a in _AXES), []).append(r)
    wins: dict[str, int] = {}
    for found in points.values():
        fixed = [r for r in found if r["mode"] in FIXED]
        if len(fixed) > 1:
            best = max(fixed, key=lambda r: r["relative"])["mode"]
            wins[best] = wins.get(best, 0) + 1
    lines = []
    if wins:
        won = ", ".join(f"{mode} at {n}" for mode, n in sorted(wins.items(), key=lambda item: -item[1]))
        lines.append(f"fastest fixed mode: {won} of {sum(wins.values())} points")
    judged = [r for r in rows if r.get("of_best") is not None]
    if judged:
        worst = min(judged, key=lambda r: r["of_best"])
        where = f"{worst['ram_mib']} MiB, {worst['vcpus']} vCPUs, spin {worst['spin']}, {worst['interval_ms']:g} ms"
        lines.append(f"auto compared with the best fixed mode: {worst['of_best']:.3f} at worst ({where}; best "
                     f"there: {worst['best_fixed']})")
    stolen = max(r["steal"] for r in rows)
    lines.append(f"steal time: other processes ran for {100 * stolen:.0f} % of the time at worst (subtracted)")
    return lines


def draw(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A plot for each axis that has more than one value, the others at the value that most rows have. Raises
    OSError, MissingPackage."""
    made = []
    for axis, axis_label in _AXES.items():
        values = sorted({r[axis] for r in rows})
        if len(values) < 2:
            continue
        groups: dict[Any, list[dict[str, Any]]] = {}
        for r in rows:
            groups.setdefault(tuple(r[a] for a in _AXES if a != axis), []).append(r)
        # One line of panels for each setting of the others that knows more than one value of this axis.
        kept = {at: g for at, g in groups.items() if len({r[axis] for r in g}) > 1}
        if not kept:
            continue
        figure = optional.figure(figsize=(3.6 * len(_PANELS), 2.7 * len(kept)), layout="constrained")
        grid = figure.subplots(len(kept), len(_PANELS), squeeze=False)
        for line, (at, group) in zip(grid, kept.items(), strict=True):
            names = [a for a in _AXES if a != axis]
            for panel, (key, label, logarithmic) in zip(line, _PANELS, strict=True):
                for mode in MODES:
                    points = [(values.index(r[axis]), r[key], r) for r in group
                              if r["mode"] == mode and r[key] is not None]
                    if points:
                        points.sort(key=lambda p: p[0])
                        panel.plot([p[0] for p in points], [p[1] for p in points], "o-", color=_COLOURS[mode],
                                   label=mode, markersize=3, linewidth=1)
                        if key == "relative":
                            panel.fill_between([p[0] for p in points], [p[2]["relative_low"] for p in points],
                                               [p[2]["relative_high"] for p in points], color=_COLOURS[mode],
                                               alpha=0.12, linewidth=0)
                panel.set_xticks(range(len(values)), [f"{v:g}" for v in values], fontsize=7)
                panel.tick_params(labelsize=7)
                panel.set_xlabel(axis_label, fontsize=7)
                panel.set_ylabel(label, fontsize=7)
                if logarithmic:
                    panel.set_yscale("log")
                if key == "relative":
                    panel.set_ylim(0, 1.1)
                panel.grid(alpha=0.3)
            line[0].set_title(", ".join(f"{_AXES[n]} {v:g}" for n, v in zip(names, at, strict=True)), fontsize=7,
                              loc="left")
        grid[0][0].legend(fontsize=6)
        path = folder / f"tracking-{axis.replace('_', '-')}.png"
        figure.savefig(path, dpi=110)
        made.append(path)
    return made
