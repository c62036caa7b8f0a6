"""``vmm trace record --pid``: a dirty trace of a process. What was written waits in a temporary file until the end,
since the trace begins with its memory slots, and mappings come while it is recorded."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ipc.layout import MAX_SLOTS
from ipc.shm import PAGE_SIZE

from ...errors import VmmError
from ...machine.rules import RuleError, check_slots
from ...machine.spec import RamSlot
from ...machine.tracefile import LACKS_ORDER, LACKS_VCPUS, TraceEnd, TraceHeader, TraceWriter, pack
from ...outputs import open_output
from ..workingset import INTERRUPTED
from .series import Series, Source, follow
from .watcher import Area, Turn

__all__ = ["record_process"]

_NAME = 60              # characters of a mapping's name
_RESERVED = 1 << 24     # pages: of a larger mapping only what was written from the first to the last


class _Place(NamedTuple):
    """Of an area's pages in the trace: page ``first`` (address / 4096) of it is page ``at`` of the slot."""

    slot: int
    first: int
    at: int
    pages: int


class _Spool:
    """Turns, in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._turns: list[tuple[float, list[tuple[int, int]]]] = []     # (time, [(area, pages)])
        self.entries = 0
        #: {area: (first page, last page)} that were written.
        self.extents: dict[int, tuple[int, int]] = {}
        self.counts: dict[int, int] = {}

    def add(self, turn: Turn) -> None:
        for area, pages in turn.pages.items():
            first, last = self.extents.get(area, (int(pages[0]), int(pages[-1])))
            self.extents[area] = min(first, int(pages[0])), max(last, int(pages[-1]))
            self.counts[area] = self.counts.get(area, 0) + len(pages)
            pages.tofile(self._file)
            self.entries += len(pages)
        self._turns.append((turn.at, [(area, len(pages)) for area, pages in turn.pages.items()]))

    def write(self, writer: TraceWriter, began: float, places: dict[int, _Place]) -> None:
        self._file.seek(0)
        for at, parts in self._turns:
            entries: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
            for area, count in parts:
                place = places[area]
                pages = np.fromfile(self._file, np.int64, count) - place.first + place.at
                entries.append(pack(np.full(count, place.slot), pages))
            writer.append(round((at - began) * 1e9), 0, np.concatenate(entries))


def record_process(source: Source, name: str, path: Path, seconds: float, interval: float,
                   progress: Callable[[float, int], None], wait: Callable[[float], bool]) -> TraceEnd:
    """Record what ``source`` collects, for so long or until the process ends. Its slots are mappings, one behind the
    other; one vCPU stands for all threads. ``progress`` is told the part of the time that is over, and entries.
    Raises VmmError, with no file left then."""
    with open_output(path):
        pass            # it can be written: that is not to be found out at the end
    series = Series(source)
    with tempfile.TemporaryFile() as file:
        spool = _Spool(file)

        def seen(turn: Turn) -> None:
            try:
                spool.add(turn)
            except OSError as exc:
                raise VmmError(f"{tempfile.gettempdir()}: cannot be written: {exc.strerror}") from None
            progress(min(1.0, series.seconds / seconds), spool.entries)

        reason = follow(source, series, interval, seconds, wait, seen)
        places, slots, names = _places(source.areas, spool)
        header = TraceHeader(machine=name, accelerator="none", vcpus=1, ring_entries=0, slots=slots, interval=interval,
                             recorded=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                             mappings=names, lacks=[LACKS_VCPUS, LACKS_ORDER])
        with TraceWriter(path, header) as writer:
            spool.write(writer, series.began, places)
            return writer.finish(0, INTERRUPTED if reason == INTERRUPTED else "", series.seconds)


def _places(areas: list[Area], spool: _Spool) -> tuple[dict[int, _Place], list[RamSlot], list[str]]:
    """Where the pages of each area are, the slots, and what each of these is called. Raises VmmError."""
    found: dict[int, _Place] = {}
    slots, names = [], []
    chosen = sorted(spool.counts, key=lambda a: -spool.counts[a]) or [a.id for a in areas[:1]]
    many = len(chosen) > MAX_SLOTS
    alone = sorted(chosen[:MAX_SLOTS - 1] if many else chosen, key=lambda a: areas[a].start)
    gpa = 0
    for slot, area in enumerate(alone):
        found[area] = place = _place(areas[area], spool, slot, 0)
        slots.append(RamSlot(slot, gpa, place.pages * PAGE_SIZE))
        names.append(f"{place.first * PAGE_SIZE:#x} {areas[area].name[-_NAME:]}")
        gpa += place.pages * PAGE_SIZE
    if many:        # what was written least shares a slot
        at = 0
        for area in chosen[MAX_SLOTS - 1:]:
            found[area] = place = _place(areas[area], spool, MAX_SLOTS - 1, at)
            at += place.pages
        slots.append(RamSlot(MAX_SLOTS - 1, gpa, at * PAGE_SIZE))
        names.append(f"{len(chosen) - len(alone)} others")
    try:
        check_slots(slots, mapped=False)
    except RuleError as exc:
        raise VmmError(f"the process's mappings are more than a trace can have: {exc}") from None
    return found, slots, names


def _place(area: Area, spool: _Spool, slot: int, at: int) -> _Place:
    first, pages = area.start // PAGE_SIZE, area.pages
    if pages > _RESERVED and area.id in spool.extents:
        first, last = spool.extents[area.id]
        pages = last + 1 - first
    return _Place(slot, first, at, pages)
