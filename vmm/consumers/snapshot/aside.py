"""Pages that are copied into memory first, and into their files later: a hundred times as fast as a disk, so that the
guest stands still for the last of them only.

A page costs 1 us, if neither the guest's memory nor the place where it goes has to be mapped first (5 us and more where
page tables are nested). So both are mapped before.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import set_bit_indices
from ipc.linux.libc import LIBC
from ipc.linux.memory import available_memory, cgroup_left

from .pagefile import PageWriter
from .pagemap import PAGE, Words
from .threads import Progress, behind

__all__ = ["Aside"]

_SHARE = 4              # of the memory that can still be had, one part in so many is used at most
_POPULATE_READ = 22     # uapi/asm-generic/mman-common.h; from Linux 5.14

Memory = NDArray[np.uint8]


class Aside:
    """Room for ``pages`` pages, mapped now, and for some more that are not."""

    def __init__(self, pages: int) -> None:
        group = cgroup_left()
        self._room = min(available_memory(), group[0] if group else 1 << 62) // _SHARE // PAGE
        self._mapped = np.empty((0, PAGE), np.uint8)
        if 0 < pages <= self._room:
            arena = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
            self._mapped = np.frombuffer(arena, np.uint8).reshape(-1, PAGE)
        self._copied: list[tuple[PageWriter, NDArray[np.int64], Memory]] = []

    def map(self, memory: Memory) -> None:
        """Copies of this view will be asked for: none is to find a page that is not mapped. A kernel that does not know
        how maps them one by one."""
        LIBC.madvise(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), _POPULATE_READ)

    def has_room(self, pages: int) -> bool:
        """For so many more."""
        return pages <= self._room

    @property
    def pages(self) -> int:
        """That are here."""
        return sum(len(pages) for _, pages, _ in self._copied)

    def copy(self, writer: PageWriter, memory: Memory, words: Words) -> None:
        """These pages of the slot's ``memory`` (uint8 [bytes]), as they are now, for this file."""
        pages, view = set_bit_indices(words), memory.reshape(-1, PAGE)
        count = len(pages)
        self._room -= count
        if count <= len(self._mapped):
            data, self._mapped = self._mapped[:count], self._mapped[count:]
            np.take(view, pages, axis=0, out=data, mode="clip")     # other modes copy it twice
        else:
            data = view[pages]
        self._copied.append((writer, pages, data))

    def write(self, progress: Progress, before: int, total: int) -> None:
        """All of them to their files, the oldest first. Raises OSError."""
        while self._copied:
            writer, pages, data = self._copied.pop(0)
            writer.put_pages(pages, data, behind(progress, before, total))
            before += len(pages)
            self._room += len(pages)
