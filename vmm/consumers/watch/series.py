"""Intervals one after the other, from whoever collects (watcher.py, sampling.py): rates, working sets, totals, and
the recording that ``vmm working-set`` makes as well."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE

from ...distinct import Distinct
from ...errors import VmmError
from ..workingset import INTERRUPTED, Recording
from .watcher import Area, Ended, Turn

__all__ = ["AreaRate", "Now", "Series", "Source", "follow"]

_MIB = 1 << 20
_WINDOW = 1.0           # seconds that the rates of now are of
_CHUNK = 1 << 16        # pages


class Source(Protocol):
    """Who collects."""

    areas: list[Area]
    forked: set[int]

    def collect(self) -> Turn:
        """Raises Ended."""
        ...


@dataclass(frozen=True)
class AreaRate:
    """Of one mapping."""

    name: str
    address: int
    size: int               # bytes
    pages: int              # written, each counted once an interval
    pages_per_s: float
    mib_per_s: float
    distinct: int           # different pages


@dataclass(frozen=True)
class Now:
    """Of the last second (or of all there was, where that is less)."""

    seconds: float          # since the beginning
    over: float             # seconds that the rates are of
    intervals: int          # in these
    pages_per_s: float
    mib_per_s: float
    working_set: int        # different pages in these
    areas: list[AreaRate]   # the most written first
    took: float             # seconds that the last collection took

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Window:
    """Of one area: its pages in the turns of the last second. Each turn that comes or goes is counted by itself: to
    look through all of them again, with each, took more than the collection."""

    def __init__(self) -> None:
        self.pages = 0          # written, each counted once an interval
        self.distinct = 0
        #: {page number / _CHUNK: uint16[_CHUNK], in how many of the turns each page is}
        self._counts: dict[int, NDArray[np.uint16]] = {}

    def add(self, pages: NDArray[np.int64]) -> None:
        """Ascending, each of them once."""
        self.pages += len(pages)
        for counts, at in self._parts(pages):
            found = counts[at]
            counts[at] = found + 1
            self.distinct += len(at) - int(np.count_nonzero(found))

    def remove(self, pages: NDArray[np.int64]) -> None:
        """That were added."""
        self.pages -= len(pages)
        for counts, at in self._parts(pages):
            left = counts[at] - 1
            counts[at] = left
            self.distinct -= len(at) - int(np.count_nonzero(left))

    def _parts(self, pages: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.int64]]]:
        """A chunk's counts, and the places in these."""
        chunks = pages // _CHUNK
        for part in np.split(pages, np.flatnonzero(np.diff(chunks)) + 1):
            chunk = int(part[0]) // _CHUNK
            if chunk not in self._counts:
                self._counts[chunk] = np.zeros(_CHUNK, np.uint16)
            yield self._counts[chunk], part % _CHUNK


class Series:
    """The turns of ``source`` since now. ``keep``: all of them, for ``recording``."""

    def __init__(self, source: Source, *, keep: bool = False) -> None:
        """What was written before counts for nothing. Raises VmmError when the process has ended."""
        self._areas = source.areas
        try:
            self.began = source.collect().at
        except Ended as exc:
            raise VmmError(str(exc)) from None
        self._turns: list[Turn] = []
        self._keep = keep
        self._window: deque[Turn] = deque()
        self._windows: dict[int, _Window] = {}      # by area
        self._distinct: dict[int, Distinct] = {}
        self._counts: dict[int, int] = {}
        self.intervals = self.most = 0
        self._last = self._left = self.began
        self._took: list[float] = []

    @property
    def seconds(self) -> float:
        """Until the last turn."""
        return self._last - self.began

    def add(self, turn: Turn) -> None:
        """The next one."""
        if self._keep:
            self._turns.append(turn)
        self._window.append(turn)
        while len(self._window) > 1 and turn.at - self._window[0].at >= _WINDOW:
            left = self._window.popleft()
            self._left = left.at
            for area, pages in left.pages.items():
                self._windows[area].remove(pages)
        for area, pages in turn.pages.items():
            self._windows.setdefault(area, _Window()).add(pages)
            self._distinct.setdefault(area, Distinct(np.int64)).add(pages)
            self._counts[area] = self._counts.get(area, 0) + len(pages)
        self.intervals += 1
        self.most = max(self.most, turn.count)
        self._last = turn.at
        self._took.append(turn.took)

    def now(self) -> Now:
        """There must have been a turn."""
        over = max(self._last - self._left, 1e-9)
        rates = [self._rate(area, window.pages, over, window.distinct) for area, window in self._windows.items()
                 if window.pages]
        return self._now(rates, over, len(self._window), self._took[-1])

    def total(self) -> Now:
        """Of all there was."""
        over = max(self.seconds, 1e-9)
        rates = [self._rate(area, count, over, len(self._distinct[area].values()))
                 for area, count in self._counts.items()]
        return self._now(rates, over, self.intervals, float(np.mean(self._took)) if self._took else 0.0)

    def _rate(self, area: int, pages: int, over: float, distinct: int) -> AreaRate:
        of = self._areas[area]
        return AreaRate(of.name, of.start, of.end - of.start, pages, pages / over, pages * PAGE_SIZE / _MIB / over,
                        distinct)

    def _now(self, rates: list[AreaRate], over: float, intervals: int, took: float) -> Now:
        pages = sum(r.pages for r in rates)
        return Now(self.seconds, over, intervals, pages / over, pages * PAGE_SIZE / _MIB / over,
                   sum(r.distinct for r in rates), sorted(rates, key=lambda r: (-r.pages, r.address)), took)

    def recording(self, reason: str) -> Recording:
        """What ``vmm working-set`` writes: a mapping is a slot, its GPA the address that it begins at. There are no
        vCPUs."""
        ids = sorted(self._counts)
        empty = np.zeros(0, np.int64)
        pages, offsets = {}, {}
        for area in ids:
            first = self._areas[area].start // PAGE_SIZE
            parts = [turn.pages.get(area, empty) - first for turn in self._turns]
            pages[area] = np.concatenate([empty, *parts]).astype(np.uint32)
            offsets[area] = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        return Recording(np.array([0.0, *(turn.at - self.began for turn in self._turns)]),
                         np.zeros((len(self._turns), 0), np.int64),
                         [(area, self._areas[area].start, self._areas[area].pages) for area in ids], pages, offsets,
                         reason)


def follow(source: Source, series: Series, interval: float, seconds: float | None, wait: Callable[[float], bool],
           seen: Callable[[Turn], None] = lambda turn: None) -> str:
    """Collect every ``interval`` seconds, for ``seconds`` (None: until something ends it). ``wait`` waits, and says
    whether to stop early; ``seen`` is told of each turn. Why it ended: "" when its time was over."""
    due = series.began
    while True:
        due = max(due + interval, time.monotonic() - interval)      # turns that were missed are not made up for
        if seconds is not None and due > series.began + seconds + interval / 2 and series.intervals:
            return ""
        stopped = wait(max(0.0, due - time.monotonic()))
        try:
            turn = source.collect()
        except Ended as exc:
            return str(exc)
        series.add(turn)
        seen(turn)
        if stopped:
            return INTERRUPTED
