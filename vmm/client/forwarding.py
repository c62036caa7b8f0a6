"""Ports of the host that lead into a machine: this process listens there, and passes on what comes (ipc/forwarding.py).

    a client <- socket -> _Connection <-> Link <- two FIFOs -> the system of the machine's programs
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ipc.forwarding import COUNT, FULL, WINDOW, FrameError, Kind, Link, open_outside
from ipc.listening import listen_tcp

from ..errors import ExitCode, VmmError
from ..machine.forwards import Forward, parse_forward
from ..machine.names import machine_dir
from ..machine.rules import RuleError

__all__ = ["Forwarder", "HostPorts"]

_READ = 1 << 16
_BACKLOG = 128
_MOST = 1024            # connections at once
_RESERVED = 64          # descriptors for others
_LAST_S = 1.0           # seconds in which clients can take what they were sent before the machine ended
_RESET = struct.pack("ii", 1, 0)        # SO_LINGER: closing is a reset


class HostPorts:
    """Listens at ports of the host, from when it is made: connections wait. Use with ``with``."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises RuleError (guest.forward)."""
        self.listening: list[tuple[socket.socket, Forward]] = []
        try:
            for text in texts:
                try:
                    forward = parse_forward(text)
                    self.listening.append((_listen(forward), forward))
                except (ValueError, OSError) as exc:
                    raise RuleError("guest.forward", _reason(text, exc)) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        for each, _ in self.listening:
            each.close()

    def __enter__(self) -> HostPorts:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


def _listen(forward: Forward) -> socket.socket:
    """Raises OSError."""
    found = listen_tcp(forward.address, forward.port, _BACKLOG)
    found.setblocking(False)
    return found


def _reason(text: str, exc: Exception) -> str:
    if not isinstance(exc, OSError):
        return str(exc)
    shown = parse_forward(text).shown
    if exc.errno == errno.EADDRINUSE:
        return f"{text}: {shown} is in use on this host"
    return f"{text}: cannot listen at {shown}: {exc.strerror or exc}"


class _Connection:
    """``credit``: bytes that may go in. ``held``: what its client has not taken yet. ``sent_end``, ``got_end``: of
    what goes in, and of what comes out."""

    def __init__(self, number: int, client: socket.socket) -> None:
        self.number, self.client = number, client
        self.credit, self.owed = WINDOW, 0
        self.held = bytearray()
        self.sent_end = self.got_end = self.shut = False

    def close(self, *, reset: bool) -> None:
        with contextlib.suppress(OSError):
            if reset:
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.client.close()


