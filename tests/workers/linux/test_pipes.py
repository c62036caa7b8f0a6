"""Pipes and fifos against the host's kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twice import Fd, Guest, Out, Twice

from workers.linux.calls import Blocked

IN, OUT, ERR, HUP = 1, 4, 8, 16
SETPIPE, GETPIPE, FIONREAD = 1031, 1032, 0x541B
EXAMPLES = int(os.environ.get("EXAMPLES", "60"))


@pytest.fixture
def twice() -> Iterator[Twice]:
    with contextlib.closing(Twice()) as found:
        yield found


@pytest.fixture
def guest() -> Guest:
    return Guest()


def piped(twice: Twice, flags: int = os.O_NONBLOCK) -> tuple[Fd, Fd]:
    return twice.pair("pipe2", Out(8), flags)


def gathered(name: str, guest: Guest, fd: int, parts: list[bytes]) -> int:
    """writev(2) of them."""
    at, vectors = guest.scratch + (100 << 12), b""
    for part in parts:
        guest.thread.process.space.write(at, part)
        vectors += struct.pack("<QQ", at, len(part))
        at += len(part)
    return guest.call(name, fd, vectors, len(parts))[0]


sizes = st.one_of(st.integers(0, 10), st.sampled_from([100, 4095, 4096, 4097, 8192, 10000, 65536, 70000]),
                  st.integers(0, 9000))
ends = st.integers(0, 3)
actions = st.one_of(
    st.tuples(st.just("write"), ends, sizes), st.tuples(st.just("write"), ends, sizes),
    st.tuples(st.just("read"), ends, sizes), st.tuples(st.just("read"), ends, sizes),
    st.tuples(st.just("resize"), ends, st.sampled_from([0, 1, 4096, 5000, 8192, 40000, 65536, 1 << 20])),
    st.tuples(st.just("dup"), ends), st.tuples(st.just("close"), ends), st.tuples(st.just("direct"), ends),
    st.tuples(st.just("check"), ends))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(actions, min_size=5, max_size=30))
def test_pipes_are_as_on_the_host(found: list[tuple[Any, ...]]) -> None:
    with contextlib.closing(Twice()) as twice:
        fds = list(piped(twice))
        for name, end, *rest in found:
            if not fds:
                return
            fd = fds[end % len(fds)]
            if name == "write":
                twice.same("write", fd, bytes(end + at % 251 for at in range(rest[0])), rest[0])
            elif name == "read":
                twice.same("read", fd, Out(rest[0] + 1), rest[0])
            elif name == "resize":
                twice.same("fcntl", fd, SETPIPE, rest[0])
            elif name == "dup":
                fds.append(twice.made("dup", fd))
            elif name == "close":
                fds.remove(fd)
                twice.shut(fd)
            elif name == "direct":
                twice.same("fcntl", fd, 4, os.O_DIRECT | os.O_NONBLOCK)
            else:
                twice.same("ioctl", fd, FIONREAD, Out(4))
                twice.same("fcntl", fd, GETPIPE, 0)
                twice.same("fcntl", fd, 3, 0)
            if fds:
                twice.poll(*fds)


@pytest.mark.parametrize("flags", [0, os.O_CLOEXEC, os.O_NONBLOCK, os.O_DIRECT, os.O_APPEND, 1 << 30])
def test_flags(twice: Twice, flags: int) -> None:
    ours, theirs = twice.both("pipe2", Out(8), flags)
    if isinstance(theirs, str):
        assert ours == theirs
        return
    for one, other in zip(*(struct.unpack("<ii", each[1][0]) for each in (ours, theirs)), strict=True):
        fd = twice.keep(one, other)
        for command in (1, 3):
            twice.same("fcntl", fd, command, 0)
    assert twice.both("pipe2", 8, 0) == ("EFAULT", "EFAULT")


def test_what_it_is(twice: Twice) -> None:
    reader, writer = piped(twice)
    for fd in (reader, writer):
        ours, theirs = twice.both("fstat", fd, Out(144))
        assert stat.S_IFMT(struct.unpack_from("<I", ours[1][0], 24)[0]) == stat.S_IFIFO
        assert struct.unpack_from("<I", ours[1][0], 24) == struct.unpack_from("<I", theirs[1][0], 24)
        for name, arguments in (("lseek", (0, 0)), ("pread64", (Out(4), 4, 0)), ("pwrite64", (b"abcd", 4, 0)),
                                ("ftruncate", (5,)), ("read", (Out(4), 0)), ("write", (b"", 0)), ("ioctl", (0x5401, 0)),
                                ("ioctl", (0x5421, struct.pack("<i", 0))), ("fcntl", (3, 0)),
                                ("ioctl", (0x5451, 0)), ("fcntl", (1, 0)), ("fsync", ())):
            if name != "fsync":
                twice.same(name, fd, *arguments)


def test_a_gathered_write_is_one(guest: Guest) -> None:
    """Whole, or not at all."""
    _, (numbers,) = guest.call("pipe2", Out(8), os.O_NONBLOCK)
    reader, writer = struct.unpack("<ii", numbers)
    assert guest.call("write", writer, bytes(15 * 4096), 15 * 4096)[0] == 15 * 4096
    assert guest.call("write", writer, bytes(4000), 4000)[0] == 4000
    with pytest.raises(BlockingIOError):
        gathered("writev", guest, writer, [b"x" * 60, b"y" * 60])
    assert gathered("writev", guest, writer, [b"x" * 60, b"y" * 20]) == 80
    assert guest.call("read", reader, Out(70000), 70000)[0] == 15 * 4096 + 4080


def test_who_waits_is_woken(guest: Guest) -> None:
    _, (numbers,) = guest.call("pipe", Out(8))
    reader, writer = struct.unpack("<ii", numbers)
    with pytest.raises(Blocked) as blocked:
        guest.call("read", reader, Out(10), 10)
    guest.take_notified()
    other = guest.another(guest.thread.process, 2)
    with pytest.raises(Blocked) as full:
        guest.call("write", writer, bytes(100000), 100000, thread=other)
    assert guest.take_notified() & set(blocked.value.on)
    assert guest.call("read", reader, Out(40960), 40960)[0] == 40960
    assert guest.take_notified() & set(full.value.on)
    assert guest.call("read", reader, Out(4096), 4096)[0] == 4096
    assert guest.call("write", writer, bytes(100000), 100000, thread=other)[0] == 100000
    with pytest.raises(Blocked) as blocked:
        guest.call("write", writer, b"x" * 20000, 20000)
    guest.call("close", reader)
    assert guest.take_notified() & set(blocked.value.on)
    guest.system.give_up(guest.thread)
    with pytest.raises(BrokenPipeError):
        guest.call("write", writer, b"x", 1)
    assert [each.number for each in guest.thread.pending] == [signal.SIGPIPE]


def test_its_end_comes_when_the_last_writer_goes(guest: Guest) -> None:
    """Wherever the descriptors are."""
    _, (numbers,) = guest.call("pipe", Out(8))
    reader, writer = struct.unpack("<ii", numbers)
    child = guest.fork(2)
    guest.call("close", writer)
    with pytest.raises(Blocked) as blocked:
        guest.call("read", reader, Out(10), 10)
    guest.take_notified()
    guest.system.end_process(child.process, 0)
    assert guest.take_notified() & set(blocked.value.on)
    assert guest.call("read", reader, Out(10), 10)[0] == 0


@pytest.fixture
def fifo(twice: Twice, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    path = os.fsencode(tmp_path_factory.mktemp("fifo") / "f")
    os.mkfifo(path)
    assert twice.guest.call("mknod", b"/f", stat.S_IFIFO | 0o600, 0)[0] == 0
    return b"/f", path


def opened(twice: Twice, paths: tuple[bytes, bytes], flags: int) -> Fd | str:
    try:
        theirs: Any = os.open(paths[1], flags)
    except OSError as error:
        theirs = errno.errorcode[error.errno or 0]
    try:
        ours: Any = twice.guest.call("openat", -100, paths[0], flags, 0)[0]
    except OSError as error:
        ours = errno.errorcode[error.errno or 0]
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        return str(ours)
    return twice.keep(ours, theirs)


def test_fifos_that_do_not_wait(twice: Twice, fifo: tuple[bytes, bytes]) -> None:
    assert opened(twice, fifo, os.O_WRONLY | os.O_NONBLOCK) == "ENXIO"
    reader = opened(twice, fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert isinstance(reader, Fd)
    assert twice.poll(reader) == [0]
    twice.same("read", reader, Out(5), 5)
    writer = opened(twice, fifo, os.O_WRONLY | os.O_NONBLOCK)
    assert isinstance(writer, Fd)
    twice.same("write", writer, b"abc", 3)
    twice.poll(reader, writer)
    twice.shut(writer)
    twice.poll(reader)
    twice.same("read", reader, Out(5), 5)
    twice.same("read", reader, Out(5), 5)
    both = opened(twice, fifo, os.O_RDWR | os.O_NONBLOCK)
    assert isinstance(both, Fd)
    twice.same("write", both, b"abc", 3)
    twice.poll(reader, both)
    twice.shut(both)
    twice.shut(reader)
    assert not twice.guest.system.fifos
    reader = opened(twice, fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert isinstance(reader, Fd)
    twice.same("read", reader, Out(5), 5)


def test_fifos_that_wait_for_each_other(guest: Guest) -> None:
    guest.call("mknod", b"/f", stat.S_IFIFO | 0o600, 0)
    other = guest.another(guest.thread.process, 2)
    with pytest.raises(Blocked) as blocked:
        guest.call("openat", -100, b"/f", os.O_RDONLY, 0)
    guest.take_notified()
    writer = guest.call("openat", -100, b"/f", os.O_WRONLY, 0, thread=other)[0]
    assert guest.take_notified() & set(blocked.value.on)
    guest.call("close", writer, thread=other)       # it has been there: that will do
    reader = guest.call("openat", -100, b"/f", os.O_RDONLY, 0)[0]
    assert guest.call("read", reader, Out(5), 5)[0] == 0
    guest.call("close", reader)
    assert not guest.system.fifos
    with pytest.raises(Blocked):
        guest.call("openat", -100, b"/f", os.O_WRONLY, 0)
    guest.system.give_up(guest.thread)
    assert not guest.system.fifos
