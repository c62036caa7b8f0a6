"""Which pages are dirtied when: a time series of the dirty log, to keep, and to look at.

A recording is a compact .npz (numpy's own format):

====================  =======  ==============================================================================
array                 dtype    meaning
====================  =======  ==============================================================================
``version``           int64    of this format, 1
``times``             float64  [n + 1] seconds since the first flush; interval i is [times[i], times[i + 1])
``vcpu_entries``      int64    [n, vCPUs] ring entries of each vCPU in each interval (0 without rings)
``slot_ids``          int64    [slots]; with ``slot_gpas`` and ``slot_pages`` (bytes, pages)
``pages_<slot>``      uint32   the dirty pages of all intervals, one interval after the other, ascending
``offsets_<slot>``    int64    [n + 1] interval i's pages are ``pages[offsets[i]:offsets[i + 1]]``
====================  =======  ==============================================================================
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import VmmError
from .machine import Machine

__all__ = ["Recording", "draw", "load", "page", "record"]

VERSION = 1
_PAGE = 4096
_MIB = 1 << 20
_HEAT_ROWS = 256        # address bins of the heat map
_WINDOWS = (1, 2, 5, 10, 20, 50, 100)


@dataclass
class Recording:
    """See the module's table; ``pages`` and ``offsets`` by slot id."""

    times: NDArray[np.float64]
    vcpu_entries: NDArray[np.int64]
    slots: list[tuple[int, int, int]]       # (id, gpa, pages)
    pages: dict[int, NDArray[np.uint32]]
    offsets: dict[int, NDArray[np.int64]]

    @property
    def intervals(self) -> int:
        return len(self.times) - 1

    def dirty_pages(self) -> NDArray[np.int64]:
        """Distinct pages of each interval, shape [n]."""
        return np.asarray(sum(np.diff(o) for o in self.offsets.values()), np.int64)

    def working_set(self, window: int) -> float:
        """Mean number of distinct pages in ``window`` intervals in a row (Denning's working set, of writes)."""
        sizes = [sum(len(np.unique(self.pages[s][self.offsets[s][i]:self.offsets[s][i + window]]))
                     for s, _, _ in self.slots)
                 for i in range(0, self.intervals - window + 1, max(1, window // 2))]
        return float(np.mean(sizes))

    def save(self, path: Path) -> None:
        """Raises VmmError."""
        arrays: dict[str, Any] = {
            "version": np.int64(VERSION), "times": self.times, "vcpu_entries": self.vcpu_entries,
            "slot_ids": np.array([s for s, _, _ in self.slots], np.int64),
            "slot_gpas": np.array([g for _, g, _ in self.slots], np.int64),
            "slot_pages": np.array([p for _, _, p in self.slots], np.int64)}
        for slot in self.pages:
            arrays[f"pages_{slot}"], arrays[f"offsets_{slot}"] = self.pages[slot], self.offsets[slot]
        try:
            with path.open("wb") as file:
                np.savez_compressed(file, **arrays)
        except OSError as exc:
            raise VmmError(f"{path}: cannot be written: {exc.strerror}") from None


def load(path: Path) -> Recording:
    """Raises VmmError for a file that is no recording."""
    try:
        with np.load(path, allow_pickle=False) as data:
            if int(data["version"]) != VERSION:
                raise VmmError(f"{path}: a recording of version {int(data['version'])}, not {VERSION}")
            ids = data["slot_ids"].tolist()
            slots = list(zip(ids, data["slot_gpas"].tolist(), data["slot_pages"].tolist(), strict=True))
            return Recording(data["times"], data["vcpu_entries"], slots, {i: data[f"pages_{i}"] for i in ids},
                             {i: data[f"offsets_{i}"] for i in ids})
    except (OSError, ValueError, KeyError, EOFError) as exc:
        raise VmmError(f"{path}: is no working-set recording ({exc})") from None


def record(machine: Machine, interval: float, duration: float,
           progress: Callable[[float], None] = lambda done: None) -> Recording:
    """Take the dirty log every ``interval`` seconds for ``duration`` seconds, or until the machine ends.
    ``progress`` is told the share that is done, from 0 to 1."""
    client = f"ws_{os.getpid()}"
    machine.register(client, mine=True)
    began = time.monotonic()
    status = machine.status()
    slots = [(s["id"], s["gpa"], s["pages"]) for s in status["slots"]]
    entries = [[v["dirty_pages"] for v in status["vcpus"]]]
    times = [0.0]
    found: dict[int, list[NDArray[np.uint32]]] = {s: [] for s, _, _ in slots}
    try:
        while times[-1] < duration and status["state"] != "ended":
            due = began + len(times) * interval
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                machine.sync(client)
            except VmmError:    # the machine ended, and nobody keeps it
                break
            times.append(time.monotonic() - began)
            status = machine.status()
            entries.append([v["dirty_pages"] for v in status["vcpus"]])
            for slot in found:
                dirty = np.flatnonzero(machine.bitmap(slot, client).bools())
                found[slot].append(dirty.astype(np.uint32))
            progress(min(1.0, times[-1] / duration))
    finally:
        with contextlib.suppress(VmmError):
            machine.unregister(client)
    counts: NDArray[np.int64] = np.array(entries, np.int64)
    return Recording(
        np.array(times), counts[1:] - counts[:-1], slots,
        {s: np.concatenate([np.zeros(0, np.uint32), *parts]) for s, parts in found.items()},
        {s: np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
         for s, parts in found.items()})


# --- pictures -------------------------------------------------------------------------------------------


def draw(recording: Recording, title: str) -> bytes:
    """A PNG: dirtied pages over time per vCPU, heat map of address by time, working-set size by window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 12), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1)
    figure.suptitle(title)
    middles = (recording.times[1:] + recording.times[:-1]) / 2
    lengths = np.diff(recording.times)
    for vcpu, counts in enumerate(recording.vcpu_entries.T):
        top.plot(middles, counts * _PAGE / _MIB / lengths, label=f"vCPU {vcpu}")
    top.plot(middles, recording.dirty_pages() * _PAGE / _MIB / lengths, "k--", label="distinct pages, all")
    top.set(xlabel="time (s)", ylabel="dirtied (MiB/s)")
    top.legend()
    _heat_map(middle, recording)
    windows = [w for w in _WINDOWS if w <= recording.intervals]
    step = float(np.mean(lengths))
    bottom.plot([w * step for w in windows], [recording.working_set(w) * _PAGE / _MIB for w in windows], "o-")
    bottom.set(xlabel="window (s)", ylabel="working set of writes (MiB)", xscale="log")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _heat_map(axes: Any, recording: Recording) -> None:
    """Pages of all slots one above the other, in rows of equal size."""
    total = sum(pages for _, _, pages in recording.slots)
    rows = min(_HEAT_ROWS, total)
    heat = np.zeros((rows, recording.intervals))
    first = 0
    for slot, _, pages in recording.slots:
        row = (recording.pages[slot].astype(np.int64) + first) * rows // total
        column = np.repeat(np.arange(recording.intervals), np.diff(recording.offsets[slot]))
        np.add.at(heat, (row, column), 1)
        first += pages
    image = axes.imshow(heat, origin="lower", aspect="auto", cmap="inferno", interpolation="nearest",
                        extent=(0, recording.times[-1], 0, total * _PAGE / _MIB))
    axes.set(xlabel="time (s)", ylabel="memory, slot above slot (MiB)")
    axes.figure.colorbar(image, ax=axes, label="dirty pages")


def page(recording: Recording, title: str) -> str:
    """One HTML page with everything in it."""
    picture = base64.b64encode(draw(recording, title)).decode()
    counts = recording.dirty_pages()
    rows = [("intervals", f"{recording.intervals}"), ("seconds", f"{recording.times[-1]:.2f}"),
            ("distinct pages an interval, mean", f"{counts.mean():,.0f}"),
            ("distinct pages an interval, most", f"{counts.max():,}"),
            ("distinct pages in all", f"{recording.working_set(recording.intervals):,.0f}")]
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{v}</td></tr>" for k, v in rows)
    return ("<!doctype html><html lang=en><meta charset=utf-8>"
            f"<title>{html.escape(title)}</title><style>body{{font-family:sans-serif;margin:2em}}"
            "th{text-align:left;padding-right:2em}img{max-width:100%}</style>"
            f"<h1>{html.escape(title)}</h1><table>{table}</table>"
            '<img alt="dirtied pages over time, heat map, working-set size" '
            f'src="data:image/png;base64,{picture}"></html>\n')
