"""The memory of a machine as the source sends it, and that of one that arrives, as the target fills it in before the
start."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ipc.linux.files import write_at
from ipc.shm import open_fd, reserve

from ...client.machine import Machine
from ..pages import runs
from .pages import PAGE
from .streams import Sent

__all__ = ["SentMemory", "SlotMemory"]

_PIECE = 256 << 20          # bytes that are reserved at a time


class SentMemory:
    """The slots of the machine that leaves. ``close`` it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._slots: dict[int, Sent] = {}

    def __getitem__(self, slot: int) -> Sent:
        """Raises VmmError, SegmentError."""
        if slot not in self._slots:
            self._slots[slot] = Sent(self._machine.ram(slot), open_fd(self._machine.ram_segment(slot)))
        return self._slots[slot]

    def close(self) -> None:
        """Idempotent. Nobody sends of it any more."""
        while self._slots:
            os.close(self._slots.popitem()[1].fd)


class SlotMemory:
    """A slot of the machine that is to come; all zero at first, and sparse. Threads may write different pages at
    once."""

    def __init__(self, segment: str, size: int) -> None:
        """``size``: of the slot, in bytes. Raises SegmentError."""
        self._fd = open_fd(segment)
        self._size = size
        self._lock = threading.Condition()
        self._writers = 0
        self._closed = False
        #: Pages that are zero for certain: never touched.
        self._untouched = np.ones(size // PAGE, bool)

    def write(self, numbers: NDArray[np.int64], data: NDArray[np.uint8] | None) -> None:
        """``data`` [n, 4096], None: zeros. Not once it is closed. Raises OSError."""
        with self._lock:
            if self._closed:
                return
            self._writers += 1
        try:
            self._write(numbers, data)
        finally:
            with self._lock:
                self._writers -= 1
                self._lock.notify_all()

    def _write(self, numbers: NDArray[np.int64], data: NDArray[np.uint8] | None) -> None:
        """Through the file, not a mapping: a page that was never touched costs no fault then, and one that cannot be
        had is an error rather than SIGBUS."""
        if data is None:
            numbers = numbers[~self._untouched[numbers]]
            data = np.zeros((len(numbers), PAGE), np.uint8)
        self._untouched[numbers] = False
        for first, _, there in runs(numbers):
            write_at(self._fd, data[there].reshape(-1).data, first * PAGE)

    def reserve(self) -> Iterator[int]:
        """What has not been written gets memory, piece by piece; bytes so far. Before a guest has it: what it touches
        first must be there. Raises OSError (ENOSPC)."""
        for start in range(0, self._size, _PIECE):
            reserve(self._fd, start, min(_PIECE, self._size - start))
            yield min(start + _PIECE, self._size)

    def close(self) -> None:
        """Nobody writes any more when this returns. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.wait_for(lambda: not self._writers)
        os.close(self._fd)
