"""A record in shared memory that a kill never tears, and that a full disk never refuses.

There are two segments, written in turn: a write goes to the older one, so that the newer is whole whatever becomes
of the writer. Each holds a header (magic, sequence number, length, CRC-32 of all but itself) and the record. Which
of the two counts is seen by their sequence numbers; one that was half written fails its checksum. Room is reserved
when they are made: only a record that has outgrown it can be refused for lack of memory, and then the one before
it stays.

What this guards against is the end of a process. Shared memory does not outlive the host, nor does the machine.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from types import TracebackType

import posix_ipc

from .shm import PAGE_SIZE, SegmentError, open_fd, unlink_segment
from .steps import step

__all__ = ["Journal"]

_HEADER = struct.Struct("<8sQQI4x")
_MAGIC = b"SHRDJRNL"
_SUMMED = struct.calcsize("<8sQQ")     # bytes of the header that the checksum covers


class Journal:
    """``Journal.create`` makes the pair and owns it (closing unlinks it); ``Journal.adopt`` takes over that of a
    process that died."""

    def __init__(self, names: tuple[str, str], fds: tuple[int, ...]) -> None:
        self.names = names
        self._fds = fds
        self._room = min(os.fstat(fd).st_size for fd in fds)
        self._sequence = 0

    @classmethod
    def create(cls, name: str, room: int) -> Journal:
        """A pair of segments, ``name`` with 0 and 1 behind it, each with room for ``room`` bytes of record. Raises
        SegmentError."""
        names = (f"{name}0", f"{name}1")
        fds = []
        with contextlib.ExitStack() as undo:
            try:
                for each in names:
                    fds.append(int(posix_ipc.SharedMemory(each, posix_ipc.O_CREX, mode=0o600).fd))
                    undo.callback(os.close, fds[-1])
                    undo.callback(unlink_segment, each)
                    os.posix_fallocate(fds[-1], 0, _whole_pages(_HEADER.size + room))
            except (posix_ipc.Error, OSError) as exc:
                raise SegmentError(f"cannot create shared-memory segment {each}: {exc}") from None
            undo.pop_all()
        return cls(names, (fds[0], fds[1]))

    @classmethod
    def adopt(cls, name: str) -> tuple[Journal, bytes]:
        """The pair of that name, and the last record that was written whole. Raises SegmentError where there is
        none."""
        names = (f"{name}0", f"{name}1")
        with contextlib.ExitStack() as stack:
            fds = []
            for each in names:
                fds.append(open_fd(each))
                stack.callback(os.close, fds[-1])
            journal = cls(names, (fds[0], fds[1]))
            found = max((_read(fd) for fd in fds), key=lambda each: each[0])
            if not found[0]:
                raise SegmentError(f"shared-memory segments {names[0]} and {names[1]} hold no complete record")
            journal._sequence = found[0]
            stack.pop_all()
        return journal, found[1]

    def write(self, record: bytes) -> None:
        """Whole, or not at all. Raises OSError when it needs more room than there is."""
        at = (self._sequence + 1) % 2
        head = struct.pack("<8sQQ", _MAGIC, self._sequence + 1, len(record))
        data = b"".join((head, struct.pack("<I4x", zlib.crc32(record, zlib.crc32(head))), record))
        step("journal-write")
        if len(data) > self._room:
            room = _whole_pages(2 * len(data))
            for fd in self._fds:    # both: a record that is no longer than one before is never refused
                os.posix_fallocate(fd, 0, room)
            self._room = room
        written = os.pwrite(self._fds[at], data, 0)     # the room is there: never less than all
        if written != len(data):
            raise OSError(f"{self.names[at]}: {written} of {len(data)} bytes were written")
        self._sequence += 1
        step("journal-written")

    def close(self) -> None:
        """Unlink both. Idempotent."""
        fds, self._fds = self._fds, ()
        for name, fd in zip(self.names, fds, strict=False):
            unlink_segment(name)
            os.close(fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def _read(fd: int) -> tuple[int, bytes]:
    """(sequence number, record); number 0 where there is no whole one."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    if len(data) < _HEADER.size:
        return 0, b""
    magic, sequence, length, checksum = _HEADER.unpack_from(data)
    record = data[_HEADER.size:_HEADER.size + length]
    if magic != _MAGIC or len(record) != length or zlib.crc32(record, zlib.crc32(data[:_SUMMED])) != checksum:
        return 0, b""
    return sequence, record
