"""The machine's memory as its system sees it: frames of shared segments, and the log of what is written to them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

from ipc.linux.libc import LIBC, check
from ipc.shm import PAGE_SIZE

from ..memory import GuestMemory, Slot
from .frames import Run
from .log import WriteLog

__all__ = ["Ram"]

_REMOVE, _POPULATE_WRITE = 9, 23        # uapi/asm-generic/mman-common.h
_PART = 256                             # frames that are cleared together


class Ram:
    """A ``Memory`` (space.py). ``close`` it before its slots. ``forget``: called with vCPUs and runs of frames of which
    they must drop what they keep, where they do not by themselves; it returns when those that are in the guest have."""

    def __init__(self, memory: GuestMemory, slots: Iterable[Slot], log: WriteLog) -> None:
        self._memory, self._log = memory, log
        self.forget: Callable[[Iterable[int], list[Run]], None] | None = None
        self._slots = [(slot.spec.gpa // PAGE_SIZE, (slot.spec.gpa + slot.spec.size) // PAGE_SIZE, slot.host_address,
                        memoryview(slot.segment.buf)) for slot in slots]

    def close(self) -> None:
        for *_, view in self._slots:
            view.release()

    def _at(self, frame: int) -> tuple[memoryview, int]:
        for first, end, _, view in self._slots:
            if first <= frame < end:
                return view, (frame - first) * PAGE_SIZE
        raise KeyError(frame)

    def host_address(self, frame: int, offset: int) -> int:
        """Of a place in this process. Raises KeyError outside RAM."""
        for first, end, address, _ in self._slots:
            if first <= frame < end:
                return address + (frame - first) * PAGE_SIZE + offset
        raise KeyError(frame)

    def wrote(self, frame: int) -> None:
        """By its host address."""
        self._log.need()
        self._log.wrote(frame)

    def read(self, frame: int, offset: int, count: int) -> bytes:
        view, at = self._at(frame)
        return bytes(view[at + offset:at + offset + count])

    def write(self, frame: int, offset: int, data: bytes | memoryview) -> None:
        view, at = self._at(frame)
        self._log.need()
        view[at + offset:at + offset + len(data)] = data
        self._log.wrote(frame)

    def copy(self, source: int, target: int) -> None:
        view, at = self._at(source)
        self.write(target, 0, view[at:at + PAGE_SIZE])

    def clear(self, runs: list[Run], visitors: Iterable[int] = ()) -> None:
        """A hole is punched, which takes every process' mapping along; and filled again at once, so that the memory
        stays reserved. (In post-copy it may be filled with what was there elsewhere: that is no longer wanted.) Raises
        OSError where the host has none."""
        if self.forget is not None:
            self.forget(visitors, runs)
        for first, count in runs:
            for start in range(first, first + count, _PART):
                self._clear(start, min(_PART, first + count - start))

    def _clear(self, first: int, count: int) -> None:
        self._log.need(count)
        for begin, end, address, _ in self._slots:
            if begin <= first < end:
                place, size = ctypes.c_void_p(address + (first - begin) * PAGE_SIZE), ctypes.c_size_t(count * PAGE_SIZE)
                check(LIBC.madvise(place, size, _REMOVE))
                check(LIBC.madvise(place, size, _POPULATE_WRITE))
                if self._memory.is_arriving:
                    ctypes.memset(place, 0, size.value)
        for frame in range(first, first + count):
            self._log.wrote(frame)
