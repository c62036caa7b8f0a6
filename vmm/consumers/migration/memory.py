"""The memory of a machine as the source sends it, and that of one that arrives, as the target fills it in before the
start."""

from __future__ import annotations

import os
import threading

import numpy as np
from numpy.typing import NDArray

from ipc.shm import data_extents, open_fd

from ...client.machine import Machine
from .pages import PAGE
from .streams import Sent

__all__ = ["SentMemory", "SlotMemory"]

_RUN = 4                    # pages that must follow one another, on average, to be written through the file


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
    """A slot of the machine that is to come; all zero at first. Threads may write different pages at once."""

    def __init__(self, machine: Machine, slot: int) -> None:
        self._pages = machine.ram(slot, writable=True).reshape(-1, PAGE)
        self._fd = open_fd(machine.ram_segment(slot))
        self._lock = threading.Condition()
        self._writers = 0
        self._closed = False
        #: Pages that are zero for certain: never touched.
        self._untouched = np.ones(len(self._pages), bool)
        for start, end in data_extents(self._fd, self._pages.size):     # what the loader has put there
            self._pages[start // PAGE:end // PAGE] = 0

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
        if data is None:
            touched = numbers[~self._untouched[numbers]]
            self._pages[touched] = 0
            return
        self._untouched[numbers] = False
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        if len(breaks) >= len(numbers) // _RUN:
            self._pages[numbers] = data
            return
        # Through the file, not the mapping: a page that was never touched costs no fault then.
        at = 0
        for run in np.split(numbers, breaks):
            self._put(data[at:at + len(run)], int(run[0]) * PAGE)
            at += len(run)

    def _put(self, data: NDArray[np.uint8], offset: int) -> None:
        view = data.reshape(-1).data
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            view = view[count:]
            offset += count

    def close(self) -> None:
        """Nobody writes any more when this returns. The mapping goes with the last view of it."""
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._writers)
        os.close(self._fd)
        del self._pages
