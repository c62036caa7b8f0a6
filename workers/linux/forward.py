"""Connections that come in from ports of the host (ipc/forwarding.py). Each is a socket of the loopback network, which
nobody in the machine has a descriptor of: what it gets goes out, and what comes in goes to its peer, whom a program has
accepted.

    forwarder <- frames -> Forwarding <-> Connection.socket <-> its peer, a program's
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ipc.forwarding import COUNT, FULL, WINDOW, FrameError, Kind, Link, open_inside

from .blocked import Blocked
from .inet import INET, INET6, LOOPBACK, LOOPBACK4, TcpSocket
from .sockets import SEND

if TYPE_CHECKING:
    from .system import System

__all__ = ["Forwarding"]

_AT_ONCE = 64 << 10     # bytes of a connection before the next one has its turn


class _Connection:
    """``credit``: bytes that may go out. ``held``: what its peer had no room for. ``ended``: nothing more comes in."""

    def __init__(self, number: int, socket: TcpSocket, busy: dict[int, None]) -> None:
        self.number, self.socket, self._busy = number, socket, busy
        self.credit, self.owed = WINDOW, 0
        self.held = bytearray()
        self.ended = self.said_end = False

    def happened(self, system: System, events: int) -> None:
        self._busy.setdefault(self.number)


class Forwarding:
    """``input_fd``: to be polled for reading, ``output_fd`` for writing where ``pending``."""

    def __init__(self, directory: Path, system: System) -> None:
        """Raises OSError."""
        self._directory, self._system = directory, system
        self._link = Link(*open_inside(directory))
        self.input_fd, self.output_fd = self._link.source, self._link.target
        self._connections: dict[int, _Connection] = {}
        self._busy: dict[int, None] = {}        # connections that something may be done about

    @property
    def pending(self) -> bool:
        """There is something to be written still."""
        return self._link.pending > 0

    @property
    def busy(self) -> bool:
        """``pump`` has something to do, whatever comes in."""
        return bool(self._busy) and self._link.pending < FULL

    def pump(self) -> None:
        """What can be moved now is. Raises OSError."""
        if self._link.look():
            self._read()
        turns = len(self._busy)
        while turns and self.busy:
            turns -= 1
            number = next(iter(self._busy))
            del self._busy[number]
            self._move(self._connections[number])
        self._link.flush()

    def close(self) -> None:
        """Raises OSError."""
        self._link.close()

    # --- frames -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for kind, number, data in self._link.frames():
                if kind == Kind.HELLO:
                    self._reset_all()
                    self._link.put(Kind.HELLO, number)
                elif kind == Kind.OPEN and number not in self._connections and len(data) >= COUNT.size:
                    self._open(number, data)
                elif number in self._connections:
                    self._take(self._connections[number], kind, data)
        except FrameError:
            self._reset_all()
        if self._link.has_ended:
            self._reset_all()
            self._link.reopen(self._directory)

    def _reset_all(self) -> None:
        """There is another forwarder, or none."""
        for each in tuple(self._connections.values()):
            self._break(each)
        self._link.forget()

    def _open(self, number: int, data: bytes) -> None:
        port, = COUNT.unpack_from(data)
        for domain, ip in ((INET, LOOPBACK4), (INET6, LOOPBACK)):
            socket = TcpSocket(self._system.network, domain=domain)
            try:
                socket.join(ip, port)
            except OSError:
                socket.let_go()
                continue
            made = self._connections[number] = _Connection(number, socket, self._busy)
            self._system.interests.setdefault(socket, []).append(made)
            self._system.outside.add(socket)
            return
        self._link.put(Kind.RESET, number)

    def _take(self, connection: _Connection, kind: int, data: bytes) -> None:
        if kind == Kind.DATA and not connection.ended and len(connection.held) + len(data) <= WINDOW:
            connection.held += data
        elif kind == Kind.CREDIT and len(data) == COUNT.size:
            connection.credit += COUNT.unpack(data)[0]
        elif kind == Kind.END:
            connection.ended = True
        else:
            if kind != Kind.RESET:
                self._link.put(Kind.RESET, connection.number)
            self._break(connection)
            return
        self._busy.setdefault(connection.number)

    # --- connections ------------------------------------------------------------------------------------------------

    def _move(self, connection: _Connection) -> None:
        """In both directions."""
        socket = connection.socket
        if not socket.error:
            self._move_in(connection)
        count = min(connection.credit, _AT_ONCE)
        if socket.queue and count:
            data = socket.fetch(count).data
            connection.credit -= len(data)
            self._link.put(Kind.DATA, connection.number, data)
            if socket.queue and connection.credit:
                self._busy.setdefault(connection.number)
        if socket.queue:
            return
        if socket.error:
            self._say_reset(connection)
        elif socket.finished and not connection.said_end:
            connection.said_end = True
            self._link.put(Kind.END, connection.number)
        if connection.said_end and connection.ended and not connection.held:
            self._forget(connection)
            socket.let_go()

    def _move_in(self, connection: _Connection) -> None:
        socket, held = connection.socket, connection.held
        if held:
            with contextlib.suppress(Blocked):
                while held:
                    taken = socket.give(bytes(held[:_AT_ONCE]))
                    del held[:taken]
                    connection.owed += taken
            if connection.owed >= WINDOW // 4 and not connection.ended:
                self._link.put(Kind.CREDIT, connection.number, COUNT.pack(connection.owed))
                connection.owed = 0
        if connection.ended and not held and not socket.shut & SEND:
            with contextlib.suppress(OSError):      # the peer has gone
                socket.shutdown(SEND)

    def _say_reset(self, connection: _Connection) -> None:
        self._link.put(Kind.RESET, connection.number)
        self._break(connection)

    def _break(self, connection: _Connection) -> None:
        """The peer finds it reset."""
        self._forget(connection)
        connection.socket.linger = (1, 0)
        connection.socket.let_go()

    def _forget(self, connection: _Connection) -> None:
        del self._connections[connection.number]
        self._busy.pop(connection.number, None)
        self._system.interests.pop(connection.socket, None)
        self._system.outside.discard(connection.socket)

