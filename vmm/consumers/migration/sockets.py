"""The sockets of a migration: made in one place, so that each has a heartbeat, an end to each wait, and a peer that
was looked at.

The target listens on a ROUTER, the source connects DEALERs. A connection that breaks is an error, never mended
behind our back: ZeroMQ's own reconnecting is off. Heartbeats (ZMTP's PING and PONG) find the end of a peer that
went silent without a FIN or RST; the answers of the other end's program, not only of its ZeroMQ, are
awaited above (vmm/consumers/migration/talk.py, peers.py).

A Unix socket is the user's own: the file of a listener is mode 0600, a peer that connects to it is this user or
root, and so is one that is connected to (SO_PEERCRED, both ways).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc.linux.files import lock_within

from ...errors import VmmError
from .addresses import Address
from .keys import Keys, admit, present

__all__ = ["Connection", "Unreachable", "connect", "listen"]

_HEARTBEAT_MS = 2000
_HEARTBEAT_TIMEOUT_MS = 10_000  # without a sign of life a connection is broken
_HANDSHAKE_MS = 10_000
_BACKLOG = 64
_LOCK_PATIENCE = 2.0        # seconds for another that is about to listen in the same folder
_RETRY = 0.1                # seconds between two attempts to connect
_QUEUE_IN = 64              # messages that wait here, per connection
_MESSAGE_MAX = 1 << 30      # bytes
_NEVER_MS = 1 << 30         # 12 days. Not -1, "never": ZeroMQ then drops what a peer said just before it went
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_UCRED = struct.Struct("iII")   # struct ucred: pid, uid, gid


def _common(sock: zmq.Socket[bytes]) -> None:
    sock.linger = 0
    sock.maxmsgsize = _MESSAGE_MAX
    sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TTL, _HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)


# --- the target: listen --------------------------------------------------------------------------------------


@contextlib.contextmanager
def listen(context: zmq.Context[zmq.Socket[bytes]], address: Address,
           keys: Keys | None) -> Iterator[zmq.Socket[bytes]]:
    """A ROUTER at the address. Raises VmmError when that is not possible: what is already there is never replaced, but
    for the socket that a receiver of this user has left behind when it was killed."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(context.socket(zmq.ROUTER))
        _common(sock)
        sock.rcvhwm = _QUEUE_IN
        sock.router_mandatory = True    # an answer to one who has gone is an error, not silence
        stack.enter_context(admit(context, sock, keys))
        if address.local:
            for uid in {os.geteuid(), 0}:
                sock.setsockopt(zmq.IPC_FILTER_UID, uid)
            stack.enter_context(_own_socket(sock, address))
        else:
            _bind(sock, address)
        yield sock


def _bind(sock: zmq.Socket[bytes], address: Address) -> None:
    why = ""
    for endpoint in address.listening():
        sock.ipv6 = "[" in endpoint
        try:
            sock.bind(endpoint)
            return
        except zmq.ZMQError as exc:
            why = why or str(exc.strerror)
    raise VmmError(f"{address.text}: cannot listen there: {why}")


@contextlib.contextmanager
def _own_socket(sock: zmq.Socket[bytes], address: Address) -> Iterator[None]:
    """Have ``sock`` listen at the path, which is a socket of ours while this lasts. ZeroMQ is given one that
    listens already: left to itself it would unlink whatever is there first."""
    path = Path(address.path)
    made = None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as listener:
        try:
            if address.abstract:
                listener.bind("\0" + address.path[1:])
            else:
                os.fchmod(listener.fileno(), 0o600)     # bind(2) gives the file this mode, less the umask
                with _folder_locked(path.parent):
                    _clear_stale(path, address)
                    listener.bind(str(path))
                    made = os.lstat(path)
            listener.listen(_BACKLOG)
        except OSError as exc:
            why = "another program is already listening" if exc.errno == errno.EADDRINUSE else exc.strerror
            raise VmmError(f"{address.text}: cannot listen there: {why}") from None
        sock.setsockopt(zmq.USE_FD, os.dup(listener.fileno()))
        sock.bind(f"ipc://{address.path}")
    try:
        yield
    finally:
        if made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(path), made):
                    path.unlink()


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Two that listen at one path at the same moment take turns: else each could unlink the other's socket, which
    was stale when it looked. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            lock_within(fd, _LOCK_PATIENCE)
        except TimeoutError:
            raise OSError(errno.EBUSY, f"the directory {folder} is locked by another process") from None
        yield
    finally:
        os.close(fd)


