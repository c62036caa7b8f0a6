"""The events of a machine (``vmm events --format jsonl``): how full its rings were, when its vCPUs stalled and for how
long, and what the reaper did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...consumers.events.event import BEGINNINGS, Event
from .document import Figure, Section, Table, busiest, count_text, left_out_text, percent_text, seconds_text
from .style import COLOURS, area, colour

__all__ = ["section"]

_LINES = 6          # vCPUs with a line of their own
_PANELS = 8         # and of the timeline
_BINS = 100         # of time
_MOMENTS = 400      # of the time, to draw
_MOST = 4000        # points of a line
_SHORTEST = 0.01    # seconds, below which nothing is said or drawn per second
_WAITS = {"stall": "stalled at a full ring", "pause": "paused", "throttle": "throttled"}
_AREAS = {"stall": 1, "pause": 0, "throttle": 3}


class _Seen:
    """What the events say, by vCPU. Times in seconds since ``began``; ``waits`` have of each only what is later."""

    def __init__(self, events: Sequence[Event], began: float, until: float) -> None:
        self.began = began
        self.seconds = until - began
        self.waits: dict[str, dict[int, list[tuple[float, float]]]] = {kind: {} for kind in _WAITS}
        self.stalls: dict[int, list[float]] = {}                # how long each took, whenever it began
        self.fill: dict[int, list[tuple[float, int]]] = {}
        self.harvested: dict[int, list[tuple[float, int]]] = {}
        self.reaps: list[tuple[float, float, float]] = []       # at, took, until the next
        self.flushes: list[float] = []
        self.missing = sum(int(e.fields["count"]) for e in events if e.name == "dropped")
        self.vcpus: set[int] = set()
        begun: dict[tuple[int, str], float] = {}
        for event in sorted(events, key=lambda e: e.at):
            self._take(event, event.at - self.began, begun)
        for (vcpu, kind), at in begun.items():
            self._waited(kind, vcpu, self.seconds, self.seconds - at)       # it does so still

    def _waited(self, kind: str, vcpu: int, at: float, took: float) -> None:
        begin = max(0.0, at - took)
        self.waits[kind].setdefault(vcpu, []).append((begin, at - begin))
        if kind == "stall":
            self.stalls.setdefault(vcpu, []).append(took)

    def held(self, kind: str, vcpu: int) -> float:
        """Seconds in all."""
        return sum(took for _, took in self.waits[kind].get(vcpu, []))

    def _take(self, event: Event, at: float, begun: dict[tuple[int, str], float]) -> None:
        name, fields = event.name, event.fields
        if event.source.startswith("vcpu"):
            vcpu = int(event.source.removeprefix("vcpu"))
            self.vcpus.add(vcpu)
            if name in BEGINNINGS:
                begun[vcpu, BEGINNINGS[name]] = at
            elif name in self.waits:
                begun.pop((vcpu, name), None)
                self._waited(name, vcpu, at, event.took)
        elif name == "kvm_dirty_ring_reap_vcpu":
            vcpu = int(fields["id"])
            self.vcpus.add(vcpu)
            self.fill.setdefault(vcpu, []).append((at, int(fields["outstanding"])))
            self.harvested.setdefault(vcpu, []).append((at, int(fields["count"])))
        elif name == "reset":
            for points in self.fill.values():
                if points[-1][1]:
                    points.append((at, 0))
        elif name == "kvm_dirty_ring_reap":
            self.reaps.append((at, event.took, float(fields["next_us"]) / 1e6))
        elif name == "kvm_dirty_ring_flush":
            self.flushes.append(event.took)


def section(events: Sequence[Event], name: str, window: tuple[float, float] | None = None) -> Section:
    """``name``: of their file, or of the machine. ``window``: the time that was looked at, of the clock that the events
    have; None: from the first to the last of them. Raises LookupError, TypeError, ValueError for what ``vmm events``
    does not write."""
    if not events:
        return Section("events", f"Events ({name})", "There is none.")
    first, last = min(e.at for e in events), max(e.at for e in events)
    began, until = (first, last) if window is None else (window[0], max(last, window[1]))
    seen = _Seen(events, began, until)
    rates = seen.seconds >= _SHORTEST
    stalls = [took for of in seen.stalls.values() for took in of]
    times = "once" if len(stalls) == 1 else f"{len(stalls):,} times"
    said = f"vCPUs stalled {times} at full rings" if stalls else "no vCPU stalled at a full ring"
    if stalls and rates:
        held = sum(seen.held("stall", vcpu) for vcpu in seen.vcpus)
        said += f", for {percent_text(held, seen.seconds * len(seen.vcpus))} of their time"
    found = Section("events", f"Events ({name})",
                    f"In {seconds_text(seen.seconds) if rates else 'one moment'} {said}.")
    found.facts = [("events", f"{len(events):,}"), ("reaps", f"{len(seen.reaps):,}"),
                   ("flushes", f"{len(seen.flushes):,}"
                    + (f", {seconds_text(float(np.median(seen.flushes)))} in the median" if seen.flushes else ""))]
    if stalls:
        found.facts.append(("stalls", f"{seconds_text(float(np.median(stalls)))} in the median, "
                                      f"{seconds_text(float(np.quantile(stalls, 0.99)))} at the 99th percentile, "
                                      f"{seconds_text(max(stalls))} at most"))
    if seen.missing:
        found.warnings.append(f"{seen.missing:,} events had been overwritten by newer ones before they were read: what "
                              "is earlier is not complete")
    if rates and any(of for kind in seen.waits.values() for of in kind.values()):
        found.figures.append(_timeline(seen))
    if len(stalls) > 2:
        found.figures.append(_distribution(seen, stalls))
    if rates and seen.fill:
        found.figures += [_fill(seen), _rate(seen)]
    if rates and seen.reaps:
        found.figures.append(_reaper(seen))
    return found


def _timeline(seen: _Seen) -> Figure:
    shown = busiest({vcpu: seen.held("stall", vcpu) for vcpu in seen.vcpus}, _PANELS)
    rows = [[f"vCPU {vcpu}", _WAITS[kind], f"{len(of):,}", seconds_text(sum(t for _, t in of)),
             seconds_text(max(t for _, t in of)), percent_text(sum(t for _, t in of), seen.seconds)]
            for vcpu in shown for kind in _WAITS if (of := seen.waits[kind].get(vcpu))]
    return Figure(
        "events-timeline", "When vCPUs were held out of the guest",
        f"The share of each {seconds_text(seen.seconds / _MOMENTS)}; a mark below for each stall. Stalls of all vCPUs "
        "at once are a reaper that comes too late, or takes too long; those of one are a ring too small for its rate."
        + left_out_text(len(shown), len(seen.vcpus), "stalled longest"),
        lambda figure: _draw_timeline(figure, seen, shown),
        Table("Times out of the guest", ["vCPU", "why", "times", "in all", "longest", "of the time"], rows),
        (8.0, 1.0 + 0.9 * len(shown)))


def _draw_timeline(figure: Any, seen: _Seen, vcpus: list[int]) -> None:
    edges = np.linspace(0, seen.seconds, _MOMENTS + 1)
    kinds = [kind for kind in _WAITS if seen.waits[kind]]
    panels = figure.subplots(len(vcpus), 1, sharex=True, squeeze=False)
    for vcpu, (axes,) in zip(vcpus, panels, strict=True):
        below = np.zeros(_MOMENTS)
        for kind in kinds:
            share = 100 * np.diff(_passed(seen.waits[kind].get(vcpu, []), edges)) / np.diff(edges)
            axes.stairs(below + share, edges, baseline=below, fill=True, label=_WAITS[kind], **area(_AREAS[kind]))
            below = below + share
        marks = np.unique(np.searchsorted(edges, [at for at, _ in seen.waits["stall"].get(vcpu, [])]))
        axes.vlines(edges[np.minimum(marks, _MOMENTS)], -16, -6, color=COLOURS[_AREAS["stall"]],
                    linewidth=0.8)
        axes.set(xlim=(0, seen.seconds), ylim=(-18, 100), yticks=[0, 50, 100])
        axes.set_title(f"vCPU {vcpu}", fontsize=8, pad=2)
    panels[-1][0].set_xlabel("time (s)")
    figure.supylabel("out of the guest (%)", fontsize=9)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _passed(spans: list[tuple[float, float]], moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds of the spans, which come one after the other, that are over by each moment."""
    if not spans:
        return np.zeros(len(moments))
    begins, took = np.array(sorted(spans)).T
    times = np.column_stack([begins, begins + took]).ravel()
    over = np.cumsum(took)
    return np.interp(moments, times, np.column_stack([over - took, over]).ravel())


