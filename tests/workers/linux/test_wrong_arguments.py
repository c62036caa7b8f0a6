"""Calls about files that are asked for what there is not: refused here as by the host's kernel."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from twice import Fd, Out, Twice

OMIT = struct.pack("<4q", 0, (1 << 30) - 2, 0, (1 << 30) - 2)
HERE, NOBODY = -100, 0xFFFF_FFFF


@pytest.fixture
def twice() -> Iterator[Twice]:
    with closing(Twice()) as found:
        found.guest.system.caller = found.guest.thread
        yield found


def opened(twice: Twice) -> list[Fd]:
    """A file, a directory, a pipe's end, a device, one that is made, a socket, a path."""
    return [twice.made("memfd_create", b"x\0", 0), twice.made("open", b"/\0", os.O_RDONLY),
            twice.pair("pipe2", Out(8), 0)[0], twice.made("open", b"/dev/null\0", os.O_RDWR),
            twice.made("open", b"/proc/version\0", os.O_RDONLY), twice.made("socket", 1, 1, 0),
            twice.made("open", b"/\0", os.O_PATH), Fd(99, 99)]


@pytest.mark.parametrize("name", ["fsync", "fdatasync"])
def test_what_can_be_written_out(twice: Twice, name: str) -> None:
    for fd in opened(twice):
        twice.same(name, fd)


def test_advice(twice: Twice) -> None:
    for fd in opened(twice)[:5]:
        for length, advice in ((0, 0), (10, 5), (0, 6), (0, -1), (-1, 0)):
            twice.same("fadvise64", fd, 0, length, advice)


@pytest.mark.parametrize("flags", [0, 1, 0x100, 0x200, 0x400, 0x800, 0x1000, 0x2000, 0x4000, 0x6000, 0x8000])
def test_flags(twice: Twice, flags: int) -> None:
    """The paths are those of nothing: flags are looked at first."""
    nothing = b"/nothing-here\0"
    twice.same("newfstatat", HERE, nothing, Out(144), flags)
    twice.same("statx", HERE, nothing, flags, 0x7FF, Out(256))
    twice.same("fchownat", HERE, nothing, NOBODY, NOBODY, flags)
    twice.same("utimensat", HERE, nothing, 0, flags)
    twice.same("linkat", HERE, nothing, HERE, nothing, flags)
    twice.same("faccessat2", HERE, nothing, 0, flags)
    twice.same("utimensat", twice.made("memfd_create", b"x\0", 0), 0, 0, flags)


@pytest.mark.parametrize(("name", "arguments"), [
    ("statx", (HERE, b"/\0", 0, 1 << 31, Out(0))), ("access", (b"/nothing-here\0", 8)),
    ("faccessat", (HERE, b"/nothing-here\0", -1)), ("utimensat", (HERE, 0, 0, 0)),
    ("utimensat", (HERE, b"/nothing-here\0", OMIT, 0x4000)), ("utimensat", (99, 0, OMIT, 0)),
    ("utimensat", (99, 0, 0, 0))])
def test_others(twice: Twice, name: str, arguments: tuple[Any, ...]) -> None:
    twice.same(name, *arguments)


FLOCK = struct.Struct("<hh4xqqi4x")


def locked(twice: Twice, fd: Fd, command: int, kind: int, start: int, length: int, pid: int = 0) -> Any:
    """What both give, but for the process."""
    asked = FLOCK.pack(kind, 0, start, length, pid)
    found = twice.both("fcntl", fd, command, Out(32, asked))
    assert isinstance(found[0], str) == isinstance(found[1], str), found
    if isinstance(found[0], str):
        assert found[0] == found[1]
        return found[0]
    ours, theirs = (FLOCK.unpack(each[1][0]) for each in found)
    assert ours[:4] == theirs[:4]
    assert ours[4] == theirs[4] or (ours[4], theirs[4]) == (1, os.getpid())
    return ours


