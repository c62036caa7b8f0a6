"""The connections that pages go over: plain sockets, straight between them and the memory's segments.

What is controlled goes over ZeroMQ (sockets.py). Pages are too much for that: each would be copied into a frame and out
of it again, under Python's lock. Here the kernel moves them: from a segment to the socket by sendfile(2), which for a
socket of this host only refers to the page, and at the other end into a buffer that stays in the processor's cache,
and from there into the segment by pwrite(2) (memory.py). No thread holds Python's lock meanwhile. Where it is
encrypted (tls.py), the library reads the memory and the kernel gets what comes of it.

A message is a head (size of the message, size of its data, XXH3 of the message), the message, and its data. The sockets
block. Whoever wants to be rid of a thread that waits in one shuts the connection (``Stream.shut``), from any thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .pages import CHUNK_PAGES, PAGE, Runs
from .wire import Buffer, OnStream, Pages, WireError, decode_stream, frames

__all__ = ["Sent", "Stream"]

_HEAD = struct.Struct("<II8s")
_MESSAGE_MAX = 1 << 16      # bytes: of the numbers of CHUNK_PAGES pages and some
_DATA_MAX = CHUNK_PAGES * PAGE


class Sent(NamedTuple):
    """A slot's memory [bytes], and a descriptor of its segment: a view and a file of the same bytes."""

    memory: NDArray[np.uint8]
    fd: int


class Stream:
    """A connected socket, which is its own from now on. One thread sends, one receives. ``with`` it."""

    def __init__(self, sock: socket.socket | ssl.SSLSocket) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._encrypts = isinstance(sock, ssl.SSLSocket)
        # To be shut by: what encrypts must not be touched by another thread.
        self._raw = socket.socket(fileno=os.dup(sock.fileno()))
        self._buffer = memoryview(b"")      # of one that receives

    def send(self, message: OnStream, data: Buffer | Runs = b"", of: Sent | None = None) -> int:
        """``data``: bytes, or runs of the memory ``of`` a slot. How many bytes it was on the way. Raises OSError."""
        frame, digest = frames(message)
        size = data.size if isinstance(data, Runs) else len(data)
        head = _HEAD.pack(len(frame), size, digest) + frame
        self._sock.sendall(head)
        if isinstance(data, Runs):
            assert of is not None
            for first, count in data.runs:
                self._send_run(of, first, count)
        elif size:
            self._sock.sendall(data)
        return len(head) + size

    def _send_run(self, of: Sent, first: int, count: int) -> None:
        if self._encrypts:
            self._sock.sendall(of.memory[first:first + count].data)
            return
        while count:
            sent = os.sendfile(self._sock.fileno(), of.fd, first, count)
            if not sent:
                raise ConnectionError("the memory's segment has become smaller")
            first, count = first + sent, count - sent

    def receive(self) -> tuple[OnStream, memoryview] | None:
        """The next message and its data, which are good until the next call; None at the end. Raises OSError, and
        WireError for what is no message."""
        head = bytearray(_HEAD.size)
        if not self._fill(memoryview(head)):
            return None
        size, data_size, digest = _HEAD.unpack(head)
        if not 0 < size <= _MESSAGE_MAX or data_size > _DATA_MAX:
            raise WireError(f"the other end sent a message of {size} bytes with {data_size} bytes of pages")
        if not self._buffer:
            self._buffer = memoryview(bytearray(_DATA_MAX))
        frame = bytearray(size)
        data = self._buffer[:data_size]
        if not (self._fill(memoryview(frame)) and self._fill(data)):
            return None
        message = decode_stream(bytes(frame), digest)
        if data_size and not isinstance(message, Pages):
            raise WireError(f"the other end sent {data_size} bytes of pages with {type(message).__name__}")
        return message, data

    def _fill(self, buffer: memoryview) -> bool:
        """False where the connection ends before. Raises OSError."""
        while len(buffer):
            count = self._sock.recv_into(buffer)
            if not count:
                return False
            buffer = buffer[count:]
        return True

    def bear(self, seconds: float | None) -> None:
        """How long one may be waited for in here; None: for good."""
        self._sock.settimeout(seconds)

    def shut(self) -> None:
        """Both ends see the end; who waits in here goes on."""
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()
        self._raw.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