def _distribution(seen: _Seen, stalls: list[float]) -> Figure:
    rows = []
    for vcpu, of in sorted(seen.stalls.items()):
        took = np.array(of)
        rows.append([f"vCPU {vcpu}", f"{len(took):,}",
                     *(seconds_text(float(np.quantile(took, q))) for q in (0.5, 0.9, 0.99, 1.0))])
    return Figure(
        "events-stalls", "How long stalls took",
        f"Half of {len(stalls):,} stalls took {seconds_text(float(np.median(stalls)))} or less, the longest "
        f"{seconds_text(max(stalls))}.", lambda figure: _draw_distribution(figure, stalls),
        Table("Stalls", ["vCPU", "stalls", "median", "90 %", "99 %", "longest"], rows), (8.0, 2.8))


def _draw_distribution(figure: Any, stalls: list[float]) -> None:
    axes = figure.subplots()
    ranked = np.sort(stalls) * 1e3
    axes.step(ranked, 100 * np.arange(1, len(ranked) + 1) / len(ranked), where="post", color=COLOURS[1])
    axes.set(xlabel="stall (ms)", ylabel="stalls that took at most so long (%)", xscale="log", ylim=(0, 102))


def _harvests(seen: _Seen) -> tuple[list[int], str]:
    """The vCPUs that dirty most, and what is said of the others."""
    shown = busiest({vcpu: sum(n for _, n in of) for vcpu, of in seen.harvested.items()}, _LINES)
    return shown, left_out_text(len(shown), len(seen.harvested), "dirtied most")


