"""The events of a machine (``vmm events --format jsonl``): how full its rings were, when its vCPUs stalled and for how
long, and what the reaper did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...consumers.events.event import BEGINNINGS, Event
from .document import Figure, Section, Table, count_text, seconds_text
from .style import COLOURS, colour

__all__ = ["section"]

_LINES = 6          # vCPUs with a line of their own
_PANELS = 8         # and of the timeline
_BINS = 100         # of time
_MOMENTS = 400      # of the time, to draw
_MOST = 4000        # points of a line
_WAITS = {"stall": "stalled at a full ring", "pause": "paused", "throttle": "throttled"}
_SHADES = {"stall": COLOURS[1], "pause": COLOURS[0], "throttle": COLOURS[3]}


class _Seen:
    """What the events say, by vCPU. Times in seconds since the first."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.began = min(e.at - e.took for e in events)
        self.seconds = max(max(e.at for e in events) - self.began, 1e-9)
        self.waits: dict[str, dict[int, list[tuple[float, float]]]] = {kind: {} for kind in _WAITS}
        self.fill: dict[int, list[tuple[float, int]]] = {}
        self.harvested: dict[int, list[tuple[float, int]]] = {}
        self.reaps: list[tuple[float, float, float]] = []       # at, took, until the next
        self.flushes: list[float] = []
        self.missing = sum(int(e.fields["count"]) for e in events if e.name == "dropped")
        self.vcpus: set[int] = set()
        begun: dict[tuple[int, str], float] = {}
        for event in sorted(events, key=lambda e: e.at):
            self._take(event, event.at - self.began, begun)
        for (vcpu, kind), at in begun.items():      # it waits still
            self.waits[kind].setdefault(vcpu, []).append((at, self.seconds - at))

    def _take(self, event: Event, at: float, begun: dict[tuple[int, str], float]) -> None:
        name, fields = event.name, event.fields
        if event.source.startswith("vcpu"):
            vcpu = int(event.source.removeprefix("vcpu"))
            self.vcpus.add(vcpu)
            if name in BEGINNINGS:
                begun[vcpu, BEGINNINGS[name]] = at
            elif name in self.waits:
                begun.pop((vcpu, name), None)
                self.waits[name].setdefault(vcpu, []).append((at - event.took, event.took))
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


def section(events: Sequence[Event], name: str) -> Section:
    """``name``: of their file, or of the machine. Raises LookupError, TypeError, ValueError for what ``vmm events``
    does not write."""
    if not events:
        return Section("events", f"Events ({name})", "There is none.")
    seen = _Seen(events)
    stalls = [took for of in seen.waits["stall"].values() for _, took in of]
    share = 100 * sum(stalls) / (seen.seconds * max(1, len(seen.vcpus)))
    times = "once" if len(stalls) == 1 else f"{len(stalls):,} times"
    stalled = (f"vCPUs stalled {times} at full rings, for {share:.2g} % of their time" if stalls else
               "no vCPU stalled at a full ring")
    found = Section("events", f"Events ({name})", f"In {seconds_text(seen.seconds)} {stalled}.")
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
    if any(of for kind in seen.waits.values() for of in kind.values()):
        found.figures.append(_timeline(seen))
    if len(stalls) > 2:
        found.figures.append(_distribution(seen, stalls))
    if seen.fill:
        found.figures += [_fill(seen), _rate(seen)]
    if seen.reaps:
        found.figures.append(_reaper(seen))
    return found


def _timeline(seen: _Seen) -> Figure:
    rows = [[f"vCPU {vcpu}", _WAITS[kind], f"{len(of):,}", seconds_text(sum(t for _, t in of)),
             seconds_text(max(t for _, t in of)), f"{100 * sum(t for _, t in of) / seen.seconds:.2g}"]
            for vcpu in sorted(seen.vcpus) for kind in _WAITS if (of := seen.waits[kind].get(vcpu))]
    shown = sorted(sorted(seen.vcpus, key=lambda v: -sum(t for _, t in seen.waits["stall"].get(v, [])))[:_PANELS])
    some = "" if len(shown) == len(seen.vcpus) else f" Those {_PANELS} of {len(seen.vcpus)} that stalled longest."
    return Figure(
        "events-timeline", "When vCPUs were held out of the guest",
        f"The share of each {seconds_text(seen.seconds / _MOMENTS)}; a mark below for each stall. Stalls of all vCPUs "
        "at once are a reaper that comes too late, or takes too long; those of one are a ring too small for its rate."
        + some,
        lambda figure: _draw_timeline(figure, seen, shown),
        Table("Times out of the guest", ["vCPU", "why", "times", "in all", "longest", "% of the time"], rows),
        (8.0, 1.0 + 0.9 * len(shown)))


