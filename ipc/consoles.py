"""The console of a Linux program, as a stream between its system and the process that shows it: frames in two FIFOs
of the machine's directory. Nothing is lost: who writes waits until there is room.

A frame is one byte that says what it is, the number of bytes that follow in 32 bits, and these.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

__all__ = ["COUNT", "SIZE", "Frame", "FrameReader", "FrameWriter", "open_input", "open_output"]

_HEADER = struct.Struct("<BI")
_READ = 1 << 16
_MOST = 1 << 16         # bytes of a frame


class Frame(IntEnum):
    """What a frame is."""

    #: To the program: what was typed, or comes; its end; the size of the terminal (`SIZE`).
    INPUT = 1
    INPUT_ENDS = 2
    SIZE = 3
    #: From the program: what it writes to 1, and to 2. From its system: it has ended.
    OUTPUT = 4
    ERROR = 5
    ENDED = 6
    #: To the program: a signal (its number, one byte).
    SIGNAL = 7
    #: From its system: so many bytes more can come as INPUT (`COUNT`). None comes unasked.
    WANTED = 8


#: Rows and columns.
SIZE = struct.Struct("<HH")
#: A number of bytes.
COUNT = struct.Struct("<I")


def open_input(directory: Path) -> int:
    """A descriptor that does not block, for either end. Raises OSError."""
    return os.open(directory / "console-in", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def open_output(directory: Path) -> int:
    """The same. Raises OSError."""
    return os.open(directory / "console-out", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


class FrameReader:
    """What has come through a descriptor that does not block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """(what it is, bytes) of each that is whole after one read: there may be more, which poll(2) tells, so that
        nobody is kept here by who writes fast. Raises OSError."""
        try:
            self._data += os.read(self._fd, _READ)
        except BlockingIOError:
            return
        while len(self._data) >= _HEADER.size:
            kind, size = _HEADER.unpack_from(self._data)
            if len(self._data) < _HEADER.size + size:
                break
            data = bytes(self._data[_HEADER.size:_HEADER.size + size])
            del self._data[:_HEADER.size + size]
            yield kind, data


class FrameWriter:
    """``pending``: bytes that could not be written yet; ``flush`` when the descriptor takes some."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()

    @property
    def pending(self) -> int:
        return len(self._data)

    def put(self, kind: Frame, data: bytes = b"") -> None:
        """Raises OSError."""
        for at in range(0, len(data) or 1, _MOST):
            part = data[at:at + _MOST]
            self._data += _HEADER.pack(kind, len(part)) + part
        self.flush()

    def flush(self) -> None:
        """Raises OSError."""
        try:
            while self._data:
                del self._data[:os.write(self._fd, self._data[:_READ])]
        except BlockingIOError:
            pass