def test_locks_of_open_files_and_of_processes(twice: Twice) -> None:
    """F_OFD_SETLK and its like: two of one process are in each other's way, and in that of the process' own."""
    get, lock, ofd_get, ofd_lock, ofd_wait = 5, 6, 36, 37, 38
    one = twice.made("memfd_create", b"x\0", 0)
    other = twice.made("open", b"/proc/self/fd/%d\0" % one.theirs, os.O_RDWR) if one.ours == one.theirs else None
    if other is None:       # the link names another number there
        ours = twice.guest.call("open", b"/proc/self/fd/%d\0" % one.ours, os.O_RDWR)[0]
        other = twice.keep(ours, os.open(f"/proc/self/fd/{one.theirs}", os.O_RDWR))
    assert locked(twice, one, ofd_lock, 1, 0, 10)[0] == 1
    assert locked(twice, other, ofd_lock, 0, 5, 10) == "EAGAIN"
    assert locked(twice, other, ofd_get, 0, 5, 10)[4] == -1
    assert locked(twice, other, ofd_lock, 1, 10, 0)[0] == 1
    assert locked(twice, one, ofd_lock, 1, 0, 10, 7) == locked(twice, one, ofd_get, 1, 0, 10, 7) == "EINVAL"
    assert locked(twice, one, lock, 1, 3, 1) == "EAGAIN"
    assert locked(twice, one, get, 1, 3, 1)[4] == -1
    assert locked(twice, one, ofd_wait, 2, 0, 10)[0] == 2
    assert locked(twice, one, lock, 1, 3, 1)[0] == 1
    assert locked(twice, other, ofd_get, 1, 3, 1)[4] == 1
    twice.shut(other)
    assert locked(twice, one, ofd_lock, 1, 10, 0)[0] == 1


# --- memory ------------------------------------------------------------------------------------------------------

SHARED, PRIVATE, VALIDATE, FIXED, ANONYMOUS = 1, 2, 3, 0x10, 0x20
MADV_FREE = 8
FAR = 0x1000_0000_0000      # nobody has anything there


def mapped(twice: Twice, *arguments: Any) -> str:
    """The errno that both give; empty, where both have mapped something (and it goes)."""
    found = twice.both("mmap", *arguments)
    if isinstance(found[0], str) or isinstance(found[1], str):
        assert found[0] == found[1], arguments
        return str(found[0])
    twice.guest.call("munmap", found[0][0], arguments[1])
    twice.on_host("munmap", found[1][0], arguments[1])
    return ""


def test_what_can_be_mapped(twice: Twice) -> None:
    file = twice.made("memfd_create", b"x\0", 0)
    zero, closed = twice.made("open", b"/dev/zero\0", os.O_RDONLY), Fd(99, 99)
    null = twice.made("open", b"/dev/null\0", os.O_RDWR)
    seen = set()
    for fd in (file, zero, null, closed, twice.pair("pipe2", Out(8), 0)[0]):
        for kind in (0, SHARED, PRIVATE, VALIDATE, ANONYMOUS, ANONYMOUS | SHARED, ANONYMOUS | VALIDATE,
                     VALIDATE | 1 << 24, SHARED | 1 << 24, VALIDATE | 0x20000):
            for length, prot, offset in ((0, 3, 0), (4096, 3, 0), (4096, 1, 0), (4096, 1, 1), (1 << 60, 1, 0)):
                seen.add(mapped(twice, 0, length, prot, kind, fd, offset))
    assert seen == {"", "EINVAL", "ENOMEM", "EBADF", "EACCES", "ENOTSUP", "ENODEV"}


def test_what_cannot_be_written_to_later(twice: Twice) -> None:
    """A shared mapping of what is open for reading only."""
    for kind, prot in ((SHARED, 1), (PRIVATE, 1), (SHARED, 0)):
        fd = twice.made("open", b"/dev/zero\0", os.O_RDONLY)
        twice.same("mmap", FAR, 8192, prot, kind | FIXED, fd, 0)
        twice.same("mprotect", FAR + 4096, 4096, 3)
        twice.same("mprotect", FAR, 8192, 5)
        twice.same("munmap", FAR, 8192)


@pytest.mark.parametrize("name", ["msync", "mlock", "munlock", "mlock2"])
def test_what_is_mapped(twice: Twice, name: str) -> None:
    twice.same("mmap", FAR, 8192, 3, PRIVATE | ANONYMOUS | FIXED, -1, 0)
    for address, length in ((FAR, 4096), (FAR, 8192), (FAR, 8193), (FAR + 1, 8191), (FAR + 1, 8192), (FAR, 0),
                            (FAR + 8192, 4096), (FAR + 8192, 0), (FAR - 4096, 8192)):
        for flags in (0, 1, 2, 4, 5, 8):
            twice.same(name, address, length, flags)
    twice.same("munmap", FAR, 8192)


