"""Sockets: ZeroMQ over ipc:// in the machine's 0700 runtime directory, and one Unix socket that
carries file descriptors (ZeroMQ cannot)."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import zmq

from .layout import MAX_VCPUS

__all__ = ["FdListener", "bind", "connect", "endpoint", "send_fd"]

_LINGER_MS = 500  # a last notification may still leave at exit, but never holds the process up


def endpoint(directory: Path, name: str) -> str:
    return f"ipc://{directory / name}"


def bind(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    sock = context.socket(kind)
    sock.linger = 0
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


class FdListener:
    """The receiving end: takes (vCPU index, fd) pairs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        path.unlink(missing_ok=True)    # a coordinator that died has left its own
        try:
            self._sock.bind(str(path))
            self._sock.listen(MAX_VCPUS)
        except OSError:
            self._sock.close()
            raise

    def receive(self, timeout: float) -> tuple[int, int]:
        """The next (index, fd). Raises TimeoutError, and OSError on a peer that sent neither."""
        self._sock.settimeout(timeout)
        peer, _ = self._sock.accept()
        with peer:
            peer.settimeout(timeout)
            data, fds, _, _ = socket.recv_fds(peer, _INDEX.size, 1)
            if len(data) != _INDEX.size or len(fds) != 1:
                for fd in fds:
                    os.close(fd)
                raise OSError("a worker sent no file descriptor")
            return _INDEX.unpack(data)[0], fds[0]

    def close(self) -> None:
        self._sock.close()
        self.path.unlink(missing_ok=True)


def send_fd(path: str, index: int, fd: int, timeout: float) -> None:
    """The worker's end: hand ``fd`` over. It stays open here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        socket.send_fds(sock, [_INDEX.pack(index)], [fd])
