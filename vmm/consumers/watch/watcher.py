"""Follows the written pages of a process: registers and protects what it has mapped, looks at each turn for mappings
that have come and gone, and collects."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ipc.linux.foreign import Mapping, children, mappings
from ipc.linux.processid import open_process
from ipc.pagescan import POPULATED, WRITTEN, WRITTEN_POPULATED, PageScan
from ipc.shm import PAGE_SIZE
from ipc.userfault import UserfaultError

from ...errors import VmmError
from .attach import Attached
from .blocks import Block

__all__ = ["Area", "Ended", "Turn", "Watcher"]

_WHY = {errno.EBUSY: "has a userfaultfd already (post-copy, CRIU, another vmm watch)",
        errno.EPERM: "is a shared mapping of a file that was opened only to read",
        errno.EINVAL: "is not memory that can be protected"}
_LOOK_SHARE = 10        # and that many times as long as the last one took
_COUNT = 0.5            # and at its children
_ENDING = 1000          # ms that an end may take
_LOOK = 0.05            # seconds between two looks at what is mapped, at least


@dataclass
class Area:
    """A block, as long as it is there: it may grow, and become smaller. ``start`` and ``end`` are the most that it
    had."""

    id: int
    name: str
    start: int          # address
    end: int
    sparse: bool
    refused: str = ""   # why it is not watched
    #: What of it is watched, as it is now: ascending ranges of addresses.
    watched: list[tuple[int, int]] = field(default_factory=list)

    @property
    def pages(self) -> int:
        """How many it has."""
        return (self.end - self.start) // PAGE_SIZE


class Ended(Exception):
    """The process is no more what it was; the text says in which way."""


@dataclass
class Turn:
    """What one collection found."""

    at: float                                   # time.monotonic() at its begin
    took: float                                 # seconds
    #: {area: page numbers (address / 4096), int64, ascending}; only areas of which some were written.
    pages: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Pages in all."""
        return sum(len(found) for found in self.pages.values())