def test_everything_is_locked(twice: Twice) -> None:
    for flags in (0, 4, 8, 9):
        twice.same("mlockall", flags)


@pytest.mark.parametrize("advice", [-1, *range(12), *range(14, 22), 99])
def test_advice_about_memory(twice: Twice, advice: int) -> None:
    """Of zeros (private, shared), of a file that may be written to, and that may not."""
    file, reading = twice.made("memfd_create", b"x\0", 0), twice.made("open", b"/dev/zero\0", os.O_RDONLY)
    twice.same("ftruncate", file, 8192)
    for fd, kind in ((Fd(-1, -1), PRIVATE | ANONYMOUS), (Fd(-1, -1), SHARED | ANONYMOUS), (file, SHARED),
                     (file, PRIVATE), (reading, SHARED)):
        if advice == MADV_FREE and fd is reading:       # Linux 6.18 takes it
            continue
        twice.same("mmap", FAR, 8192, 1, kind | FIXED, fd, 0)
        for address, length in ((FAR, 8192), (FAR + 1, 10), (FAR, 0), (FAR, 10), (FAR + 4096, 8192), (FAR - 4096, 1),
                                (FAR + 8192, 4096)):
            twice.same("madvise", address, length, advice)
        twice.same("munmap", FAR, 8192)


def test_what_is_in_memory(twice: Twice) -> None:
    """Zeros that nobody has looked at are not; addresses that are far from each other have one table each."""
    start = FAR - 8192
    twice.same("mmap", start, 40 * 4096, 3, PRIVATE | ANONYMOUS | FIXED, -1, 0)
    twice.same("mincore", start, 40 * 4096, Out(40))
    for address, length in ((start + 1, 10), (start, 0), (start, 1), (start + 39 * 4096, 4097), (start - 4096, 10)):
        twice.same("mincore", address, length, Out(4))
    twice.same("mincore", start, 10, 0)
    twice.same("munmap", start, 40 * 4096)
    twice.guest.call("mmap", start, 40 * 4096, 3, PRIVATE | ANONYMOUS | FIXED, -1, 0)
    twice.guest.thread.process.space.write(FAR, b"x")
    found = twice.guest.call("mincore", start, 40 * 4096, Out(40))[1][0]
    assert found[:2] == bytes(2)
    assert found[2] == 1


def test_what_is_no_link(twice: Twice) -> None:
    twice.same("readlink", b"\0", Out(10), 10)
    twice.same("readlinkat", twice.made("open", b"/\0", os.O_PATH), b"\0", Out(10), 10)
    twice.same("readlinkat", Fd(99, 99), b"\0", Out(10), 10)
    twice.same("readlink", b"/\0", Out(10), 10)
    twice.same("readlink", b"/\0", Out(10), 0)


# --- what is only half there -------------------------------------------------------------------------------------


def vector(*parts: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", *each) for each in parts)


def test_a_vector_of_which_a_part_is_not_mapped(twice: Twice) -> None:
    """What comes before it has been read or written."""
    twice.same("mmap", FAR, 4096, 3, PRIVATE | ANONYMOUS | FIXED, -1, 0)
    parts = vector((FAR, 64), (FAR + 8192, 64), (FAR + 64, 64))
    file = twice.made("memfd_create", b"x\0", 0)
    twice.same("ftruncate", file, 200)
    for name, more in (("writev", ()), ("pwritev", (10,)), ("readv", ()), ("preadv", (10,))):
        twice.same("lseek", file, 20, 0)
        twice.same(name, file, parts, 3, *more)
        twice.same("lseek", file, 0, 1)
    twice.same("lseek", file, 20, 0)
    twice.same("read", file, FAR + 8192, 10)
    twice.same("lseek", file, 0, 1)
    twice.same("munmap", FAR, 4096)


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0x20, 0x100, 1 << 31, 0x10, 0x8])
def test_names_and_flags_of_memory(twice: Twice, flags: int) -> None:
    for name in (b"\0", b"a" * 249 + b"\0", b"a" * 250 + b"\0"):
        twice.new("memfd_create", name, flags)


