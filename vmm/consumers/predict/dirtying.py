"""A guest as a dirty trace has it: what each of its vCPUs dirties, in its order, as if it ran now, and as long as is
wanted: behind its end the trace begins again. A vCPU that is held to a rate goes through it more slowly.

Between two harvests entries are taken to be as far from one another as they can be. A page that a vCPU dirties twice
between two looks at the log counts once, as it does in a ring that is reset by these looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...distinct import distinct
from ...errors import VmmError
from ...machine.tracefile import Trace, TraceReader, unpack
from ..migration.hot import Todo

__all__ = ["Dirtied", "Guest", "Memory", "Running", "from_trace"]


@dataclass(frozen=True, slots=True)
class Memory:
    """``sizes``: {slot: its pages}. ``touched``: those of them that a first round has to look at, ``filled``: how many
    of these have bytes (the others are zero)."""

    sizes: dict[int, int]
    touched: Todo
    filled: int

    @classmethod
    def whole(cls, sizes: Mapping[int, int], filled: float = 1.0) -> Memory:
        """All of it was touched; of every page, with this probability, some byte is not zero."""
        touched = {slot: np.arange(pages, dtype=np.int64) for slot, pages in sizes.items()}
        return cls(dict(sizes), touched, round(filled * sum(sizes.values())))


@dataclass(frozen=True, slots=True)
class Dirtied:
    """In some time: the pages, and how many each vCPU dirtied, what others dirtied too among them."""

    pages: Todo
    vcpus: list[int]


class _Vcpu:
    """``entries``: of the pages that the trace has, which; ``pages``: how many it has in all."""

    def __init__(self, trace: Trace, entries: NDArray[np.int64], pages: int, seconds: float) -> None:
        self._entries, self._pages, self._length = entries, pages, seconds
        # How many entries there were at a time.
        self._times = np.concatenate([[0.0], trace.times.astype(np.float64) / 1e9, [seconds]])
        self._counts = np.concatenate([[0], trace.ends.astype(np.float64), [len(entries)]])

    def _at(self, time: float) -> int:
        """Entries before this time, in all rounds through the trace."""
        times, rest = divmod(time, self._length)
        return int(times) * len(self._entries) + int(np.interp(rest, self._times, self._counts))

    def _when(self, entry: int) -> float:
        """The time of an entry, counted in the same way."""
        times, rest = divmod(entry, len(self._entries))
        return times * self._length + float(np.interp(rest, self._counts, self._times))

    def run(self, now: float, seconds: float, quota: float | None) -> tuple[float, NDArray[np.bool_]]:
        """When it is after so much time, and bool[pages]: dirtied in it. Not more than ``quota`` pages per second."""
        begin = self._at(now)
        entries = self._between(begin, self._at(now + seconds))
        found = np.zeros(self._pages, bool)
        found[entries] = True
        most = len(entries) if quota is None else int(quota * seconds)
        if len(entries) <= most or int(np.count_nonzero(found)) <= most:
            return now + seconds, found
        first = np.zeros(self._pages, np.int64)
        first[entries[::-1]] = np.arange(len(entries))[::-1]        # what is assigned last, stays
        cut = int(np.partition(first[found], most)[most])           # the first that is too much
        found &= first < cut
        return max(now, self._when(begin + cut)), found

    def _between(self, begin: int, end: int) -> NDArray[np.int64]:
        length = len(self._entries)
        if not length:
            return self._entries
        first = begin % length
        last = first + min(end - begin, length)     # more than all of it is all of it
        if last <= length:
            return self._entries[first:last]
        return np.concatenate([self._entries[first:], self._entries[:last - length]])


class Guest:
    """``trace``: a part for each vCPU; ``seconds``: how long it was recorded. Raises VmmError for no time at all."""

    def __init__(self, trace: Sequence[Trace], seconds: float) -> None:
        if seconds <= 0:
            raise VmmError("the trace is of no time at all: record a longer one")
        self.seconds = seconds
        #: Every page that it dirties, packed, once.
        self.pages = distinct(np.concatenate([np.zeros(0, np.uint64), *(part.entries for part in trace)]))
        self.vcpus = [_Vcpu(part, np.searchsorted(self.pages, part.entries), len(self.pages), seconds)
                      for part in trace]

    def begin(self) -> Running:
        """It runs, from its beginning."""
        return Running(self)


class Running:
    """A guest at some point of its trace."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._now = [0.0] * len(guest.vcpus)

    def run(self, seconds: float, quotas: Mapping[int, float] | None = None) -> Dirtied:
        """It goes on for so long; ``quotas``: {vCPU: pages per second it is held to}."""
        any_, counts = np.zeros(len(self._guest.pages), bool), []
        for index, vcpu in enumerate(self._guest.vcpus):
            self._now[index], found = vcpu.run(self._now[index], seconds, (quotas or {}).get(index))
            any_ |= found
            counts.append(int(np.count_nonzero(found)))
        slots, pages = unpack(self._guest.pages[any_])
        return Dirtied({int(slot): pages[slots == slot].astype(np.int64) for slot in np.unique(slots)}, counts)


def from_trace(path: Path) -> tuple[Guest, dict[int, int]]:
    """The guest, and {slot: pages}. Raises TraceError, and VmmError for a trace of no time."""
    with TraceReader(path) as reader:
        parts = reader.vcpus()
        assert reader.end is not None
        return Guest(parts, reader.end.seconds), {slot.id: slot.pages for slot in reader.header.slots}
