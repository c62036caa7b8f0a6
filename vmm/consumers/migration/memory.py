"""The memory of a machine that arrives, as the target fills it in before the start."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from ipc.shm import data_extents, open_fd

from ...client.machine import Machine
from .pages import PAGE

__all__ = ["SlotMemory"]

_RUN = 4                    # pages that must follow one another, on average, to be written through the file


class SlotMemory:
    """A slot of the machine that is to come; all zero at first."""

    def __init__(self, machine: Machine, slot: int) -> None:
        self._pages = machine.ram(slot, writable=True).reshape(-1, PAGE)
        self._fd = open_fd(machine.ram_segment(slot))
        #: Pages that are zero for certain: never touched.
        self._untouched = np.ones(len(self._pages), bool)
        for start, end in data_extents(self._fd, self._pages.size):     # what the loader has put there
            self._pages[start // PAGE:end // PAGE] = 0

    def write(self, numbers: NDArray[np.int64], data: NDArray[np.uint8] | None) -> None:
        """``data`` [n, 4096], None: zeros."""
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
        """The mapping goes with the last view of it."""
        os.close(self._fd)
        del self._pages
