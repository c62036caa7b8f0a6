"""Connections from ports of the host, as the system has them: frames at one end, a program's sockets at the other."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from twice import Guest, Out

from ipc.forwarding import COUNT, PIPES, WINDOW, FrameError, Kind, Link, open_outside
from workers.linux.blocked import Blocked
from workers.linux.forward import Forwarding

INET, STREAM, NONBLOCK = 2, 1, os.O_NONBLOCK
PORT = 80
SOL_SOCKET, SO_LINGER = 1, 13


@contextlib.contextmanager
def forwarder(place: Path) -> Iterator[Link]:
    """Says that it is there."""
    link = Link(*open_outside(place))
    try:
        link.put(Kind.HELLO, 7)
        link.flush()
        yield link
    finally:
        link.close()


class Machine:
    """A program that listens, and what leads to it."""

    def __init__(self, place: Path) -> None:
        for name in PIPES:
            os.mkfifo(place / name)
        self.guest = Guest()
        self.end = Forwarding(place, self.guest.system)
        self.place = place
        self.listener = self.guest.call("socket", INET, STREAM | NONBLOCK, 0)[0]
        self.guest.call("bind", self.listener, self.address(PORT), 16)
        self.guest.call("listen", self.listener, 5)

    @staticmethod
    def address(port: int) -> bytes:
        return struct.pack("<H", INET) + port.to_bytes(2, "big") + socket.inet_aton("127.0.0.1") + bytes(8)

    def accept(self) -> int:
        return self.guest.call("accept4", self.listener, 0, 0, NONBLOCK)[0]

    def read(self, fd: int, count: int = 4096) -> bytes:
        found, (data,) = self.guest.call("read", fd, Out(count), count)
        return data[:found]

    def open(self, link: Link, number: int, port: int = PORT) -> None:
        link.put(Kind.OPEN, number, COUNT.pack(port) + b"somebody")

    def turn(self, link: Link) -> list[tuple[int, int, bytes]]:
        """Everything is moved; what has come out."""
        found: list[tuple[int, int, bytes]] = []
        for _ in range(200):
            link.flush()
            self.end.pump()
            found += link.frames()
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    yield found
    found.end.close()
    assert not found.guest.system.interests
    assert list(found.guest.system.network.ports) == [(6, PORT)]    # the listener alone


def of(frames: list[tuple[int, int, bytes]], number: int, kind: Kind) -> list[bytes]:
    return [data for what, connection, data in frames if (what, connection) == (kind, number)]


def test_bytes_and_ends_in_both_directions(machine: Machine) -> None:
    with forwarder(machine.place) as link:
        machine.open(link, 1)
        link.put(Kind.DATA, 1, b"hello")
        assert machine.turn(link) == [(Kind.HELLO, 7, b"")]
        fd = machine.accept()
        assert machine.read(fd) == b"hello"
        _, (name, _) = machine.guest.call("getpeername", fd, Out(16), Out(4, struct.pack("<i", 16)))
        assert name[4:8] == socket.inet_aton("127.0.0.1")
        assert int.from_bytes(name[2:4], "big") >= 32768
        machine.guest.call("write", fd, b"yes", 3)
        link.put(Kind.END, 1)
        assert machine.turn(link) == [(Kind.DATA, 1, b"yes")]
        assert machine.read(fd) == b""
        machine.guest.call("close", fd)
        assert machine.turn(link) == [(Kind.END, 1, b"")]


def test_where_nobody_listens_it_is_reset(machine: Machine) -> None:
    with forwarder(machine.place) as link:
        machine.open(link, 1, 81)
        assert machine.turn(link)[1:] == [(Kind.RESET, 1, b"")]


def test_a_program_breaks_it_off(machine: Machine) -> None:
    with forwarder(machine.place) as link:
        machine.open(link, 1)
        machine.turn(link)
        fd = machine.accept()
        machine.guest.call("setsockopt", fd, SOL_SOCKET, SO_LINGER, struct.pack("<ii", 1, 0), 8)
        machine.guest.call("close", fd)
        assert machine.turn(link) == [(Kind.RESET, 1, b"")]


def test_a_client_breaks_it_off(machine: Machine) -> None:
    with forwarder(machine.place) as link:
        machine.open(link, 1)
        machine.turn(link)
        fd = machine.accept()
        link.put(Kind.RESET, 1)
        machine.turn(link)
        with pytest.raises(ConnectionResetError):
            machine.read(fd)


@pytest.mark.parametrize("how", ["gone", "another"])
def test_connections_go_with_their_forwarder(machine: Machine, how: str) -> None:
    with forwarder(machine.place) as link:
        machine.open(link, 1)
        machine.turn(link)
        fd = machine.accept()
        machine.guest.call("write", fd, b"stale", 5)
        machine.end.pump()
        if how == "another":        # so fast that nobody saw the first one go
            link.put(Kind.HELLO, 8)
            machine.turn(link)
    if how == "gone":
        machine.end.pump()
    with pytest.raises(ConnectionResetError):
        machine.read(fd)
    with forwarder(machine.place) as link:
        machine.open(link, 1)
        frames = machine.turn(link)
        assert frames[-1] == (Kind.HELLO, 7, b"")
        link.put(Kind.RESET, 1)
        machine.turn(link)


def test_who_does_not_read_holds_up_nobody(machine: Machine) -> None:
    """Neither a program, nor a client."""
    with forwarder(machine.place) as link:
        for number in (1, 2):
            machine.open(link, number)
        link.put(Kind.DATA, 1, bytes(WINDOW))
        link.put(Kind.DATA, 2, b"x")
        frames = machine.turn(link)
        first, second = machine.accept(), machine.accept()
        assert machine.read(second) == b"x"
        assert sum(COUNT.unpack(each)[0] for each in of(frames, 1, Kind.CREDIT)) < WINDOW
        sent = 0
        with contextlib.suppress(BlockingIOError, Blocked):
            while True:
                sent += machine.guest.call("write", first, bytes(4096), 4096)[0]
                frames += machine.turn(link)
        assert sum(map(len, of(frames, 1, Kind.DATA))) == WINDOW < sent
        machine.guest.call("write", second, b"y", 1)
        assert of(machine.turn(link), 2, Kind.DATA) == [b"y"]
        link.put(Kind.CREDIT, 1, COUNT.pack(1000))
        assert sum(map(len, of(machine.turn(link), 1, Kind.DATA))) == 1000
        for number in (1, 2):
            link.put(Kind.RESET, number)
        machine.turn(link)


def test_more_than_was_allowed_is_refused(machine: Machine) -> None:
    with forwarder(machine.place) as link:
        machine.open(link, 1)
        link.put(Kind.DATA, 1, bytes(2 * WINDOW))
        assert of(machine.turn(link), 1, Kind.RESET)


def test_what_is_no_frame() -> None:
    read, written = os.pipe2(os.O_NONBLOCK)
    os.write(written, b"\xff" * 64)
    with pytest.raises(FrameError):
        list(Link(read, written).frames())
    os.close(read)
    os.close(written)
