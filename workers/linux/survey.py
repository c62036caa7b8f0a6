"""What the processes of a machine have mapped, and to which of their mappings the pages belong that were dirtied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ipc.messages import BitmapPlace
from ipc.shm import open_fd

from .procfs.maps import label, rights
from .space import PAGE

if TYPE_CHECKING:
    from .processes import Process, Thread
    from .space import Mapping as Mapped
    from .system import System

__all__ = ["Dirtied", "survey"]

#: {byte: its bits, a byte each, the lowest first}
_BITS = tuple(bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256))


class Dirtied:
    """Pages of the frames from ``first`` on: ``bits`` is their bitmap."""

    def __init__(self, first: int, count: int, bits: bytes) -> None:
        self.first = first
        self.flags = b"".join(map(_BITS.__getitem__, bits))[:count]
        self._left = bytearray(self.flags)

    @classmethod
    def read(cls, place: BitmapPlace, first: int, count: int) -> Dirtied:
        """Raises SegmentError and OSError."""
        fd = open_fd(place.segment)
        try:
            return cls(first, count, os.pread(fd, -(-count // 64) * 8, place.offset))
        finally:
            os.close(fd)

    def count(self, frames: list[int]) -> int:
        """How many of them were dirtied. They are somebody's."""
        flags, first, left = self.flags, self.first, self._left
        found = [frame - first for frame in frames if flags[frame - first]]
        for at in found:
            left[at] = 0
        return len(found)

    def of_nobody(self) -> list[int]:
        """Frames that were dirtied, and have not been counted."""
        found, at = [], self._left.find(1)
        while at >= 0:
            found.append(self.first + at)
            at = self._left.find(1, at + 1)
        return found


def survey(system: System, vcpus: Mapping[Thread, int], dirtied: Dirtied | None = None) -> dict[str, Any]:
    """``processes`` with their ``threads`` and ``mappings``. With ``dirtied`` also ``dirty_pages`` of each mapping and
    of all memory, and of the pages that are in no mapping: ``cached_pages``, which something else has (a file, above
    all), and ``free_pages``."""
    count = dirtied.count if dirtied is not None else None
    found: dict[str, Any] = {"processes": [_process(system, each, vcpus, count) for each in system.processes.values()
                                           if each.code is None]}
    if dirtied is not None:
        left = dirtied.of_nobody()
        free = sum(not system.frames.uses(frame) for frame in left)
        found |= {"dirty_pages": dirtied.flags.count(1), "cached_pages": len(left) - free, "free_pages": free}
    return found


def _process(system: System, process: Process, vcpus: Mapping[Thread, int],
             count: Callable[[list[int]], int] | None) -> dict[str, Any]:
    return {
        "pid": process.pid, "parent": process.parent, "name": _text(process.name), "program": _text(process.path),
        "threads": [{"tid": each.tid, "name": _text(each.name), "vcpu": vcpus.get(each)} for each in process.threads],
        "mappings": [_mapping(system, process, each, count) for each in process.space.mappings]}


def _mapping(system: System, process: Process, mapping: Mapped,
             count: Callable[[list[int]], int] | None) -> dict[str, Any]:
    try:
        what = label(system.files, mapping) or b"anonymous"
    except OSError:
        what = b"?"
    frames = process.space.frames_of(mapping)
    return {"start": mapping.start * PAGE, "end": mapping.end * PAGE, "rights": rights(mapping).decode(),
            "what": _text(what), "resident_pages": len(frames),
            **({} if count is None else {"dirty_pages": count(frames)})}


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