class Forwarder:
    """Passes on what comes to ``ports``, in a thread of its own, within its ``with``; they are closed after it.
    ``over``: the machine has ended."""

    def __init__(self, machine: str, ports: HostPorts) -> None:
        """Raises VmmError."""
        self._ports = ports
        self._link = _connect(machine, machine_dir(machine))
        self._connections: dict[int, _Connection] = {}
        self._last = 0
        self._greeted = False
        self._most = max(1, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED))
        self._session = int.from_bytes(os.urandom(4), "little")
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)
        self.over = threading.Event()

    def __enter__(self) -> Forwarder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        os.write(self._waker, b"\0")
        self._thread.join()
        self._link.close()
        os.close(self._wake)
        os.close(self._waker)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(FrameError):
            self._link.put(Kind.HELLO, self._session)
            self._follow()
        self._ports.close()
        if self._link.has_ended:
            self._let_finish()
        for each in self._connections.values():
            each.close(reset=True)
        self._connections.clear()
        self.over.set()

    def _follow(self) -> None:
        """Until the machine has ended, or this is to. Raises FrameError."""
        link = self._link
        while not link.has_ended:
            with contextlib.suppress(BrokenPipeError):      # what it has said before that is there still
                link.flush()
            ready = self._wait()
            if self._wake in ready:
                return
            if link.source in ready:
                for kind, number, data in link.frames():
                    self._take(kind, number, data)
            for listener, forward in self._ports.listening:
                if listener.fileno() in ready:
                    self._accept(listener, forward)
            for each in tuple(self._connections.values()):
                events = ready.get(each.client.fileno(), 0)
                if events & ~select.POLLIN and each.held:
                    self._write(each)
                if events & ~select.POLLOUT and self._reads(each):
                    self._read(each)

    def _wait(self) -> dict[int, int]:
        """{descriptor: what can be done}."""
        poll, has_room = select.poll(), self._link.pending < FULL
        poll.register(self._wake, select.POLLIN)
        poll.register(self._link.source, select.POLLIN)
        if self._link.pending:
            poll.register(self._link.target, select.POLLOUT)
        if has_room and len(self._connections) < self._most:
            for listener, _ in self._ports.listening:
                poll.register(listener, select.POLLIN)
        for each in self._connections.values():
            events = (select.POLLIN if self._reads(each) else 0) | (select.POLLOUT if each.held else 0)
            if events:
                poll.register(each.client, events)
        return dict(poll.poll())

    def _reads(self, connection: _Connection) -> bool:
        """What its client says can go on."""
        return connection.credit > 0 and not connection.sent_end and self._link.pending < FULL and (
            connection.number in self._connections)

    def _accept(self, listener: socket.socket, forward: Forward) -> None:
        try:
            client, address = listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self._most = max(1, len(self._connections))
            return
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._last += 1
        self._connections[self._last] = _Connection(self._last, client)
        self._link.put(Kind.OPEN, self._last, COUNT.pack(forward.inside) + f"{address[0]}:{address[1]}".encode())

    # --- what comes from a client -----------------------------------------------------------------------------------

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.client.recv(min(connection.credit, _READ))
        except BlockingIOError:
            return
        except OSError:
            self._break(connection)
            return
        if data:
            connection.credit -= len(data)
            self._link.put(Kind.DATA, connection.number, data)
        else:
            connection.sent_end = True
            self._link.put(Kind.END, connection.number)
            self._settle(connection)

    # --- what comes from the machine --------------------------------------------------------------------------------

    def _take(self, kind: int, number: int, data: bytes) -> None:
        if kind == Kind.HELLO:
            self._greeted = number == self._session
            return
        connection = self._connections.get(number)
        if not self._greeted or connection is None:
            return
        if kind == Kind.DATA and len(connection.held) + len(data) <= WINDOW:
            connection.held += data
            if len(connection.held) == len(data):
                self._write(connection)
        elif kind == Kind.CREDIT and len(data) == COUNT.size:
            connection.credit += COUNT.unpack(data)[0]
        elif kind == Kind.END:
            connection.got_end = True
            self._settle(connection)
        elif kind == Kind.RESET:
            del self._connections[number]
            connection.close(reset=True)
        else:
            self._break(connection)

    def _write(self, connection: _Connection) -> None:
        try:
            taken = connection.client.send(connection.held)
        except BlockingIOError:
            return
        except OSError:
            self._break(connection)
            return
        del connection.held[:taken]
        connection.owed += taken
        if connection.owed >= WINDOW // 4 and not connection.got_end:
            self._link.put(Kind.CREDIT, connection.number, COUNT.pack(connection.owed))
            connection.owed = 0
        self._settle(connection)

    def _settle(self, connection: _Connection) -> None:
        """Its ends."""
        if not connection.got_end or connection.held:
            return
        if not connection.shut:
            connection.shut = True
            with contextlib.suppress(OSError):      # the client has gone
                connection.client.shutdown(socket.SHUT_WR)
        if connection.sent_end:
            del self._connections[connection.number]
            connection.close(reset=False)

    def _break(self, connection: _Connection) -> None:
        """Its client has broken it off, or does not matter any more."""
        self._link.put(Kind.RESET, connection.number)
        del self._connections[connection.number]
        connection.close(reset=True)

    def _let_finish(self) -> None:
        """The machine has ended. What it had sent, and ended in order, its clients get."""
        deadline = time.monotonic() + _LAST_S
        for each in tuple(self._connections.values()):
            each.sent_end = True
            self._settle(each)
        while True:
            left = {each.client.fileno(): each for each in self._connections.values() if each.got_end and each.held}
            seconds = deadline - time.monotonic()
            if not left or seconds <= 0:
                return
            poll = select.poll()
            for fd in left:
                poll.register(fd, select.POLLOUT)
            for fd, _ in poll.poll(seconds * 1000):
                self._write(left[fd])


def _connect(machine: str, directory: Path) -> Link:
    """Raises VmmError."""
    try:
        source, target = open_outside(directory)
    except FileNotFoundError:
        if directory.is_dir():
            raise VmmError(f"machine '{machine}' does not run a Linux program: it has no network") from None
        raise VmmError(f"machine '{machine}' has just ended", ExitCode.NO_MACHINE) from None
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            raise VmmError(f"machine '{machine}' has just ended", ExitCode.NO_MACHINE) from None
        raise VmmError(f"machine '{machine}': its network cannot be reached: {exc.strerror}") from None
    link = Link(source, target)
    try:
        fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        link.close()
        raise VmmError(f"another process forwards ports to machine '{machine}' (vmm forward, or vmm run --forward); "
                       "one can, with as many ports as it is given") from None
    return link
