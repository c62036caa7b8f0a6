"""Connections from ports of the host into a machine: frames in two FIFOs of the machine's directory, between the system
of its programs and one process outside, the forwarder. Connections are numbered by the forwarder, none twice.

A frame is one byte that says what it is, the number of the connection and the number of bytes that follow, in 32 bits
each, and these. No frame is longer than what a pipe takes as a whole (pipe(7), PIPE_BUF), and a read takes all that is
in a pipe: so frames are whole on both sides, whoever is killed. A forwarder begins with HELLO and its own number;
what comes before the same from the system is for one that was there before it. The system reads at the end of the
FIFO for reading alone: where a forwarder goes, it finds the end of the file there.

A side may have sent `WINDOW` bytes of a connection for which it has got no credit: who does not read holds up nobody
else, since everything is always taken from the FIFOs.
"""

from __future__ import annotations

import os
import select
import struct
from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

__all__ = ["COUNT", "FULL", "PIPES", "WINDOW", "FrameError", "Kind", "Link", "open_inside", "open_outside"]

#: In the machine's directory: what goes in, what comes out.
PIPES = ("network-in", "network-out")
#: Bytes of a connection that are on their way in one direction, at most.
WINDOW = 256 << 10
#: Pending bytes from which on nothing that can wait should be put.
FULL = 256 << 10
#: A number of bytes, or a port.
COUNT = struct.Struct("<I")

_HEADER = struct.Struct("<BII")
_ATOMIC = 4096          # PIPE_BUF
_PIECE = _ATOMIC - _HEADER.size
_READ = 1 << 16         # as much as there is in a pipe


class Kind(IntEnum):
    """What a frame is."""

    #: Both ways: the number of the forwarder (in place of a connection's), none of whose connections is there yet.
    HELLO = 1
    #: To the system: a connection to this port (`COUNT`), and from where, for people.
    OPEN = 2
    #: Both ways: bytes; there are no more; it is over and was not ended in order; the other side may send so many
    #: bytes more (`COUNT`).
    DATA = 3
    END = 4
    RESET = 5
    CREDIT = 6


class FrameError(Exception):
    """What came is no frame."""


def open_inside(directory: Path, *, also_out: bool = True) -> tuple[int, int]:
    """Descriptors that do not block, for the system: to read from, and to write to (-1 without ``also_out``). Raises
    OSError."""
    incoming = os.open(directory / PIPES[0], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not also_out:
        return incoming, -1
    # Also for reading: so it can be opened, and nobody is told of a broken pipe, while there is no forwarder.
    return incoming, os.open(directory / PIPES[1], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def open_outside(directory: Path) -> tuple[int, int]:
    """The same for a forwarder. Raises OSError: ENOENT where there is no such machine, ENXIO where its system is not
    there."""
    outgoing = os.open(directory / PIPES[0], os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.open(directory / PIPES[1], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), outgoing
    except OSError:
        os.close(outgoing)
        raise


class Link:
    """One end of the two FIFOs: it is read from ``source`` and written to ``target``, which do not block.
    ``has_ended``: the other end has gone."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.has_ended = False
        self.pending = 0
        self._data = bytearray()
        self._out: deque[bytearray] = deque()       # each is written as a whole
        self._poll = select.poll()
        self._poll.register(source, select.POLLIN)

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """(what it is, connection, bytes) of each that came with one read; there may be more. Raises FrameError and
        OSError."""
        try:
            found = os.read(self.source, _READ)
        except BlockingIOError:
            return
        self._data += found
        if not found:
            self.has_ended = True
            self._data.clear()
        while len(self._data) >= _HEADER.size:
            kind, number, size = _HEADER.unpack_from(self._data)
            if size > _PIECE:
                self._data.clear()
                raise FrameError
            if len(self._data) < _HEADER.size + size:
                break
            data = bytes(self._data[_HEADER.size:_HEADER.size + size])
            del self._data[:_HEADER.size + size]
            yield kind, number, data

    def put(self, kind: Kind, number: int, data: bytes | bytearray = b"") -> None:
        """It is written with the next ``flush``."""
        for at in range(0, len(data) or 1, _PIECE):
            part = data[at:at + _PIECE]
            if not self._out or len(self._out[-1]) + _HEADER.size + len(part) > _ATOMIC:
                self._out.append(bytearray())
            self._out[-1] += _HEADER.pack(kind, number, len(part)) + part
            self.pending += _HEADER.size + len(part)

    def flush(self) -> None:
        """As far as there is room. Raises OSError."""
        while self._out:
            try:
                self.pending -= os.write(self.target, self._out[0])
            except BlockingIOError:
                return
            self._out.popleft()

    def forget(self) -> None:
        """What has not been written."""
        self._out.clear()
        self.pending = 0

    def look(self) -> bool:
        """Whether there is something to read, or the end."""
        return bool(self._poll.poll(0))

    def reopen(self, directory: Path) -> None:
        """Of the system, at the end of ``source``: for the next forwarder, under the same number. Raises OSError."""
        fresh, _ = open_inside(directory, also_out=False)
        try:
            os.dup2(fresh, self.source, inheritable=False)
        finally:
            os.close(fresh)
        self.has_ended = False

    def close(self) -> None:
        """Raises OSError."""
        os.close(self.source)
        os.close(self.target)

