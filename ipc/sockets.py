"""Sockets: ZeroMQ over ipc:// in the machine's 0700 runtime directory, and one Unix socket that
carries file descriptors (ZeroMQ cannot)."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from .layout import MAX_VCPUS
from .linux.peer import peer_of

__all__ = ["FRAME_MAX", "FdListener", "bind", "connect", "endpoint", "send_fd"]

_LINGER_MS = 500  # a last notification may still leave at exit, but never holds the process up

#: Bytes of the largest message that a worker sends (a vCPU's state is some 12 KiB); whoever sends more is cut off.
FRAME_MAX = 1 << 20


def endpoint(directory: Path, name: str) -> str:
    return f"ipc://{directory / name}"


def bind(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, *,
         frame_max: int = -1) -> zmq.Socket[bytes]:
    """``frame_max``: bytes of a frame; a peer that sends a larger one is disconnected."""
    sock = context.socket(kind)
    sock.linger = 0
    sock.setsockopt(zmq.MAXMSGSIZE, frame_max)
    if kind == zmq.ROUTER:
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unknown peer is an error, not silence
        sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
    sock.bind(address)
    return sock


def connect(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str,
            identity: bytes = b"") -> zmq.Socket[bytes]:
    sock = context.socket(kind)
    sock.linger = _LINGER_MS
    if identity:
        sock.setsockopt(zmq.IDENTITY, identity)
    sock.connect(address)
    return sock


_INDEX = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")      # struct ucred: pid, uid, gid
_WAITING_MAX = 2 * MAX_VCPUS            # connections that have sent nothing yet, and descriptors not asked for
_CONNECT_STEP = 0.01    # seconds between two tries to connect


class FdListener:
    """The receiving end: takes (vCPU index, fd) pairs.

    ``known(pid, index)``: such a process may send this one; without it, whichever of this user. Connections of
    others, those that close without a descriptor and those that send something else are counted (``dropped``) and
    hold nobody up."""

    def __init__(self, path: Path, known: Callable[[int, int], bool] | None = None) -> None:
        """Raises OSError."""
        self.path = path
        self.dropped = 0
        self._known = known
        self._waiting: dict[int, tuple[socket.socket, int]] = {}    # {fd: (connection, pid)}, the oldest first
        self._received: list[tuple[int, int]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._sock.setblocking(False)
        path.unlink(missing_ok=True)    # a coordinator that died has left its own
        try:
            self._sock.bind(str(path))
            self._sock.listen(MAX_VCPUS)
        except OSError:
            self._sock.close()
            raise

    def receive(self, timeout: float) -> tuple[int, int]:
        """The next (index, fd). Raises TimeoutError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        left = timeout
        while not self._received and left >= 0:
            self.serve(left)
            left = deadline - time.monotonic()
        if not self._received:
            raise TimeoutError(f"no file descriptor was received within {timeout:.0f} s")
        return self._received.pop(0)

    def serve(self, seconds: float = 0.0) -> None:
        """Look at whoever is connected, and wait so long for somebody: a queue that is full keeps senders out."""
        poller = select.poll()
        for fd in (self._sock.fileno(), *self._waiting):
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(seconds * 1000):
            if fd == self._sock.fileno():
                self._accept()
            else:
                self._take(*self._waiting.pop(fd))

    def _accept(self) -> None:
        """Everybody in the queue."""
        for _ in range(MAX_VCPUS + 1):
            try:
                peer, _ = self._sock.accept()
            except OSError:     # there is none, or it has gone again
                return
            pid, uid, _ = peer_of(peer)
            if uid != os.getuid():
                self.dropped += 1
                peer.close()
                continue
            peer.setblocking(False)
            self._waiting[peer.fileno()] = (peer, pid)
            if len(self._waiting) > _WAITING_MAX:
                self._waiting.pop(next(iter(self._waiting)))[0].close()
                self.dropped += 1

    def _take(self, peer: socket.socket, pid: int) -> None:
        """What a connection that is readable has sent."""
        fds: list[int] = []
        with peer:
            try:
                data, fds, flags, _ = socket.recv_fds(peer, _INDEX.size, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                data, flags = b"", 0
        if len(data) == _INDEX.size and len(fds) == 1 and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            index = _INDEX.unpack(data)[0]
            if len(self._received) < _WAITING_MAX and (self._known is None or self._known(pid, index)):
                self._received.append((index, fds[0]))
                return
        for fd in fds:
            os.close(fd)
        self.dropped += 1

    def close(self) -> None:
        """Descriptors that nobody has asked for are closed."""
        for peer, _ in self._waiting.values():
            peer.close()
        for _, fd in self._received:
            os.close(fd)
        self._waiting.clear()
        self._received.clear()
        self._sock.close()
        self.path.unlink(missing_ok=True)


def send_fd(path: str, index: int, fd: int, timeout: float) -> None:
    """The worker's end: hand ``fd`` over. It stays open here. Raises OSError, TimeoutError after ``timeout``
    seconds."""
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        while True:
            sock.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                sock.connect(path)
                break
            except BlockingIOError:     # unix(7): the queue of the listener is full, and nobody waits for it
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path}: too many pending connections") from None
                time.sleep(_CONNECT_STEP)
        sock.settimeout(timeout)
        socket.send_fds(sock, [_INDEX.pack(index)], [fd])