def _draw_timeline(figure: Any, seen: _Seen, vcpus: list[int]) -> None:
    edges = np.linspace(0, seen.seconds, _MOMENTS + 1)
    kinds = [kind for kind in _WAITS if seen.waits[kind]]
    panels = figure.subplots(len(vcpus), 1, sharex=True, squeeze=False)
    for vcpu, (axes,) in zip(vcpus, panels, strict=True):
        below = np.zeros(_MOMENTS)
        for kind in kinds:
            share = 100 * np.diff(_passed(seen.waits[kind].get(vcpu, []), edges)) / np.diff(edges)
            axes.stairs(below + share, edges, baseline=below, fill=True, color=_SHADES[kind], label=_WAITS[kind])
            below = below + share
        marks = np.unique(np.searchsorted(edges, [at for at, _ in seen.waits["stall"].get(vcpu, [])]))
        axes.vlines(edges[np.minimum(marks, _MOMENTS)], -16, -6, color=_SHADES["stall"], linewidth=0.8)
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
    for vcpu, of in sorted(seen.waits["stall"].items()):
        took = np.array([t for _, t in of])
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


def _fill(seen: _Seen) -> Figure:
    highest = {vcpu: max(n for _, n in points) for vcpu, points in seen.fill.items()}
    rows = [[f"vCPU {vcpu}", f"{len(seen.harvested[vcpu]):,}", f"{highest[vcpu]:,}",
             count_text(float(np.mean([n for _, n in seen.harvested[vcpu]])))] for vcpu in sorted(seen.fill)]
    most = max(highest, key=lambda v: highest[v])
    return Figure(
        "events-fill", "How full the rings were",
        f"Entries in each ring when it was harvested, and none once it was reset. Fullest was that of vCPU {most}, "
        f"with {highest[most]:,} entries.",
        lambda figure: _draw_fill(figure, seen),
        Table("Rings", ["vCPU", "harvests", "most entries", "entries per harvest, mean"], rows),
        (8.0, 1.0 + 0.9 * min(_LINES, len(seen.fill))))


def _draw_fill(figure: Any, seen: _Seen) -> None:
    """A panel for each vCPU, of those that dirty most: the most that was in its ring in each moment that can be told
    from the next."""
    busy = sorted(sorted(seen.fill, key=lambda v: -sum(n for _, n in seen.fill[v]))[:_LINES])
    top = max(n for vcpu in busy for _, n in seen.fill[vcpu])
    panels = figure.subplots(len(busy), 1, sharex=True, sharey=True, squeeze=False)
    for number, (vcpu, (axes,)) in enumerate(zip(busy, panels, strict=True)):
        edges = np.linspace(0, seen.seconds, _MOMENTS + 1)
        most = np.zeros(_MOMENTS)
        at = np.array([at for at, _ in seen.fill[vcpu]])
        np.maximum.at(most, np.minimum((at / seen.seconds * _MOMENTS).astype(int), _MOMENTS - 1),
                      [n for _, n in seen.fill[vcpu]])
        axes.stairs(most, edges, fill=True, color=COLOURS[number], label=f"vCPU {vcpu}")
        axes.set(xlim=(0, seen.seconds), ylim=(0, 1.05 * top))
        axes.set_title(f"vCPU {vcpu}", fontsize=8, pad=2)
    panels[-1][0].set_xlabel("time (s)")
    figure.supylabel("entries in the ring", fontsize=9)


def _rate(seen: _Seen) -> Figure:
    edges = np.linspace(0, seen.seconds, _BINS + 1)
    width = seen.seconds / _BINS
    rates: dict[int, NDArray[np.float64]] = {
        vcpu: np.histogram([at for at, _ in points], edges, weights=[n for _, n in points])[0] / width
        for vcpu, points in seen.harvested.items()}
    total = sum(rates.values())
    assert isinstance(total, np.ndarray)
    return Figure(
        "events-rate", "Entries harvested per second",
        f"Of all vCPUs {count_text(float(total.mean()))} entries/s in the mean, {count_text(float(total.max()))} at "
        "most. An entry counts when it is harvested: late reaps make peaks.",
        lambda figure: _draw_lines(figure, {v: list(zip(edges[:-1], rate, strict=True)) for v, rate in rates.items()},
                                   seen, "entries/s"),
        Table("Rates", ["from (s)", *(f"vCPU {v} (entries/s)" for v in sorted(rates)[:_LINES])],
              [[f"{edge:.3f}", *(f"{rates[v][i]:,.0f}" for v in sorted(rates)[:_LINES])]
               for i, edge in enumerate(edges[:-1])]))


def _draw_lines(figure: Any, lines: dict[int, list[tuple[float, Any]]], seen: _Seen, label: str) -> None:
    axes = figure.subplots()
    busy = sorted(sorted(lines, key=lambda v: -sum(n for _, n in lines[v]))[:_LINES])
    for number, vcpu in enumerate(busy):
        points = lines[vcpu][::max(1, len(lines[vcpu]) // _MOST)]
        axes.step([at for at, _ in points], [n for _, n in points], where="post", label=f"vCPU {vcpu}",
                  **(colour(number) | {"marker": "", "linewidth": 1.0}))
    axes.set(xlabel="time (s)", ylabel=label, xlim=(0, seen.seconds), ylim=(0, None))
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