class Watcher:
    """Owns the userfaultfd of ``attached``. ``choose`` makes blocks of what is mapped."""

    def __init__(self, attached: Attached, choose: Callable[[Iterable[Mapping]], list[Block]]) -> None:
        """Protects everything; what is written from then on is in the first turn. Raises VmmError where nothing can
        be watched, and Ended."""
        self._fault, self._pid, self._choose = attached.fault, attached.process.pid, choose
        #: Of all blocks that there were, in the order in which they came; an area's id is its place.
        self.areas: list[Area] = []
        self._begins: dict[tuple[int, str], Area] = {}
        #: Processes that it has forked since, as far as they were seen; what they write is not.
        self.forked: set[int] = set()
        self._children = children(self._pid)
        self._looked = self._counted = self._look_took = 0.0
        try:
            self._alive = open_process(attached.process)
        except OSError:
            self._fault.close()
            raise Ended(f"process {self._pid} has ended") from None
        try:
            self._scan = PageScan(self._pid)
        except OSError as exc:
            self._fault.close()
            os.close(self._alive)
            raise VmmError(f"process {self._pid}: /proc/{self._pid}/pagemap: {exc.strerror}") from None
        try:
            self._look(first=True)
            if not any(area.watched for area in self.areas):
                reasons = sorted({a.refused for a in self.areas})
                raise VmmError(f"process {self._pid} cannot be watched: its memory {'; '.join(reasons)}" if reasons else
                               f"process {self._pid} has no memory that could be watched")
        except BaseException:
            self.close()
            raise

    def collect(self) -> Turn:
        """The pages written since the last turn. Raises Ended."""
        began = time.monotonic()
        turn = Turn(began, 0.0)
        if began - self._looked >= max(_LOOK, _LOOK_SHARE * self._look_took):
            self._look(first=False)
        for area in self.areas:
            if area.watched and len(found := self._written(area)):
                turn.pages[area.id] = found
        turn.took = time.monotonic() - began
        return turn

    def _written(self, area: Area) -> NDArray[np.int64]:
        parts = []
        for start, end in area.watched.copy():
            try:
                for regions in self._scan.take(start, end, WRITTEN_POPULATED if area.sparse else WRITTEN):
                    parts.append(_numbers(regions))
            except OSError as exc:
                if exc.errno != errno.EPERM:
                    raise self._ended() from None
                # A mapping in the place of one that was there: it is looked at anew, and what was written counts.
                area.watched.remove((start, end))
                self._looked = 0.0
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _look(self, *, first: bool) -> None:
        """Register what is mapped and was not. Raises Ended."""
        self._looked = began = time.monotonic()
        try:
            there = mappings(self._pid)
            next(self._scan.find(0, PAGE_SIZE, POPULATED))      # fails when that memory is no process's any more
        except OSError:
            raise self._ended() from None
        if not there:
            raise self._ended()
        if self._looked - self._counted >= _COUNT:
            self._counted = self._looked
            self.forked |= children(self._pid) - self._children
        now: dict[int, list[Block]] = {}
        for block in self._choose(there):
            now.setdefault(self._area(block, first).id, []).append(block)
        for area in self.areas:
            blocks = now.get(area.id, [])
            area.watched = [part for b in blocks for part in _common(area.watched, b.start, b.end)]
            for start, end in [part for b in blocks for part in _missing(area.watched, b.start, b.end)]:
                if not area.refused:
                    self._register(area, start, end, first)
            area.watched = _joined(area.watched)
        self._look_took = time.monotonic() - began

    def _area(self, block: Block, first: bool) -> Area:
        """The one that it is of: as a rule it begins where it did."""
        area = self._begins.get((block.start, block.name))
        if area is None and not first:
            area = next((a for a in self.areas if a.name == block.name and a.start < block.end and block.start < a.end),
                        None)
        if area is None:
            area = Area(len(self.areas), block.name, block.start, block.end, block.sparse)
            self.areas.append(area)
        self._begins[block.start, block.name] = area
        area.start, area.end = min(area.start, block.start), max(area.end, block.end)
        return area

    def _register(self, area: Area, start: int, end: int, first: bool) -> None:
        try:
            self._fault.register(start, end - start)
            if not area.sparse:
                self._scan.protect(start, end)
            elif first:
                self._scan.protect(start, end, WRITTEN_POPULATED)
        except UserfaultError as exc:
            if exc.number in _WHY:
                area.refused = _WHY[exc.number]
            elif exc.number not in (errno.ENOMEM, errno.ENOENT):    # it is not mapped any more
                raise self._ended() from None
        except OSError as exc:
            if exc.errno != errno.EPERM:                            # something else is mapped there now
                raise self._ended() from None
        else:
            area.watched.append((start, end))

    def _ended(self) -> Ended:
        """Its memory is gone. That of one that ends is before it has ended; one that has executed another program has
        other memory at once."""
        poll = select.poll()
        poll.register(self._alive, select.POLLIN)
        for _ in range(_ENDING):
            if poll.poll(1):
                break
            with contextlib.suppress(OSError):
                if mappings(self._pid):
                    return Ended(f"process {self._pid} has executed another program")
        return Ended(f"process {self._pid} has ended")

    def close(self) -> None:
        """Idempotent. The process's memory is as ordinary as it was, but for huge pages that were split."""
        for area in self.areas:
            for start, end in area.watched:
                # Closing would do, if no child can have the descriptor: one forked in the moment of the call has.
                with contextlib.suppress(UserfaultError):
                    self._fault.unregister(start, end - start)
            area.watched = []
        self._fault.close()
        self._scan.close()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _numbers(regions: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Of the pages of these regions of addresses, ascending."""
    if len(regions) == 0:
        return np.zeros(0, np.int64)
    firsts, ends = (regions.astype(np.int64) // PAGE_SIZE).T
    counts = ends - firsts
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(firsts - starts, counts)


def _common(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of [start, end) is in ``ranges``."""
    return [(max(a, start), min(b, end)) for a, b in ranges if a < end and start < b]


def _missing(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of [start, end) is not."""
    found = []
    for a, b in sorted(_common(ranges, start, end)):
        if start < a:
            found.append((start, a))
        start = b
    return [*found, (start, end)] if start < end else found


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending, those that touch in one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found
