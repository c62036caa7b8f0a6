"""Sockets that listen: at a TCP port, and at a path."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .linux.files import lock_within

__all__ = ["InTheWay", "UnixListener", "listen_tcp"]

#: What the kernel says where there is no IPv6, or it is switched off.
_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
_LOCK_PATIENCE = 2.0        # seconds for another that is about to listen in the same folder


class InTheWay(OSError):
    """What is at the path already is left there. ``strerror``: what it is, for people."""


def listen_tcp(host: str | None, port: int, backlog: int) -> socket.socket:
    """At the first address of that name; None: every address of the host, IPv6 and IPv4, or IPv4 where the host has no
    other. Unlike ``socket.create_server`` it leaves to the host whether an IPv6 address takes IPv4, too, and errors as
    the kernel has them. Raises OSError."""
    if host is None:
        try:
            return _listen(socket.AF_INET6, ("::", port), backlog, both=True)
        except OSError as exc:
            if exc.errno not in _NO_IPV6:
                raise
            return _listen(socket.AF_INET, ("0.0.0.0", port), backlog)
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except UnicodeError:        # of the encoding as a domain's name
        raise OSError(errno.EINVAL, "not a valid host name") from None
    return _listen(family, where, backlog)


def _listen(family: int, where: Any, backlog: int, *, both: bool = False) -> socket.socket:
    """``both``: IPv4 at an IPv6 socket, whatever the host is set to. Raises OSError."""
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        found.bind(where)
        found.listen(backlog)
    except OSError:
        found.close()
        raise
    return found


class UnixListener:
    """Connections wait at ``path`` from now on, of this user alone (mode 0600). What is there already is never
    replaced, but for a socket of this user on which nobody listens any more: its process was killed.

    ``inherited``: the descriptor of a socket that another process made to listen there, and its file, which becomes
    this one's."""

    def __init__(self, path: str | Path, backlog: int, *, inherited: int = -1) -> None:
        """Raises InTheWay, and OSError for what the kernel refuses."""
        self._path = Path(path)
        if inherited >= 0:
            self.socket = socket.socket(fileno=inherited)
            self._made: os.stat_result | None = os.lstat(self._path)
            return
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            os.fchmod(self.socket.fileno(), 0o600)      # bind(2) gives the file this mode, less the umask
            with _folder_locked(self._path.parent):
                _clear_stale(self._path)
                self.socket.bind(str(self._path))
                self._made = os.lstat(self._path)
                self.socket.listen(backlog)     # before another looks whether anybody does
        except OSError:
            self.socket.close()
            raise

    def leave(self) -> None:
        """Another process has the socket, and its file."""
        self.socket.close()
        self._made = None

    def close(self) -> None:
        """The file goes, unless it is another's by now. Idempotent."""
        self.socket.close()
        made, self._made = self._made, None
        if made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(self._path), made):
                    self._path.unlink()


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Two that listen at one path at the same moment take turns: else each could unlink the other's socket, which
    was stale when it looked. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            lock_within(fd, _LOCK_PATIENCE)
        except TimeoutError:
            raise InTheWay(errno.EBUSY, f"the directory {folder} is locked by another process") from None
        yield
    finally:
        os.close(fd)


def _clear_stale(path: Path) -> None:
    """Remove the socket of a listener that was killed; nothing else. Raises InTheWay for what else is there."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise InTheWay(errno.EEXIST, f"{path} exists and is not a socket: choose another path")
    if there.st_uid != os.geteuid():
        raise InTheWay(errno.EACCES,
                       f"{path} is a socket of another user (uid {there.st_uid}): choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass        # EAGAIN: there is a listener, whose backlog is full
    raise InTheWay(errno.EADDRINUSE, "another program is already listening there")
