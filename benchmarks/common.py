"""What the benchmarks share: runs in pairs, ratios, tables, JSON, pictures.

Only ratios of runs that were made in turns (A B A B ...) say anything: the host may be faster or slower from one
minute to the next, and then is so for both. A ratio is given with its median and its middle half.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Case", "Results", "arguments_parser", "host", "in_turns", "quartiles"]

CONSOLE = Console(width=116, highlight=False)


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return ordered[0], ordered[0], ordered[0]
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, middle, high


def in_turns(measures: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Measure each in turn, ``rounds`` times: {name: what it returned each time}. Every other round goes through
    them backwards, so that none always comes right after another."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    for number in range(rounds):
        for name in list(measures)[::-1 if number % 2 else 1]:
            found[name].append(measures[name]())
    return found


@dataclass
class Case:
    """One comparison: the runs of ours and the peer's in the order they were made, {quantity: value} each."""

    name: str
    ours: list[dict[str, float]]
    peer: list[dict[str, float]]
    #: {quantity: least ratio wanted} where more is better; {quantity: most wanted} where less is.
    at_least: dict[str, float] = field(default_factory=dict)
    at_most: dict[str, float] = field(default_factory=dict)

    def ratio(self, quantity: str) -> tuple[float, float, float]:
        """Quartiles of ours / the peer's, run by run."""
        pairs = [a[quantity] / b[quantity] for a, b in zip(self.ours, self.peer, strict=True) if b[quantity]]
        return quartiles(pairs) if pairs else (float("nan"),) * 3

    def median(self, side: str, quantity: str) -> float:
        return statistics.median(run[quantity] for run in getattr(self, side))

    def verdict(self, quantity: str) -> str:
        """Whether the target is met, by the median; empty where there is none."""
        middle = self.ratio(quantity)[1]
        if quantity in self.at_least:
            return f"{'met' if middle >= self.at_least[quantity] else 'not met'} (>= {self.at_least[quantity]:g})"
        if quantity in self.at_most:
            return f"{'met' if middle <= self.at_most[quantity] else 'not met'} (<= {self.at_most[quantity]:g})"
        return ""


class Results:
    """The cases of one benchmark. ``quantities``: {name: (what a table calls it, factor, format)}."""

    def __init__(self, name: str, title: str, peer: str, quantities: dict[str, tuple[str, float, str]]) -> None:
        self.name = name
        self.title = title
        self.peer = peer
        self.quantities = quantities
        self.cases: list[Case] = []
        self.skipped = ""

    def table(self) -> Table:
        table = Table("case", "what", "ours", self.peer, "ratio", "middle half", "target", title=self.title)
        for case in self.cases:
            first = case.name
            for quantity, (label, factor, style) in self.quantities.items():
                if quantity not in case.ours[0] or quantity not in case.peer[0]:
                    continue
                low, middle, high = case.ratio(quantity)
                table.add_row(first, label, format(case.median("ours", quantity) * factor, style),
                              format(case.median("peer", quantity) * factor, style), f"{middle:.2f}",
                              f"{low:.2f} to {high:.2f}", case.verdict(quantity))
                first = ""
        return table

    def markdown(self) -> str:
        lines = [f"| case | what | ours | {self.peer} | ratio | middle half | target |",
                 "| --- | --- | --- | --- | --- | --- | --- |"]
        for case in self.cases:
            first = case.name
            for quantity, (label, factor, style) in self.quantities.items():
                if quantity not in case.ours[0] or quantity not in case.peer[0]:
                    continue
                low, middle, high = case.ratio(quantity)
                lines.append(f"| {first} | {label} | {case.median('ours', quantity) * factor:{style}} | "
                             f"{case.median('peer', quantity) * factor:{style}} | {middle:.2f} | "
                             f"{low:.2f} to {high:.2f} | {case.verdict(quantity)} |")
                first = ""
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Add these cases to the folder's results.json (a case of the same name is replaced), and to its tables
        and pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        document = json.loads(path.read_text()) if path.exists() else {}
        mine = document.setdefault(self.name, {})
        mine.update(title=self.title, peer=self.peer, skipped=self.skipped, host=host(),
                    command="python -m benchmarks " + " ".join(sys.argv[1:]))
        cases = {case["name"]: case for case in mine.get("cases", [])}
        cases.update({case.name: asdict(case) for case in self.cases})
        mine["cases"] = list(cases.values())
        path.write_text(json.dumps(document, indent=1) + "\n")
        self.cases = [Case(**case) for case in mine["cases"]]
        (folder / f"{self.name}.md").write_text(self.markdown())
        if self.cases:
            self.draw(folder / f"{self.name}.png")

    def draw(self, path: Path) -> None:
        """The ratios, with their middle halves."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = [(f"{case.name}: {label}", case.ratio(quantity), (case.at_least | case.at_most).get(quantity))
                for case in self.cases for quantity, (label, _, _) in self.quantities.items()
                if quantity in case.ours[0] and quantity in case.peer[0]]
        figure: Any = Figure(figsize=(9, 0.8 + 0.3 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for at, (_, (low, middle, high), target) in enumerate(rows):
            axes.plot([low, high], [at, at], color="C0", linewidth=4, alpha=0.4)
            axes.plot(middle, at, "o", color="C0")
            if target is not None:
                axes.plot(target, at, "k|", markersize=12)
        axes.axvline(1.0, color="k", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set(xlabel=f"ours / {self.peer} (bar: middle half of the pairs; |: target)", title=self.title,
                 xlim=(0, None))
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=90)

    def show(self) -> None:
        if self.skipped:
            CONSOLE.print(f"{self.name}: skipped: {self.skipped}")
        if self.cases:
            CONSOLE.print(self.table())


def host() -> str:
    """One line about where this was measured."""
    model = "unknown CPU"
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, "
            f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")


def arguments_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few, short runs: to see that it works")
    parser.add_argument("--rounds", type=int, help="pairs of runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for what was found")
    return parser
