"""Sockets against the host's kernel: the same calls in the same order, on pairs, on unix sockets with names, and on a
loopback network."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twice import Fd, Guest, Out, Twice

from workers.linux.calls import Blocked

EXAMPLES = int(os.environ.get("EXAMPLES", "60"))
UNIX, INET, INET6 = 1, 2, 10
STREAM, DGRAM, SEQPACKET = 1, 2, 5
NONBLOCK = os.O_NONBLOCK
PEEK, TRUNC, DONTWAIT, WAITALL, NOSIGNAL = 2, 0x20, 0x40, 0x100, 0x4000
SOL_SOCKET, SCM_RIGHTS, SCM_CREDENTIALS = 1, 1, 2
IN, OUT, ERR, HUP = 1, 4, 8, 16


@pytest.fixture
def twice() -> Iterator[Twice]:
    with contextlib.closing(Twice(apart=True)) as found:
        yield found


@pytest.fixture
def guest() -> Guest:
    return Guest()


def inet(ip: str, port: int) -> bytes:
    return struct.pack("<H", INET) + port.to_bytes(2, "big") + socket.inet_aton(ip) + bytes(8)


def inet6(ip: str, port: int) -> bytes:
    return struct.pack("<H", INET6) + port.to_bytes(2, "big") + bytes(4) + socket.inet_pton(INET6, ip) + bytes(4)


def unix(path: bytes) -> bytes:
    return struct.pack("<H", UNIX) + path


def name_of(twice: Twice, call: str, fd: Fd) -> bytes | str:
    """As both give it; ports that nobody asked for differ."""
    ours, theirs = twice.both(call, fd, Out(128), Out(4, struct.pack("<i", 128)))
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs, (call, ours, theirs)
        return str(ours)
    found, expected = (each[1][0][:struct.unpack("<i", each[1][1])[0]] for each in (ours, theirs))
    if found[:2] in (struct.pack("<H", INET), struct.pack("<H", INET6)) and int.from_bytes(found[2:4], "big") >= 32768:
        assert int.from_bytes(expected[2:4], "big") >= 32768
        found, expected = found[:2] + found[4:], expected[:2] + expected[4:]
    assert found == expected, (call, found, expected)
    return found


def look(twice: Twice, *fds: Fd) -> None:
    twice.poll(*fds)
    for fd in fds:
        name_of(twice, "getsockname", fd)
        name_of(twice, "getpeername", fd)


# --- pairs, whatever is done with them ---------------------------------------------------------------------------


def connected(twice: Twice, kind: str) -> list[Fd]:
    """Two sockets that are."""
    if kind == "tcp":
        listener, client = (twice.made("socket", INET, STREAM | NONBLOCK, 0) for _ in range(2))
        twice.same("bind", listener, inet("127.0.0.1", 5000), 16)
        twice.same("listen", listener, 5)
        connect(twice, client, inet("127.0.0.1", 5000))
        server = twice.made("accept4", listener, 0, 0, NONBLOCK)
        twice.shut(listener)
        for fd in (client, server):         # nothing is late
            twice.same("setsockopt", fd, 6, 1, struct.pack("<i", 1), 4)
        return [client, server]
    if kind == "udp":
        found = [twice.made("socket", INET, DGRAM | NONBLOCK, 0) for _ in range(2)]
        for fd, port, other in ((found[0], 5000, 5001), (found[1], 5001, 5000)):
            twice.same("bind", fd, inet("127.0.0.1", port), 16)
            twice.same("connect", fd, inet("127.0.0.1", other), 16)
        return found
    number = {"stream": STREAM, "dgram": DGRAM, "seqpacket": SEQPACKET}[kind]
    return list(twice.pair("socketpair", UNIX, number | NONBLOCK, 0, Out(8)))


def connect(twice: Twice, fd: Fd, address: bytes) -> Any:
    """At once, here; on the host too, after a moment."""
    ours, theirs = twice.both("connect", fd, address, len(address))
    if theirs == "EINPROGRESS":
        twice.thread.submit(os.sched_yield).result()
        _, theirs = twice.both("connect", Fd(fd.ours, fd.theirs), address, len(address))
        theirs = (0, []) if theirs in ("EISCONN", (0, [])) else theirs
    assert ours == theirs, (ours, theirs)
    return ours


ends = st.integers(0, 1)
sizes = st.sampled_from([0, 1, 5, 5, 100, 5000])
steps = st.one_of(
    st.tuples(st.just("send"), ends, sizes, st.sampled_from([NOSIGNAL])),
    st.tuples(st.just("send"), ends, sizes, st.sampled_from([NOSIGNAL])),
    st.tuples(st.just("write"), ends, sizes),
    st.tuples(st.just("receive"), ends, sizes, st.sampled_from([0, 0, PEEK, WAITALL, DONTWAIT])),
    st.tuples(st.just("receive"), ends, sizes, st.sampled_from([0, 0, PEEK, WAITALL, DONTWAIT])),
    st.tuples(st.just("read"), ends, sizes), st.tuples(st.just("shutdown"), ends, st.sampled_from([0, 1, 1, 2])),
    st.tuples(st.just("close"), ends), st.tuples(st.just("error"), ends), st.tuples(st.just("pending"), ends))


def take_steps(kind: str, found: list[tuple[Any, ...]]) -> None:
    with contextlib.closing(Twice(apart=kind in ("tcp", "udp"))) as twice:
        fds: list[Fd | None] = list(connected(twice, kind))
        marks = itertools.cycle(range(1, 251))
        for name, end, *rest in found:
            fd = fds[end]
            if fd is None:
                continue
            data = bytes([next(marks)]) * rest[0] if rest else b""
            if name == "send":
                twice.same("sendto", fd, data, len(data), rest[1], 0, 0)
            elif name == "write":
                twice.same("write", fd, data, len(data))
            elif name == "receive":
                twice.same("recvfrom", fd, Out(len(data) + 1), len(data), rest[1], 0, 0)
            elif name == "read":
                twice.same("read", fd, Out(len(data) + 1), len(data))
            elif name == "shutdown":
                twice.same("shutdown", fd, rest[0])
            elif name == "error":
                twice.same("getsockopt", fd, SOL_SOCKET, 4, Out(4), Out(4, struct.pack("<i", 4)))
            elif name == "pending":
                twice.same("ioctl", fd, 0x541B, Out(4))
            else:
                fds[end] = None
                twice.shut(fd)
            there = [each for each in fds if each is not None]
            twice.poll(*there)


@pytest.fixture(autouse=True)
def _without_signals() -> Iterator[None]:
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("kind", ["stream", "dgram", "seqpacket", "tcp", "udp"])
@settings(max_examples=EXAMPLES, deadline=None)
@given(found=st.lists(steps, min_size=3, max_size=25))
def test_pairs_are_as_on_the_host(kind: str, found: list[tuple[Any, ...]]) -> None:
    take_steps(kind, found)


# --- what there is, and what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    (UNIX, STREAM, 0), (UNIX, STREAM, 1), (UNIX, STREAM, 7), (UNIX, 3, 0), (UNIX, 4, 0), (UNIX, SEQPACKET, 0),
    (UNIX, 15, 0), (INET, STREAM, 0),
    (INET, STREAM, 6), (INET, STREAM, 17), (INET, DGRAM, 17), (INET, DGRAM, 6), (INET, SEQPACKET, 0),
    (INET6, STREAM, 0), (INET6, DGRAM, 0), (77, STREAM, 0), (UNIX, STREAM | 0x100, 0), (INET, 0, 0)], ids=repr)
def test_what_sockets_there_are(twice: Twice, arguments: tuple[int, int, int]) -> None:
    fd = twice.new("socket", *arguments)
    if isinstance(fd, Fd):
        look(twice, fd)
        for name in (3, 30, 38, 39):        # type, whether it listens, protocol, domain
            twice.same("getsockopt", fd, SOL_SOCKET, name, Out(4), Out(4, struct.pack("<i", 4)))
        for call, rest in (("read", (Out(4), 4)), ("write", (b"abcd", 4)), ("lseek", (0, 0)), ("fcntl", (3, 0)),
                           ("shutdown", (1,)), ("shutdown", (3,)), ("accept", (0, 0)), ("pread64", (Out(4), 4, 0)),
                           ("listen", (1,))):
            twice.same("fcntl", fd, 4, NONBLOCK)
            twice.same(call, fd, *rest)
        twice.poll(fd)


def test_there_is_no_other_network(guest: Guest) -> None:
    for arguments, error in (((16, 3, 0), errno.EAFNOSUPPORT), ((17, 3, 0), errno.EAFNOSUPPORT)):
        with pytest.raises(OSError, match=r"^\[Errno") as raised:
            guest.call("socket", *arguments)
        assert raised.value.errno == error


@pytest.mark.parametrize("name", ["bind", "connect", "listen", "accept", "getsockname", "shutdown", "sendto",
                                  "recvfrom"])
def test_what_is_no_socket(twice: Twice, name: str) -> None:
    counter = twice.made("eventfd2", 0, 0)
    for fd in (counter, 10000):
        twice.same(name, fd, b"".ljust(16, b"\0"), 16, 0, 0, 0)


def test_options(twice: Twice) -> None:
    fds = [twice.made("socket", INET, STREAM, 0), twice.made("socket", UNIX, STREAM, 0),
           twice.made("socket", INET6, DGRAM, 0)]
    one, four = struct.pack("<i", 1), Out(4, struct.pack("<i", 4))
    for fd in fds:
        for level, name in ((1, 2), (1, 9), (1, 15), (1, 6), (1, 16), (6, 1), (6, 4), (0, 1), (0, 2), (41, 26), (1, 12),
                            (1, 18), (1, 999), (77, 1)):
            if (level, name) == ((1, 16) if fd is not fds[1] else (1, 15)):
                continue        # depends on the kernel
            twice.same("getsockopt", fd, level, name, Out(4), four)
            twice.same("setsockopt", fd, level, name, one, 4)
            twice.same("getsockopt", fd, level, name, Out(4), four)
        twice.same("setsockopt", fd, 1, 2, one, 3)
        twice.same("setsockopt", fd, 1, 20, struct.pack("<qq", 1, 500000), 16)
        twice.same("setsockopt", fd, 1, 20, struct.pack("<qq", 1, 5000000), 16)
        twice.same("getsockopt", fd, 1, 20, Out(16), Out(4, struct.pack("<i", 16)))
        twice.same("setsockopt", fd, 1, 13, struct.pack("<ii", 1, 5), 8)
        twice.same("getsockopt", fd, 1, 13, Out(8), Out(4, struct.pack("<i", 8)))
        for name in (7, 8):
            twice.same("setsockopt", fd, 1, name, struct.pack("<i", 10000), 4)
            twice.same("getsockopt", fd, 1, name, Out(4), four)
            twice.same("setsockopt", fd, 1, name, struct.pack("<i", 1), 4)
            twice.same("getsockopt", fd, 1, name, Out(4), four)


# --- unix sockets with names -------------------------------------------------------------------------------------


@pytest.fixture
def folders(twice: Twice, tmp_path: Any) -> Iterator[None]:
    """Both have a working directory that is empty."""
    before = os.getcwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
@pytest.mark.parametrize("path", [b"s", b"\0some name", b"\0", b"s\0rest"])
@pytest.mark.usefixtures("folders")
def test_unix_connections(twice: Twice, kind: int, path: bytes) -> None:
    listener, client, other = (twice.made("socket", UNIX, kind | NONBLOCK, 0) for _ in range(3))
    address = unix(path)
    twice.same("listen", listener, 1)
    twice.same("connect", client, address, len(address))
    twice.same("bind", listener, address, len(address))
    twice.same("bind", listener, address, len(address))
    twice.same("bind", other, address, len(address))
    twice.same("connect", client, address, len(address))
    look(twice, listener, client)
    twice.same("listen", listener, 1)
    twice.same("accept", listener, 0, 0)
    twice.same("connect", client, address, len(address))
    twice.same("connect", client, address, len(address))
    look(twice, listener, client)
    twice.same("sendto", client, b"abc", 3, 0, 0, 0)
    server = twice.made("accept4", listener, 0, 0, NONBLOCK)
    look(twice, listener, client, server)
    twice.same("recvfrom", server, Out(10), 10, 0, Out(20), Out(4, struct.pack("<i", 20)))
    twice.same("sendto", client, b"abc", 3, 0, address, len(address))
    twice.same("connect", other, address, len(address))
    extra = [twice.made("socket", UNIX, kind | NONBLOCK, 0) for _ in range(3)]
    for fd in extra:
        twice.same("connect", fd, address, len(address))
    twice.shut(listener)
    look(twice, *extra, other, client, server)
    for fd in (*extra, other):
        twice.same("read", fd, Out(5), 5)
        twice.same("write", fd, b"abc", 3)
    twice.same("connect", extra[0], address, len(address))
    twice.same("write", server, b"unread", 6)
    twice.shut(client)
    look(twice, server)
    twice.same("write", server, b"abc", 3)
    twice.same("read", server, Out(5), 5)


@pytest.mark.usefixtures("folders")
def test_unix_datagrams(twice: Twice) -> None:
    one, two, three, four = (twice.made("socket", UNIX, DGRAM | NONBLOCK, 0) for _ in range(4))
    for fd, path in ((one, b"1"), (two, b"\0two"), (three, b"3")):
        twice.same("bind", fd, unix(path), 2 + len(path))

    def receive(fd: Fd) -> None:
        twice.same("recvfrom", fd, Out(10), 10, 0, Out(20), Out(4, struct.pack("<i", 20)))

    twice.same("sendto", one, b"abc", 3, 0, unix(b"\0two"), 6)
    twice.same("sendto", four, b"", 0, 0, unix(b"\0two"), 6)
    look(twice, one, two)
    receive(two)
    receive(two)
    receive(two)
    twice.same("sendto", four, b"abc", 3, 0, 0, 0)
    twice.same("connect", two, unix(b"1"), 3)
    twice.same("sendto", four, b"abc", 3, 0, unix(b"\0two"), 6)         # it listens to nobody else
    twice.same("connect", four, unix(b"\0two"), 6)
    twice.same("sendto", four, b"abc", 3, 0, unix(b"none"), 6)
    twice.same("connect", four, unix(b"none"), 6)
    twice.same("connect", four, unix(b"3"), 3)
    for _ in range(13):
        twice.same("sendto", four, b"abc", 3, 0, 0, 0)
        look(twice, three, four)
    receive(three)
    look(twice, three, four)
    twice.shut(three)
    look(twice, four)
    twice.same("sendto", four, b"abc", 3, 0, 0, 0)
    twice.same("sendto", four, b"abc", 3, 0, 0, 0)
    look(twice, four)
    twice.same("sendto", four, b"abc", 3, 0, unix(b"3"), 3)
    stream = twice.made("socket", UNIX, STREAM, 0)
    twice.same("connect", stream, unix(b"1"), 3)
    twice.same("recvfrom", one, Out(10), 10, 0, 0, 0)
    twice.same("shutdown", one, 0)
    twice.same("sendto", two, b"abc", 3, 0, 0, 0)
    look(twice, one, two)


@pytest.mark.usefixtures("folders")
def test_a_socket_is_a_file(twice: Twice) -> None:
    fd = twice.made("socket", UNIX, STREAM, 0)
    twice.same("bind", fd, unix(b"missing/s"), 11)
    twice.guest.thread.process.mask = 0o027
    before = os.umask(0o027)
    twice.same("bind", fd, unix(b"s"), 3)
    os.umask(before)
    ours, theirs = (struct.unpack_from("<I", each[1][0], 24)[0] for each in twice.both("stat", b"s", Out(144)))
    assert ours == theirs
    twice.same("open", b"s", os.O_RDWR, 0)
    twice.same("unlink", b"s")
    twice.same("listen", fd, 5)
    other = twice.made("socket", UNIX, STREAM, 0)
    twice.same("connect", other, unix(b"s"), 3)
    twice.same("bind", other, unix(b"s"), 3)
    twice.same("bind", twice.made("socket", UNIX, STREAM, 0), unix(b"x" * 108), 110)
    twice.same("bind", twice.made("socket", UNIX, STREAM, 0), unix(b"x" * 120), 122)
    twice.same("bind", twice.made("socket", UNIX, STREAM, 0), b"\2\0abc", 5)
    twice.same("close", fd)
    twice.open.remove(fd)
    assert not twice.guest.system.network.abstract
    nameless = twice.made("socket", UNIX, STREAM, 0)
    for ours, theirs in [twice.both("bind", nameless, unix(b""), 2)]:
        assert ours == theirs == (0, [])
    assert [len(each[1][0].rstrip(b"\0"))
            for each in twice.both("getsockname", nameless, Out(20), Out(4, b"\x14"))] == [8, 8]


# --- what goes along with a message ------------------------------------------------------------------------------


class Messages:
    """sendmsg(2) and recvmsg(2), of one buffer, in a guest and by the host."""

    def __init__(self, twice: Twice) -> None:
        self.twice = twice
        self.at = twice.guest.scratch + (150 << 12)

    def send(self, fd: Fd, data: bytes, *rights: Fd, flags: int = 0) -> Any:
        space, at = self.twice.guest.thread.process.space, self.at
        control = struct.pack(f"<Qii{len(rights)}i", 16 + 4 * len(rights), SOL_SOCKET, SCM_RIGHTS,
                              *[each.ours for each in rights]) if rights else b""
        space.write(at, struct.pack("<QIIQQQQii", 0, 0, 0, at + 100, 1, at + 200, len(control), 0, 0))
        space.write(at + 100, struct.pack("<QQ", at + 1000, len(data)))
        space.write(at + 200, control)
        space.write(at + 1000, data)
        try:
            ours: Any = self.twice.guest.call("sendmsg", fd.ours, at, flags)[0]
        except OSError as error:
            ours = errno.errorcode[error.errno or 0]
        with socket.socket(fileno=os.dup(fd.theirs)) as there:
            ancillary = [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"<{len(rights)}i", *[each.theirs for each in rights]))]
            try:
                theirs: Any = there.sendmsg([data], ancillary if rights else [], flags)
            except OSError as error:
                theirs = errno.errorcode[error.errno or 0]
        assert ours == theirs, (ours, theirs)
        return ours

    def receive(self, fd: Fd, room: int, control: int, flags: int = 0) -> list[Fd]:
        """The descriptors that come along."""
        space, at = self.twice.guest.thread.process.space, self.at
        space.write(at, struct.pack("<QIIQQQQii", at + 300, 60, 0, at + 100, 1, at + 200, control, 0, 0))
        space.write(at + 100, struct.pack("<QQ", at + 1000, room))
        try:
            count = self.twice.guest.call("recvmsg", fd.ours, at, flags)[0]
            _, _, _, _, _, _, size, given = struct.unpack("<QIIQQQQi4x", space.read(at, 56))
            ours: Any = (space.read(at + 1000, min(count, room)), given)
            messages = parsed(space.read(at + 200, size))
        except OSError as error:
            ours = errno.errorcode[error.errno or 0]
        with socket.socket(fileno=os.dup(fd.theirs)) as there:
            try:
                data, ancillary, given, _ = there.recvmsg(room, control, flags)
                theirs: Any = (data, given)
            except OSError as error:
                theirs = errno.errorcode[error.errno or 0]
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs
            return []
        assert ours == theirs, (ours, theirs)
        assert [each[:2] for each in messages] == [each[:2] for each in ancillary]
        found = []
        for (_, kind, data), (_, _, other) in zip(messages, ancillary, strict=True):
            if kind == SCM_RIGHTS:
                assert len(data) == len(other)
                numbers = (struct.unpack(f"<{len(each) // 4}i", each) for each in (data, other))
                found += [self.twice.keep(one, two) for one, two in zip(*numbers, strict=True)]
        return found


def parsed(control: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while control:
        length, level, kind = struct.unpack_from("<Qii", control)
        found.append((level, kind, control[16:length]))
        control = control[-(-length // 8) * 8:]
    return found


@pytest.mark.parametrize("kind", [STREAM, DGRAM, SEQPACKET])
def test_descriptors_go_along(twice: Twice, kind: int) -> None:
    one, other = twice.pair("socketpair", UNIX, kind | NONBLOCK, 0, Out(8))
    reader, writer = twice.pair("pipe2", Out(8), NONBLOCK)
    messages = Messages(twice)
    messages.send(one, b"first")
    messages.send(one, b"second", writer)
    messages.send(one, b"third", reader, writer)
    messages.send(one, b"fourth")
    twice.shut(writer)
    twice.poll(reader)          # it is on its way
    found = messages.receive(other, 100, 100)
    found += messages.receive(other, 100, 100, 0x4000_0000)
    found += messages.receive(other, 3, 20)
    found += messages.receive(other, 100, 100)
    messages.receive(other, 100, 100)
    assert found
    for fd in found:
        twice.same("fcntl", fd, 1, 0)
        twice.same("fcntl", fd, 3, 0)
    twice.same("write", found[0], b"x", 1)
    for fd in found:
        twice.shut(fd)
    twice.poll(reader)
    messages.send(one, b"lost", reader)
    twice.same("read", other, Out(10), 10)
    messages.send(one, b"also", twice.made("dup", reader))
    twice.shut(other)
    twice.poll(reader)
    messages.send(twice.pair("socketpair", UNIX, kind, 0, Out(8))[0], b"x", Fd(10000, 10000))


def test_credentials(guest: Guest) -> None:
    _, (numbers,) = guest.call("socketpair", UNIX, STREAM, 0, Out(8))
    one, other = struct.unpack("<ii", numbers)
    assert guest.call("getsockopt", one, SOL_SOCKET, 17, Out(12), Out(4, b"\x0c"))[1][0] == struct.pack("<iii", 1, 0, 0)
    guest.call("setsockopt", other, SOL_SOCKET, 16, struct.pack("<i", 1), 4)
    child = guest.fork(7)
    guest.call("write", one, b"mine", 4)
    guest.call("write", one, b"child's", 7, thread=child)
    at = guest.scratch + (150 << 12)
    for data, pid in ((b"mine", 1), (b"child's", 7)):
        space = guest.thread.process.space
        space.write(at, struct.pack("<QIIQQQQii", 0, 0, 0, at + 100, 1, at + 200, 100, 0, 0))
        space.write(at + 100, struct.pack("<QQ", at + 1000, 50))
        assert guest.call("recvmsg", other, at, 0)[0] == len(data)
        assert space.read(at + 1000, len(data)) == data
        assert space.read(at + 200, 28) == struct.pack("<Qiiiii", 28, SOL_SOCKET, SCM_CREDENTIALS, pid, 0, 0)


# --- the loopback network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "to", "families"), [
    (inet("127.0.0.1", 7000), inet("127.0.0.1", 7000), (INET, INET)),
    (inet("0.0.0.0", 7000), inet("127.0.0.1", 7000), (INET, INET)),
    (inet("0.0.0.0", 7000), inet("127.5.6.7", 7000), (INET, INET)),
    (inet("127.0.0.1", 7000), inet("0.0.0.0", 7000), (INET, INET)),
    (inet("127.0.0.1", 7000), inet("127.0.0.2", 7000), (INET, INET)),
    (inet("127.0.0.1", 7000), inet("127.0.0.1", 7001), (INET, INET)),
    (inet("127.0.0.1", 7000), inet("10.1.2.3", 7000), (INET, INET)),
    (inet6("::", 7000), inet("127.0.0.1", 7000), (INET6, INET)),
    (inet6("::", 7000), inet6("::1", 7000), (INET6, INET6)),
    (inet6("::1", 7000), inet("127.0.0.1", 7000), (INET6, INET)),
    (inet("127.0.0.1", 7000), inet6("::ffff:127.0.0.1", 7000), (INET, INET6)),
    (inet("127.0.0.1", 7000), inet6("::", 7000), (INET, INET6)),
    (inet6("::1", 7000), inet6("::", 7000), (INET6, INET6)),
    (inet("10.1.2.3", 7000), inet("127.0.0.1", 7000), (INET, INET))], ids=lambda each: each.hex() if isinstance(
        each, bytes) else None)
@pytest.mark.parametrize("kind", [STREAM, DGRAM])
def test_who_reaches_whom(twice: Twice, at: bytes, to: bytes, families: tuple[int, int], kind: int) -> None:
    one = twice.made("socket", families[0], kind | NONBLOCK, 0)
    other = twice.made("socket", families[1], kind | NONBLOCK, 0)
    twice.same("bind", one, at, len(at))
    if kind == STREAM:
        twice.same("listen", one, 5)
        connect(twice, other, to)
        look(twice, one, other)
        server = twice.new("accept4", one, 0, 0, NONBLOCK)
        if isinstance(server, Fd):
            look(twice, server)
        return
    twice.same("sendto", other, b"abc", 3, 0, to, len(to))
    look(twice, one, other)
    twice.same("recvfrom", one, Out(10), 10, 0, 0, 0)
    twice.same("connect", other, to, len(to))
    look(twice, one, other)
    twice.same("write", other, b"defg", 4)
    twice.same("recvfrom", one, Out(2), 2, TRUNC, 0, 0)
    twice.same("write", other, b"hi", 2)
    look(twice, one, other)


@pytest.mark.parametrize("kind", [STREAM, DGRAM])
@pytest.mark.parametrize("option", [None, 2, 15])
@pytest.mark.parametrize(("first", "second"), [
    (inet("127.0.0.1", 7000), inet("127.0.0.1", 7000)), (inet("0.0.0.0", 7000), inet("127.0.0.1", 7000)),
    (inet("127.0.0.1", 7000), inet("127.0.0.2", 7000)), (inet6("::", 7000), inet("127.0.0.1", 7000)),
    (inet6("::1", 7000), inet("127.0.0.1", 7000)), (inet6("::1", 7000), inet6("::", 7000))], ids=bytes.hex)
def test_who_has_a_port(twice: Twice, kind: int, option: int | None, first: bytes, second: bytes) -> None:
    fds = [twice.made("socket", each[0], kind | NONBLOCK, 0) for each in (first, second)]
    for fd, address in zip(fds, (first, second), strict=True):
        if option is not None:
            twice.same("setsockopt", fd, SOL_SOCKET, option, struct.pack("<i", 1), 4)
        twice.same("bind", fd, address, len(address))
        twice.same("bind", fd, address, len(address))
    look(twice, *fds)
    if kind == STREAM:
        for fd in fds:
            twice.same("listen", fd, 5)
        look(twice, *fds)
    twice.shut(fds[0])
    again = twice.made("socket", first[0], kind | NONBLOCK, 0)
    twice.same("bind", again, first, len(first))


def test_a_tcp_connection(twice: Twice) -> None:
    listener, client = (twice.made("socket", INET, STREAM | NONBLOCK, 0) for _ in range(2))
    connect(twice, client, inet("127.0.0.1", 7000))
    twice.same("bind", listener, inet("127.0.0.1", 7000), 15)
    twice.same("bind", listener, inet6("::1", 7000), 28)
    twice.same("bind", listener, inet("127.0.0.1", 7000), 16)
    connect(twice, client, inet("127.0.0.1", 7000))
    client = twice.made("socket", INET, STREAM | NONBLOCK, 0)
    twice.same("setsockopt", listener, SOL_SOCKET, 9, struct.pack("<i", 1), 4)
    twice.same("listen", listener, 5)
    connect(twice, client, inet("127.0.0.1", 7000))
    twice.same("connect", client, inet("127.0.0.1", 7000), 16)
    twice.same("write", client, b"hello", 5)
    server = twice.made("accept4", listener, 0, 0, NONBLOCK)
    twice.same("getsockopt", server, SOL_SOCKET, 9, Out(4), Out(4, struct.pack("<i", 4)))
    twice.same("accept", listener, 0, 0)
    look(twice, listener, client, server)
    twice.same("recvfrom", server, Out(10), 10, 0, Out(20), Out(4, struct.pack("<i", 20)))
    twice.same("sendto", server, b"abc", 3, 0, inet("127.0.0.1", 1), 16)
    twice.same("shutdown", server, 1)
    look(twice, client, server)
    twice.same("write", server, b"x", 1)
    twice.same("read", client, Out(3), 3)
    twice.same("read", client, Out(3), 3)
    twice.same("write", client, b"more", 4)
    look(twice, client, server)
    twice.shut(server)
    look(twice, client)
    twice.same("read", client, Out(3), 3)
    twice.same("write", client, b"more", 4)
    waiting = twice.made("socket", INET, STREAM | NONBLOCK, 0)
    connect(twice, waiting, inet("127.0.0.1", 7000))
    twice.shut(listener)
    look(twice, waiting)
    twice.same("read", waiting, Out(3), 3)
    twice.same("read", waiting, Out(3), 3)


def test_a_listener_that_is_shut(twice: Twice) -> None:
    listener, client = (twice.made("socket", INET, STREAM | NONBLOCK, 0) for _ in range(2))
    twice.same("bind", listener, inet("127.0.0.1", 7000), 16)
    twice.same("listen", listener, 5)
    twice.same("shutdown", listener, 1)
    twice.poll(listener)
    twice.same("shutdown", listener, 0)
    twice.poll(listener)
    twice.same("accept", listener, 0, 0)
    connect(twice, client, inet("127.0.0.1", 7000))


def test_a_lot_goes_through(guest: Guest) -> None:
    """With a writer and a reader that wait for each other."""
    listener, client = (guest.call("socket", INET, STREAM, 0)[0] for _ in range(2))
    guest.call("bind", listener, inet("127.0.0.1", 7000), 16)
    with pytest.raises(ConnectionRefusedError):
        guest.call("connect", client, inet("127.0.0.1", 7000), 16)
    guest.call("listen", listener, 1)
    other = guest.another(guest.thread.process, 2)
    with pytest.raises(Blocked) as accepting:
        guest.call("accept", listener, 0, 0, thread=other)
    guest.take_notified()
    guest.call("connect", client, inet("127.0.0.1", 7000), 16)
    assert guest.take_notified() & set(accepting.value.on)
    server = guest.call("accept", listener, 0, 0, thread=other)[0]
    data, got, writing = os.urandom(400_000), b"", True
    while writing:
        try:
            assert guest.call("write", client, data, len(data))[0] == len(data)
            writing = False
        except Blocked as blocked:
            guest.take_notified()
            count, (part,) = guest.call("read", server, Out(120_000), 120_000, thread=other)
            got += part[:count]
            assert guest.take_notified() & set(blocked.on)      # noqa: PT017
    guest.call("close", client)
    while True:
        count, (part,) = guest.call("recvfrom", server, Out(100_000), 100_000, WAITALL, 0, 0, thread=other)
        got += part[:count]
        if not count:
            break
    assert got == data


def test_waiting_for_all_of_it(guest: Guest) -> None:
    _, (numbers,) = guest.call("socketpair", UNIX, STREAM, 0, Out(8))
    one, other = struct.unpack("<ii", numbers)
    writer = guest.another(guest.thread.process, 2)
    for _ in range(3):
        with pytest.raises(Blocked) as blocked:
            guest.call("recvfrom", other, Out(10), 10, WAITALL, 0, 0)
        guest.take_notified()
        guest.call("write", one, b"abc", 3, thread=writer)
        assert guest.take_notified() & set(blocked.value.on)
    guest.call("write", one, b"def", 3, thread=writer)
    assert guest.call("recvfrom", other, Out(10), 10, WAITALL, 0, 0)[0] == 10
    assert guest.call("recvfrom", other, Out(10), 10, 0, 0, 0) == (2, [b"ef".ljust(10, b"\0")])


def test_a_call_waits_no_longer_than_it_is_told(guest: Guest) -> None:
    guest.now = 10**9
    _, (numbers,) = guest.call("socketpair", UNIX, STREAM, 0, Out(8))
    one, other = struct.unpack("<ii", numbers)
    guest.call("setsockopt", one, SOL_SOCKET, 20, struct.pack("<qq", 2, 0), 16)
    for name in ("read", "recvfrom"):
        with pytest.raises(Blocked) as blocked:
            guest.call(name, one, Out(10), 10, 0, 0, 0)
        assert blocked.value.deadline == guest.now + 2 * 10**9
        guest.now += 2 * 10**9
        with pytest.raises(BlockingIOError):
            guest.call(name, one, Out(10), 10, 0, 0, 0)
    with pytest.raises(Blocked) as blocked:
        guest.call("read", other, Out(10), 10)
    assert blocked.value.deadline is None


def test_nothing_is_left(guest: Guest) -> None:
    inodes = set(guest.system.files.store.inodes)
    listener, client, datagrams = (guest.call("socket", INET, kind | NONBLOCK, 0)[0] for kind in (1, 1, 2))
    guest.call("listen", listener, 5)
    _, (name, _) = guest.call("getsockname", listener, Out(16), Out(4, b"\x10"))
    guest.call("connect", client, name, 16)
    guest.call("sendto", datagrams, b"x", 1, 0, inet("127.0.0.1", 9), 16)
    named = guest.call("socket", UNIX, STREAM, 0)[0]
    guest.call("bind", named, unix(b"\0name"), 7)
    _, (numbers,) = guest.call("socketpair", UNIX, DGRAM, 0, Out(8))
    for fd in (listener, client, datagrams, named, *struct.unpack("<ii", numbers)):
        guest.call("close", fd)
    network = guest.system.network
    assert not network.ports
    assert not network.abstract
    assert set(guest.system.files.store.inodes) == inodes
