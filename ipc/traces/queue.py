"""Harvested entries on their way from the coordinator to who records them: one writer, one reader, no waiting.

A segment of u64: three counters, ``written`` and ``read`` (words, never wrapped) and ``lost`` (entries there was
no room for), and ``closed``, in a page of their own; then pages of words. A record is its time in nanoseconds,
``vcpu << 32 | count``, and ``count`` packed entries (slot id << 48 | page). The writer stores the words first and
the counter behind them, the order in which x86-64 lets others see them. A record that does not fit is lost, and
counted: whoever reads too slowly never holds the writer up.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..shm import PAGE_SIZE, Segment

__all__ = ["TraceQueue"]

U64 = NDArray[np.uint64]
_HEADER = PAGE_SIZE // 8
_WRITTEN, _READ, _LOST, _CLOSED = range(4)


class TraceQueue:
    """One end of it."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        words = np.frombuffer(segment.buf, np.uint64)
        self._head: U64 = words[:_HEADER]
        self._data: U64 = words[_HEADER:]

    @classmethod
    def create(cls, name: str, words: int) -> TraceQueue:
        """The writer's end, with room for ``words``, a multiple of 512. Raises SegmentError."""
        return cls(Segment.create(name, PAGE_SIZE + 8 * words))

    @classmethod
    def open(cls, name: str) -> TraceQueue:
        """The reader's end. Raises SegmentError."""
        return cls(Segment.open(name))

    @property
    def lost(self) -> int:
        """Entries that were dropped for lack of room."""
        return int(self._head[_LOST])

    @property
    def closed(self) -> bool:
        """The writer has written its last record, in order."""
        return bool(self._head[_CLOSED])

    def put(self, time_ns: int, vcpu: int, entries: U64) -> bool:
        """False (and counted) when there is no room for it."""
        written = int(self._head[_WRITTEN])
        if written + 2 + len(entries) - int(self._head[_READ]) > len(self._data):
            self.miss(len(entries))
            return False
        self._copy_in(written, np.array([time_ns, vcpu << 32 | len(entries)], np.uint64))
        self._copy_in(written + 2, entries)
        self._head[_WRITTEN] = written + 2 + len(entries)
        return True

    def miss(self, entries: int) -> None:
        """So many at least are not in it."""
        self._head[_LOST] += np.uint64(entries)

    def end(self) -> None:
        """No record follows."""
        self._head[_CLOSED] = 1

    def records(self) -> Iterator[tuple[int, int, U64]]:
        """(time in ns, vCPU, packed entries) of what is there by now. The entries are a copy."""
        at, end = int(self._head[_READ]), int(self._head[_WRITTEN])
        while at < end:
            time_ns, what = self._copy_out(at, 2).tolist()
            count = what & 0xFFFF_FFFF
            entries = self._copy_out(at + 2, count)
            at += 2 + count
            self._head[_READ] = at
            yield time_ns, what >> 32, entries

    def _copy_in(self, at: int, words: U64) -> None:
        at %= len(self._data)
        room = len(self._data) - at
        self._data[at:at + len(words)] = words[:room]
        if len(words) > room:
            self._data[:len(words) - room] = words[room:]

    def _copy_out(self, at: int, count: int) -> U64:
        at %= len(self._data)
        found = self._data[at:at + count]
        return np.concatenate([found, self._data[:count - len(found)]])

    def close(self) -> None:
        self.__dict__.pop("_head", None)
        self.__dict__.pop("_data", None)
        self.segment.close()
