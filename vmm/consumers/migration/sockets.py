"""The sockets of a migration: made in one place, so that each has a heartbeat, an end to each wait, and a peer that
was looked at.

The target listens on a ROUTER (behind its door: door.py), the source connects a DEALER, and plain sockets for pages
(streams.py). A connection that breaks is an error, never mended
behind our back: ZeroMQ's own reconnecting is off. Heartbeats (ZMTP's PING and PONG) find the end of a peer that
went silent without a FIN or RST; the answers of the other end's program, not only of its ZeroMQ, are
awaited above (vmm/consumers/migration/talk.py, peers.py).

Who listens at a Unix socket is this user or root (SO_PEERCRED), or is not connected to.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator

import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc.linux.peer import peer_of

from ...errors import VmmError
from .addresses import Address
from .door import PAGES, Door
from .keys import Keys, admit, present
from .streams import Stream
from .tls import client

__all__ = ["Connection", "Unreachable", "connect", "connect_stream", "listen"]

_HEARTBEAT_MS = 2000
_HEARTBEAT_TIMEOUT_MS = 10_000  # without a sign of life a connection is broken
_HANDSHAKE_MS = 10_000
_RETRY = 0.1                # seconds between two attempts to connect
_LOOK_EVERY_MS = 100
_GREETS_WITHIN = 2.0        # seconds
_GREETING = b"\xff" + bytes(8) + b"\x7f"    # what ZMTP begins with
_QUEUE_IN = 64              # messages that wait here, per connection
_MESSAGE_MAX = 1 << 30      # bytes
_NEVER_MS = 1 << 30         # 12 days. Not -1, "never": ZeroMQ then drops what a peer said just before it went
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


def _common(sock: zmq.Socket[bytes]) -> None:
    sock.linger = 0
    sock.maxmsgsize = _MESSAGE_MAX
    sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TTL, _HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)


# --- the target: listen --------------------------------------------------------------------------------------


@contextlib.contextmanager
def listen(context: zmq.Context[zmq.Socket[bytes]], door: Door, keys: Keys | None) -> Iterator[zmq.Socket[bytes]]:
    """A ROUTER behind the door. Raises VmmError."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(context.socket(zmq.ROUTER))
        _common(sock)
        sock.rcvhwm = _QUEUE_IN
        sock.router_mandatory = True    # an answer to one who has gone is an error, not silence
        stack.enter_context(admit(context, sock, keys))
        sock.setsockopt(zmq.IPC_FILTER_PID, os.getpid())
        sock.bind(door.behind)
        yield sock


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
            waiting: Callable[[], None] = lambda: None) -> Connection:
    """Tried until a receiver listens there, or the monotonic time ``until``; ``waiting`` is called now and then
    meanwhile. Raises VmmError."""
    endpoints = address.endpoints()
    why, tried = "no receiver is listening there (start vmm receive there first)", False
    while True:
        for endpoint in endpoints:
            try:
                patience = min(until, time.monotonic() + _HANDSHAKE_MS / 1000)
                return _attempt(context, endpoint, address, keys, patience, waiting)
            except _NotNow as exc:
                if not tried or time.monotonic() < until:       # one that is cut short says nothing new
                    why = str(exc) or why
                tried = True
        if time.monotonic() + _RETRY > until:
            raise Unreachable(f"{address.text}: {why}")
        waiting()
        time.sleep(_RETRY)


class Unreachable(VmmError):
    """No receiver could be connected to in time."""


class _NotNow(Exception):
    """It may be otherwise in a moment."""


def _attempt(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, address: Address, keys: Keys | None,
             until: float, waiting: Callable[[], None]) -> Connection:
    sock = context.socket(zmq.DEALER)
    _common(sock)
    sock.ipv6 = "[" in endpoint
    sock.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
    present(sock, keys)
    connection = Connection(sock, sock.get_monitor_socket())
    try:
        sock.connect(endpoint)
        _shake_hands(connection, address, keys, until, waiting)
    except zmq.ZMQError as exc:
        connection.close()
        raise VmmError(f"{address.text}: {exc.strerror}") from None
    except BaseException:
        connection.close()
        raise
    return connection


def _shake_hands(connection: Connection, address: Address, keys: Keys | None, until: float,
                 waiting: Callable[[], None]) -> None:
    monitor = connection._monitor
    while (left := int((until - time.monotonic()) * 1000)) > 0:
        if not monitor.poll(min(left, _LOOK_EVERY_MS)):
            waiting()
            continue
        message = recv_monitor_message(monitor)
        event = message["event"]
        if event == zmq.EVENT_CONNECTED:
            if address.local:
                _look_at_owner(message["value"], address)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return
        elif event & _REFUSED or (event == zmq.EVENT_DISCONNECTED and keys is not None):
            _look_whether_ours(address, until)
            raise VmmError(f"{address.text}: the target rejected these keys" if keys is not None else
                           f"{address.text}: the target has keys: give --key and --peer")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            _look_whether_ours(address, until)
            raise _NotNow("the handshake was broken off there (is it vmm receive, with the right keys?)")
        elif event & _LOST:
            raise _NotNow
    raise _NotNow("there is no answer (is it vmm receive, with the right keys?)")


def _look_whether_ours(address: Address, until: float) -> None:
    """The handshake failed, and ZeroMQ does not tell a wrong key from another program's words: see how who listens
    there begins. Raises VmmError for what is no receiver, _NotNow for who says nothing."""
    for where in address.plain():
        with contextlib.suppress(OSError), socket.socket(where.family, socket.SOCK_STREAM) as sock:
            sock.settimeout(min(_GREETS_WITHIN, max(0.1, until - time.monotonic())))
            sock.connect(where.name)
            sock.sendall(_GREETING)
            said = sock.recv(1)
            if said and said != _GREETING[:1]:
                raise VmmError(f"{address.text}: another program listens there, not vmm receive")
            if said:
                return
    raise _NotNow("the handshake was broken off there (is it vmm receive, with the right keys?)")


def _look_at_owner(fd: int, address: Address) -> None:
    """Raises VmmError unless the listener at the other end of this connected Unix socket is this user, or root."""
    try:
        with socket.socket(fileno=os.dup(fd)) as there:
            uid = peer_of(there).uid
    except OSError:
        raise _NotNow from None     # it has been closed meanwhile
    if uid not in (os.geteuid(), 0):
        raise VmmError(f"{address.text}: belongs to another user (uid {uid}), who would receive the guest's memory")


def connect_stream(address: Address, until: float, certificate: bytes = b"") -> Stream:
    """For pages, to one who listens there for sure; with a certificate, to who has it. Raises VmmError."""
    why = "there is no answer"
    for where in address.plain():
        sock = socket.socket(where.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(max(0.1, until - time.monotonic()))
            sock.connect(where.name)
            if address.local:
                _look_at_owner(sock.fileno(), address)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(PAGES)
            return Stream(client(certificate).wrap_socket(sock) if certificate else sock)
        except ssl.SSLError as exc:
            sock.close()
            raise VmmError(f"{address.text}: who listens there is not who was spoken to: {exc.reason}") from None
        except (OSError, _NotNow) as exc:
            sock.close()
            why = str(exc) or why
        except VmmError:
            sock.close()
            raise
    raise Unreachable(f"{address.text}: no connection for pages: {why}")