def _clear_stale(path: Path, address: Address) -> None:
    """Remove the socket of a receiver that was killed; nothing else. Raises VmmError for what else is there."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise VmmError(f"{address.text}: {path} exists and is not a socket: choose another path")
    if there.st_uid != os.geteuid():
        raise VmmError(f"{address.text}: {path} is a socket of another user (uid {there.st_uid}): choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass        # EAGAIN: there is a listener, whose backlog is full
    raise VmmError(f"{address.text}: another program is already listening there")


# --- the source: connect --------------------------------------------------------------------------------------


class Connection:
    """A DEALER that is connected, its handshake done and its peer looked at. When it breaks it stays broken."""

    def __init__(self, sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        self.sock = sock
        self._monitor = monitor
        self._broken = False

    @property
    def broken(self) -> bool:
        """The peer has gone, or no longer says anything."""
        while not self._broken and self._monitor.poll(0):
            self._broken = bool(recv_monitor_message(self._monitor)["event"] & (_LOST | _REFUSED))
        return self._broken

    def close(self, *, linger_ms: int = 0) -> None:
        """``linger_ms``: what was sent last has so long to leave."""
        self.sock.linger = linger_ms
        self.sock.disable_monitor()
        self._monitor.close(linger=0)
        self.sock.close()


def connect(context: zmq.Context[zmq.Socket[bytes]], address: Address, keys: Keys | None, *, until: float,
            queue: int = 1000) -> Connection:
    """Tried until a receiver listens there, or the monotonic time ``until``. ``queue``: messages that may wait to be
    sent. Raises VmmError."""
    endpoints = address.endpoints()
    why = "no receiver is listening there (start vmm receive there first)"
    while True:
        for endpoint in endpoints:
            try:
                patience = min(until, time.monotonic() + _HANDSHAKE_MS / 1000)
                return _attempt(context, endpoint, address, keys, patience, queue)
            except _NotNow as exc:
                why = str(exc) or why
        if time.monotonic() + _RETRY > until:
            raise Unreachable(f"{address.text}: {why}")
        time.sleep(_RETRY)


class Unreachable(VmmError):
    """No receiver could be connected to in time."""


class _NotNow(Exception):
    """It may be otherwise in a moment."""


def _attempt(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, address: Address, keys: Keys | None,
             until: float, queue: int) -> Connection:
    sock = context.socket(zmq.DEALER)
    _common(sock)
    sock.sndhwm = queue
    sock.ipv6 = "[" in endpoint
    sock.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
    present(sock, keys)
    connection = Connection(sock, sock.get_monitor_socket())
    try:
        sock.connect(endpoint)
        _shake_hands(connection, address, keys, until)
    except zmq.ZMQError as exc:
        connection.close()
        raise VmmError(f"{address.text}: {exc.strerror}") from None
    except BaseException:
        connection.close()
        raise
    return connection


def _shake_hands(connection: Connection, address: Address, keys: Keys | None, until: float) -> None:
    monitor = connection._monitor
    while monitor.poll(max(0, int((until - time.monotonic()) * 1000))):
        message = recv_monitor_message(monitor)
        event = message["event"]
        if event == zmq.EVENT_CONNECTED:
            if address.local:
                _look_at_owner(message["value"], address)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return
        elif event & _REFUSED or (event == zmq.EVENT_DISCONNECTED and keys is not None):
            raise VmmError(f"{address.text}: the target rejected these keys")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            raise _NotNow("the handshake was broken off there (is it vmm receive, with the right keys?)")
        elif event & _LOST:
            raise _NotNow
    raise _NotNow("there is no answer (is it vmm receive, with the right keys?)")


def _look_at_owner(fd: int, address: Address) -> None:
    """Raises VmmError unless the listener at the other end of this connected Unix socket is this user, or root."""
    try:
        with socket.socket(fileno=os.dup(fd)) as there:
            _, uid, _ = _UCRED.unpack(there.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        raise _NotNow from None     # it has been closed meanwhile
    if uid not in (os.geteuid(), 0):
        raise VmmError(f"{address.text}: belongs to another user (uid {uid}), who would receive the guest's memory")
