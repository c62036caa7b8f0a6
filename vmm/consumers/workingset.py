"""Which pages are dirtied when: a time series of the dirty log, to keep, and to look at.

A recording is a compact .npz (numpy's own format):

====================  =======  ==============================================================================
array                 dtype    meaning
====================  =======  ==============================================================================
``version``           int64    of this format, 1
``reason``            str      why the recording ended before its time; "" when it did not (missing: the same)
``times``             float64  [n + 1] seconds since the first flush; interval i is [times[i], times[i + 1])
``vcpu_entries``      int64    [n, vCPUs] ring entries of each vCPU in each interval (0 without rings)
``slot_ids``          int64    [slots]; with ``slot_gpas`` and ``slot_pages`` (bytes, pages)
``pages_<slot>``      uint32   the dirty pages of all intervals, one interval after the other, ascending
``offsets_<slot>``    int64    [n + 1] interval i's pages are ``pages[offsets[i]:offsets[i + 1]]``
====================  =======  ==============================================================================

Times and counts are the coordinator's, as of the flush that an interval ends with. A slot that is plugged out has
no pages from then on; one that is plugged in under a former id continues in its place, and ``slot_pages`` is
the most that the id had.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import itertools
import os
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE

from .. import optional
from ..client.interrupts import sleep
from ..client.machine import Flushed, Machine
from ..distinct import distinct
from ..errors import ExitCode, VmmError, one_line
from ..inputs import input_name, open_input
from ..outputs import open_output

__all__ = ["WINDOWS", "Recording", "draw", "heat", "load", "page", "record"]

VERSION = 1
_MIB = 1 << 20
_HEAT_ROWS = 256        # address bins of the heat map
#: Intervals that a working set is of.
WINDOWS = (1, 2, 5, 10, 20, 50, 100)
_LOADED_MAX = 4 << 30   # bytes of a recording's arrays

INTERRUPTED = "interrupted"

_numbers = itertools.count()


@dataclass
class Recording:
    """See the module's table; ``pages`` and ``offsets`` by slot id."""

    times: NDArray[np.float64]
    vcpu_entries: NDArray[np.int64]
    slots: list[tuple[int, int, int]]       # (id, gpa, pages)
    pages: dict[int, NDArray[np.uint32]]
    offsets: dict[int, NDArray[np.int64]]
    reason: str = ""                        # why it ended before its time

    @property
    def intervals(self) -> int:
        """How many were recorded."""
        return len(self.times) - 1

    def dirty_pages(self) -> NDArray[np.int64]:
        """Distinct pages of each interval, shape [n]."""
        return np.asarray(sum(np.diff(o) for o in self.offsets.values()), np.int64)

    def working_set(self, window: int) -> float:
        """Mean number of distinct pages in ``window`` intervals in a row (Denning's working set, of writes)."""
        sizes = [sum(len(distinct(self.pages[s][self.offsets[s][i]:self.offsets[s][i + window]]))
                     for s, _, _ in self.slots)
                 for i in range(0, self.intervals - window + 1, max(1, window // 2))]
        return float(np.mean(sizes))

    def _repr_png_(self) -> bytes:
        """What a notebook shows of it."""
        return draw(self, "pages dirtied per interval")

    def save(self, path: Path) -> None:
        """Raises VmmError."""
        with open_output(path) as out:
            self.write(out.file)

    def write(self, file: IO[bytes]) -> None:
        """Raises what the file raises."""
        arrays: dict[str, Any] = {
            "version": np.int64(VERSION), "reason": np.array(self.reason), "times": self.times,
            "vcpu_entries": self.vcpu_entries,
            "slot_ids": np.array([s for s, _, _ in self.slots], np.int64),
            "slot_gpas": np.array([g for _, g, _ in self.slots], np.int64),
            "slot_pages": np.array([p for _, _, p in self.slots], np.int64)}
        for slot in self.pages:
            arrays[f"pages_{slot}"], arrays[f"offsets_{slot}"] = self.pages[slot], self.offsets[slot]
        np.savez_compressed(file, **arrays)


def load(path: Path) -> Recording:
    """Raises VmmError for a file that is not a recording."""
    try:
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > _LOADED_MAX:
                raise ValueError(f"its arrays have more than {_LOADED_MAX:,} bytes")
            file.seek(0)
            return _loaded(np.load(file, allow_pickle=False))
    except (OSError, ValueError, LookupError, EOFError, TypeError, ArithmeticError, MemoryError, SyntaxError,
            NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
        raise VmmError(f"{input_name(path)}: is not a working-set recording "
                       f"({one_line(str(exc) or type(exc).__name__)})") from None


def _loaded(data: Any) -> Recording:
    """Raises ValueError, and what numpy raises for arrays that are not what they should be."""
    if int(data["version"]) != VERSION:
        raise ValueError(f"its version is {int(data['version'])}, not {VERSION}")

    def array(name: str, kind: Any, dimensions: int = 1) -> Any:
        found = data[name]
        if found.dtype != kind or found.ndim != dimensions:
            raise ValueError(f"{name} is {found.dtype}, shape {found.shape}")
        return found

    ids = array("slot_ids", np.int64).tolist()
    gpas, sizes = array("slot_gpas", np.int64).tolist(), array("slot_pages", np.int64).tolist()
    slots = list(zip(ids, gpas, sizes, strict=True))
    recording = Recording(
        array("times", np.float64), array("vcpu_entries", np.int64, 2), slots,
        {i: array(f"pages_{i}", np.uint32) for i in ids}, {i: array(f"offsets_{i}", np.int64) for i in ids},
        one_line(str(data["reason"])) if "reason" in data else "")
    if not recording.intervals == len(recording.vcpu_entries) >= 0 or np.any(np.diff(recording.times) < 0):
        raise ValueError("its intervals are inconsistent")
    for slot, _, pages in slots:
        found, offsets = recording.pages[slot], recording.offsets[slot]
        if (len(offsets) != len(recording.times) or offsets[0] != 0 or offsets[-1] != len(found)
                or np.any(np.diff(offsets) < 0) or np.any(found >= pages)):
            raise ValueError(f"the pages of slot {slot} do not match its intervals")
    return recording


def record(machine: Machine, interval: float, duration: float,
           progress: Callable[[float], None] = lambda done: None,
           wait: Callable[[float], bool] = sleep) -> Recording:
    """Take the dirty log every ``interval`` seconds for ``duration`` seconds, or until the machine ends.
    ``progress`` is told the share that is done, from 0 to 1. ``wait`` waits, and says whether to stop early: what
    there is until then is the recording, which says that it was interrupted. Raises VmmError before the first
    flush; after it, what was recorded is given back, with the ``reason`` why there is no more."""
    client = f"ws_{os.getpid()}_{next(_numbers)}"
    machine.register(client, mine=True)
    try:
        series = _Series(machine.flush(client))
        status = machine.status()
        reason = ""
        while series.seconds < duration and status["state"] != "ended" and not reason:
            due = series.began + len(series.flushes) * interval
            if wait(max(0.0, due - time.monotonic())):
                reason = INTERRUPTED
            try:
                flushed = machine.flush(client)
                status = machine.status()
                series.add(flushed, status, {slot: np.flatnonzero(machine.bitmap(slot, client).bools())
                                             for slot in flushed.slots})
            except VmmError as exc:
                if exc.exit_code != ExitCode.NO_MACHINE:    # else it ended, and is not kept
                    reason = reason or str(exc)
                break
            progress(min(1.0, series.seconds / duration))
    finally:
        with contextlib.suppress(VmmError):
            machine.unregister(client)
    return series.recording(reason)


class _Series:
    """Flushes of one client, while they are gathered."""

    def __init__(self, first: Flushed) -> None:
        self.flushes = [first]
        self._slots: dict[int, tuple[int, int]] = {}                # {id: (GPA, pages)}
        self._found: dict[int, list[NDArray[np.uint32]]] = {}       # {id: an array per interval}

    @property
    def began(self) -> float:
        return self.flushes[0].at

    @property
    def seconds(self) -> float:
        return self.flushes[-1].at - self.began

    def add(self, flushed: Flushed, status: dict[str, Any], dirty: dict[int, NDArray[np.int64]]) -> None:
        for slot in status["slots"]:
            gpa, pages = self._slots.get(slot["id"], (slot["gpa"], 0))
            self._slots[slot["id"]] = gpa, max(pages, slot["pages"])
        before = len(self.flushes) - 1
        for slot in set(self._found) | set(dirty) | set(self._slots):
            parts = self._found.setdefault(slot, [np.zeros(0, np.uint32)] * before)
            parts.append(dirty.get(slot, np.zeros(0, np.int64)).astype(np.uint32))
        self.flushes.append(flushed)

    def recording(self, reason: str) -> Recording:
        counts: NDArray[np.int64] = np.array([f.vcpu_pages for f in self.flushes], np.int64)
        slots = []
        for slot, parts in sorted(self._found.items()):
            # One that came and went between two looks at the status is known by its pages alone.
            gpa, pages = self._slots.get(slot, (0, 0))
            most = max((int(p[-1]) + 1 for p in parts if len(p)), default=0)
            slots.append((slot, gpa, max(pages, most)))
        return Recording(
            np.array([f.at - self.began for f in self.flushes]), counts[1:] - counts[:-1], slots,
            {s: np.concatenate([np.zeros(0, np.uint32), *parts]) for s, parts in self._found.items()},
            {s: np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
             for s, parts in self._found.items()}, reason)


# --- pictures -------------------------------------------------------------------------------------------


def draw(recording: Recording, title: str) -> bytes:
    """A PNG: dirtied pages over time per vCPU, heat map of address by time, working-set size by window.
    Raises MissingPackage."""
    figure = optional.figure(figsize=(10, 12), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1)
    figure.suptitle(title)
    middles = (recording.times[1:] + recording.times[:-1]) / 2
    lengths = np.diff(recording.times)
    for vcpu, counts in enumerate(recording.vcpu_entries.T):
        top.plot(middles, counts * PAGE_SIZE / _MIB / lengths, label=f"vCPU {vcpu}")
    top.plot(middles, recording.dirty_pages() * PAGE_SIZE / _MIB / lengths, "k--", label="distinct pages, all")
    top.set(xlabel="time (s)", ylabel="dirtied (MiB/s)")
    top.legend()
    _heat_map(middle, recording)
    windows = [w for w in WINDOWS if w <= recording.intervals]
    step = float(np.mean(lengths))
    bottom.plot([w * step for w in windows], [recording.working_set(w) * PAGE_SIZE / _MIB for w in windows], "o-")
    bottom.set(xlabel="window (s)", ylabel="working set of writes (MiB)", xscale="log")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def heat(recording: Recording, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Memory by time, the pages of all slots one above the other: the share of each row's pages that was dirtied in
    each interval, shape [at most ``rows``, n]; and where the rows begin and end, in MiB, shape [rows + 1]."""
    total = sum(pages for _, _, pages in recording.slots)
    rows = max(1, min(rows, total))
    found = np.zeros((rows, recording.intervals))
    first = 0
    for slot, _, pages in recording.slots:
        row = (recording.pages[slot].astype(np.int64) + first) * rows // total
        column = np.repeat(np.arange(recording.intervals), np.diff(recording.offsets[slot]))
        np.add.at(found, (row, column), 1)
        first += pages
    edges = -(-np.arange(rows + 1) * total // rows)     # pages that rows begin with
    return found / np.maximum(1, np.diff(edges))[:, None], edges * PAGE_SIZE / _MIB


def _heat_map(axes: Any, recording: Recording) -> None:
    shares, heights = heat(recording, _HEAT_ROWS)
    pages = shares * (np.diff(heights) * _MIB / PAGE_SIZE)[:, None]
    # Intervals are as long as they were, not all the same.
    image = axes.pcolormesh(recording.times, heights, pages, cmap="inferno", shading="flat", rasterized=True)
    axes.set(xlabel="time (s)", ylabel="guest memory, slots stacked (MiB)")
    axes.figure.colorbar(image, ax=axes, label="dirty pages")


def page(recording: Recording, title: str) -> str:
    """One HTML page with everything in it."""
    picture = base64.b64encode(draw(recording, title)).decode()
    counts = recording.dirty_pages()
    rows = [("intervals", f"{recording.intervals}"), ("seconds", f"{recording.times[-1]:.2f}"),
            ("distinct pages per interval, mean", f"{counts.mean():,.0f}"),
            ("distinct pages per interval, maximum", f"{counts.max():,}"),
            ("distinct pages in total", f"{recording.working_set(recording.intervals):,.0f}"),
            *([("ended early", html.escape(recording.reason))] if recording.reason else [])]
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{v}</td></tr>" for k, v in rows)
    return ("<!doctype html><html lang=en><meta charset=utf-8>"
            f"<title>{html.escape(title)}</title><style>body{{font-family:sans-serif;margin:2em}}"
            "th{text-align:left;padding-right:2em}img{max-width:100%}</style>"
            f"<h1>{html.escape(title)}</h1><table>{table}</table>"
            '<img alt="dirtied pages over time, heat map, working-set size" '
            f'src="data:image/png;base64,{picture}"></html>\n')