def _fill(seen: _Seen) -> Figure:
    shown, some = _harvests(seen)
    highest = {vcpu: max(n for _, n in points) for vcpu, points in seen.fill.items()}
    rows = [[f"vCPU {vcpu}", f"{len(seen.harvested[vcpu]):,}", f"{highest[vcpu]:,}",
             count_text(float(np.mean([n for _, n in seen.harvested[vcpu]])))] for vcpu in shown]
    most = max(highest, key=lambda v: highest[v])
    return Figure(
        "events-fill", "How full the rings were",
        f"Entries in each ring since its last harvest, the most within each {seconds_text(seen.seconds / _MOMENTS)}; "
        f"none once it was reset. Fullest was that of vCPU {most}, with {highest[most]:,} entries." + some,
        lambda figure: _draw_fill(figure, seen, shown),
        Table("Rings", ["vCPU", "harvests", "most entries", "entries per harvest, mean"], rows),
        (8.0, 1.0 + 0.9 * len(shown)))


def _draw_fill(figure: Any, seen: _Seen, vcpus: list[int]) -> None:
    edges = np.linspace(0, seen.seconds, _MOMENTS + 1)
    top = max(1, *(n for vcpu in vcpus for _, n in seen.fill[vcpu]))
    panels = figure.subplots(len(vcpus), 1, sharex=True, sharey=True, squeeze=False)
    for number, (vcpu, (axes,)) in enumerate(zip(vcpus, panels, strict=True)):
        axes.stairs(_highest(seen.fill[vcpu], edges), edges, fill=True, color=COLOURS[number])
        axes.set(xlim=(0, seen.seconds), ylim=(0, 1.05 * top))
        axes.set_title(f"vCPU {vcpu}", fontsize=8, pad=2)
    panels[-1][0].set_xlabel("time (s)")
    figure.supylabel("entries in the ring", fontsize=9)


