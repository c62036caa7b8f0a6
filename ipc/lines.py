"""Unix sockets that carry lines: the control socket's transport, both ends.

Not ZeroMQ, which accepts connections without bound (and aborts the process when no descriptor is left for one),
queues for peers that do not read, and does not say who a peer is. Here each connection has its peer's pid and uid
(SO_PEERCRED, unix(7)), a bounded line to read and at most what it was last sent to write.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from pathlib import Path

from .linux.peer import peer_of

__all__ = ["LINE_MAX", "LineConnection", "LineListener", "LineTooLong", "connect_lines"]

#: Bytes of a line. The states of 256 vCPUs are below 10 MB.
LINE_MAX = 32 << 20
_READ = 256 << 10
_BACKLOG = 64


class LineTooLong(Exception):
    """A peer sent a line of more than LINE_MAX bytes."""


class LineConnection:
    """One connection; it never blocks. ``pid``, ``uid``: of the peer, as it connected."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.pid, self.uid, _ = peer_of(sock)
        #: Whole lines that have come, without their newlines.
        self.lines: deque[bytes] = deque()
        self._begun = bytearray()
        self._unsent = memoryview(b"")

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def sending(self) -> bool:
        """Something that was sent has not left yet."""
        return len(self._unsent) > 0

    def receive(self) -> bool:
        """Take what is there, for a while; False when the peer has closed. Raises LineTooLong."""
        try:
            chunk = self._sock.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:     # it has reset the connection
            return False
        *lines, rest = chunk.split(b"\n")
        if lines:
            self.lines.append(bytes(self._begun) + lines[0])
            self.lines.extend(lines[1:])
            self._begun = bytearray()
        self._begun += rest
        if len(self._begun) > LINE_MAX:
            raise LineTooLong
        return bool(chunk)

    def send(self, line: bytes) -> None:
        """Send a line, or so much of it as goes; ``flush`` the rest when the socket can be written. Raises OSError
        when the peer has gone."""
        self._unsent = memoryview(bytes(self._unsent) + line + b"\n")
        self.flush()

    def flush(self) -> None:
        """Raises OSError when the peer has gone."""
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while len(self._unsent):
                self._unsent = self._unsent[self._sock.send(self._unsent):]

    def close(self) -> None:
        self._sock.close()


class LineListener:
    """The listening end. What a process that died has left at ``path`` is replaced."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Given up for a moment when no descriptor is left: without taking a connection it cannot be refused.
        self._spare = -1
        try:
            self._sock.setblocking(False)
            path.unlink(missing_ok=True)
            self._sock.bind(str(path))
            self._sock.listen(_BACKLOG)
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> LineConnection | None:
        """The next connection; None when there is none (any more), or none that this process can have."""
        try:
            sock, _ = self._sock.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE) and self._spare >= 0:
                os.close(self._spare)
                with contextlib.suppress(OSError):
                    self._sock.accept()[0].close()
                try:
                    self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                except OSError:
                    self._spare = -1
            return None
        return LineConnection(sock)

    def close(self) -> None:
        """The path goes too."""
        self._sock.close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def connect_lines(path: Path) -> LineConnection:
    """Raises OSError: FileNotFoundError and ConnectionRefusedError where nobody listens, BlockingIOError where
    whoever does is behind."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(str(path))
        return LineConnection(sock)
    except BaseException:
        sock.close()
        raise