def test_what_is_to_be_written_out_or_read_ahead(twice: Twice) -> None:
    for fd in opened(twice):
        for offset, length, flags in ((0, 1, 2), (0, 1, 8), (-1, 1, 1), (0, -1, 1), (1, (1 << 63) - 1, 1), (0, 0, 7)):
            twice.same("sync_file_range", fd, offset, length, flags)
        twice.same("readahead", fd, 0, 10)


@pytest.mark.parametrize("size", [8, 7])
def test_a_mask_that_is_not_mapped(twice: Twice, size: int) -> None:
    """It is looked at also where something is ready already."""
    epoll, (_, end) = twice.made("epoll_create1", 0), twice.pair("pipe2", Out(8), 0)
    for side, made in (("ours", twice.guest.call), ("theirs", twice.on_host)):
        made("epoll_ctl", getattr(epoll, side), 1, getattr(end, side), struct.pack("<IQ", 4, 0))
    twice.same("epoll_pwait", epoll, Out(12), 1, 0, FAR, size)
    twice.same("ppoll", 0, 0, bytes(16), FAR, size)
    twice.same("pselect6", 0, 0, 0, 0, bytes(16), struct.pack("<QQ", FAR, size))


@pytest.mark.parametrize("version", [0x1998_0330, 0x2007_1026, 0x2008_0522, 7])
def test_whose_capabilities(twice: Twice, version: int) -> None:
    for pid in (0, -1, 0x3F_FFFF):
        header = Out(8, struct.pack("<Ii", version, pid))
        ours, theirs = twice.both("capget", header, Out(24))
        assert isinstance(ours, str) == isinstance(theirs, str)
        if isinstance(ours, str):
            assert ours == theirs
        twice.same("capget", header, 0)
    twice.same("capset", Out(8, struct.pack("<Ii", version, 2)), bytes(24))
    twice.same("capset", Out(8, struct.pack("<Ii", version, 0)), 0)


# --- sockets, clocks ---------------------------------------------------------------------------------------------


def test_what_is_sent_from_a_file(twice: Twice) -> None:
    file = twice.made("memfd_create", b"x\0", 0)
    twice.same("write", file, b"abcdef", 6)
    reading, (end, other) = twice.made("open", b"/dev/null\0", os.O_RDONLY), twice.pair("pipe2", Out(8), 0)
    for to, source in ((reading, file), (other, other), (end, file), (other, file), (Fd(-1, -1), file)):
        for at in (0, 2, -1):
            twice.same("sendfile", to, source, Out(8, struct.pack("<q", at)), 3)


def test_sockets_that_there_are_not(twice: Twice) -> None:
    for kind, protocol in ((3, 0), (1, 17), (2, 6), (1, 1), (75, 0)):
        twice.new("socket", 2, kind, protocol)


def test_a_name_that_is_shorter_than_nothing(twice: Twice) -> None:
    one, _ = twice.pair("socketpair", 1, 1, 0, Out(8))
    for size in (-1, 1 << 31):
        header = struct.pack("<QI4xQQQQI4x", FAR, size & 0xFFFF_FFFF, 0, 0, 0, 0, 0)
        twice.same("recvmsg", one, header, 0x40)
        twice.same("sendmsg", one, header, 0x40)
    for timeout in (struct.pack("<qq", -1, 0), struct.pack("<qq", 1, 10**9), FAR):
        twice.same("recvmmsg", one, bytes(64), 1, 0x40, timeout)


@pytest.mark.parametrize("clock", [-1, 0, 1, *range(3, 8), *range(10, 17)])
def test_clocks(twice: Twice, clock: int) -> None:
    """Which there are, and which of them can be slept by (here, none of processor time)."""
    for name, arguments in (("clock_gettime", (Out(16),)), ("clock_nanosleep", (0, bytes(16), 0))):
        ours, theirs = twice.both(name, clock, *arguments)
        assert ours == theirs or (name == "clock_gettime" and not isinstance(ours, str) and not isinstance(theirs, str))