def _highest(points: list[tuple[float, int]], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """The most between each two edges of what each point sets until the next one; 0 before the first."""
    at, values = np.array([at for at, _ in points]), np.array([n for _, n in points])
    before = np.searchsorted(at, edges[:-1], side="right") - 1
    found = np.where(before < 0, 0, values[before])
    np.maximum.at(found, np.clip(np.searchsorted(edges, at, side="right") - 1, 0, len(found) - 1), values)
    return found


def _rate(seen: _Seen) -> Figure:
    shown, some = _harvests(seen)
    edges = np.linspace(0, seen.seconds, _BINS + 1)
    rates = {vcpu: np.histogram([at for at, _ in points], edges, weights=[n for _, n in points])[0] / np.diff(edges)
             for vcpu, points in seen.harvested.items()}
    total = np.sum(list(rates.values()), axis=0)
    return Figure(
        "events-rate", "Entries harvested per second",
        f"Of all vCPUs {count_text(float(total.mean()))} entries/s in the mean, {count_text(float(total.max()))} at "
        "most. An entry counts when it is harvested: late reaps make peaks." + some,
        lambda figure: _draw_rates(figure, {vcpu: rates[vcpu] for vcpu in shown}, edges),
        Table("Rates", ["from (s)", *(f"vCPU {v} (entries/s)" for v in shown)],
              [[f"{edge:.3f}", *(f"{rates[v][i]:,.0f}" for v in shown)] for i, edge in enumerate(edges[:-1])]))


def _draw_rates(figure: Any, rates: dict[int, NDArray[np.float64]], edges: NDArray[np.float64]) -> None:
    axes = figure.subplots()
    for number, (vcpu, rate) in enumerate(rates.items()):
        look = colour(number)
        axes.stairs(rate, edges, baseline=None, label=f"vCPU {vcpu}", linewidth=1.0, color=look["color"],
                    linestyle=look["linestyle"])
    axes.set(xlabel="time (s)", ylabel="entries/s", xlim=(0, edges[-1]), ylim=(0, None))
    figure.legend(loc="outside upper left", ncols=6)


def _reaper(seen: _Seen) -> Figure:
    took, waits = [t for _, t, _ in seen.reaps], [w for _, _, w in seen.reaps]
    return Figure(
        "events-reaper", "The reaper",
        f"The time it chose until its next reap: {seconds_text(float(np.median(waits)))} in the median; a reap took "
        f"{seconds_text(float(np.median(took)))} in the median, {seconds_text(max(took))} at most.",
        lambda figure: _draw_reaper(figure, seen),
        Table("Reaps", ["", "median", "99 %", "most"],
              [[name, *(seconds_text(float(np.quantile(values, q))) for q in (0.5, 0.99, 1.0))]
               for name, values in (("interval chosen", waits), ("time of a reap", took))]), (8.0, 3.0))


def _draw_reaper(figure: Any, seen: _Seen) -> None:
    axes = figure.subplots()
    points = seen.reaps[::max(1, len(seen.reaps) // _MOST)]
    at = [a for a, _, _ in points]
    axes.plot(at, [max(w, 1e-6) * 1e3 for _, _, w in points], **(colour(0) | {"marker": ""}), label="interval chosen")
    axes.plot(at, [max(t, 1e-6) * 1e3 for _, t, _ in points], **(colour(1) | {"linestyle": "none", "markersize": 2}),
              label="time of a reap")
    axes.set(xlabel="time (s)", ylabel="ms", xlim=(0, seen.seconds), yscale="log")
    figure.legend(loc="outside upper left", ncols=2)
