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
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ipc.shm import SHM_DIRECTORY

__all__ = ["Case", "Results", "Targets", "arguments_parser", "host", "in_turns", "quartiles", "quiet", "warm"]

QUIET = 0.1     # of a core: what others may use
CONSOLE = Console(width=116, highlight=False)


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return ordered[0], ordered[0], ordered[0]
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, middle, high


def in_turns(measures: dict[str, Callable[[], dict[str, float]]], rounds: int, *,
             patience: float = 0.0) -> dict[str, list[dict[str, float]]]:
    """Measure each in turn, ``rounds`` times: {name: what it returned each time}. Every other round goes through
    them backwards, so that none always comes right after another.

    Before each run the host is to be quiet, which is waited for ``patience`` seconds at most; "busy" is then how
    much of a core others used right before and right after the run, whichever was more."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    for number in range(rounds):
        for name in list(measures)[::-1 if number % 2 else 1]:
            before = quiet(patience)
            run = measures[name]()
            found[name].append({**run, "busy": max(before, quiet(0.0))})
    return found


def quiet(patience: float) -> float:
    """Wait until others use less than a tenth of a core, ``patience`` seconds at most; what they use."""
    deadline = time.monotonic() + patience
    while (busy := _busy(0.1)) > QUIET and time.monotonic() < deadline:
        pass
    return busy


def warm(mib: int) -> None:
    """Have so much of the host's memory at hand. What this host's own host has to find first, because nobody has
    touched it since it started or it was given back, costs four times as much (0.7 s a GiB here), and whichever side
    is measured first would pay."""
    with tempfile.TemporaryFile(dir=SHM_DIRECTORY) as file:
        piece = bytes(1 << 20)
        for _ in range(mib):
            file.write(piece)


def _busy(seconds: float) -> float:
    """Cores in use over so many seconds, while this process sleeps."""
    def ticks() -> int:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return user + nice + system + irq + softirq + steal

    before, began = ticks(), time.monotonic()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)


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
        """Quartiles of ours / the peer's, run by run; of the pairs that were not disturbed, if there are enough."""
        pairs = [a[quantity] / b[quantity] for a, b in self.pairs() if b[quantity]]
        return quartiles(pairs) if pairs else (float("nan"),) * 3

    def pairs(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        """The pairs of runs that others left alone, or all of them if those are fewer than three."""
        every = list(zip(self.ours, self.peer, strict=True))
        calm = [(a, b) for a, b in every if max(a.get("busy", 0.0), b.get("busy", 0.0)) <= 3 * QUIET]
        return calm if len(calm) >= 3 else every

    def median(self, side: str, quantity: str) -> float:
        return statistics.median(pair[side == "peer"][quantity] for pair in self.pairs())

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


class Targets:
    """Figures of our own, each with the most that it should be: measured row by row, printed at once, and kept as a
    Markdown table."""

    def __init__(self, name: str, rounds: int, patience: float) -> None:
        self._name = name
        self._rounds = rounds
        self._patience = patience
        self._lines = ["| what | median | least to most | target | |", "| --- | --- | --- | --- | --- |"]

    def add(self, what: str, run: Callable[[], float], unit: str, target: float, style: str = ".2f") -> None:
        """A row: ``run`` measures once."""
        values = []
        for _ in range(self._rounds):
            quiet(self._patience)
            values.append(run())
        middle = statistics.median(values)
        row = (what, f"{middle:{style}} {unit}", f"{min(values):{style}} to {max(values):{style}}",
               f"at most {target:g} {unit}", "met" if middle <= target else "not met")
        CONSOLE.print(f"{what}: {row[1]} ({row[2]}), {row[3]}: {row[4]}")
        self._lines.append("| " + " | ".join(row) + " |")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self._name}.md").write_text("\n".join([host(), "", *self._lines]) + "\n")


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
    parser.add_argument("--patience", type=float, default=20.0,
                        help="seconds to wait before a run until the host is quiet")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for what was found")
    return parser
