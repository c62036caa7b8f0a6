"""System calls made here and in the host's kernel, and compared: what they give, what they write, what poll(2) says.

Both processes have a descriptor for whatever the test calls ``Fd``; memory that a call writes to is ``Out``, memory
that it reads is bytes. Nothing waits on the host: descriptors there, and so here, do not block.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from host import call
from system import FIRST, Ram

from workers.linux.abi import number_of
from workers.linux.frames import Frames
from workers.linux.processes import FileTable, Process, Thread
from workers.linux.space import PAGE, Space
from workers.linux.system import System
from workers.linux.tables import Tables
from workers.linux.vfs import FileSystem

__all__ = ["Fd", "Guest", "Out", "Twice", "laid_out", "packed"]

_SCRATCH = 200      # pages
UNSHARE, CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 272, 0x4000_0000, 0x8914, 1


@dataclass(frozen=True)
class Fd:
    """A descriptor here and one there."""

    ours: int
    theirs: int


@dataclass(frozen=True)
class Out:
    """So many bytes to be written to. They hold ``before`` first."""

    size: int
    before: bytes = b""


class Console:
    """Nobody uses it."""

    terminal = False

    def read(self, count: int) -> bytes | None:
        return None

    def ready(self) -> bool:
        return False

    def write(self, data: bytes, *, error: bool) -> int:
        return len(data)

    def writable(self) -> bool:
        return True

    def ioctl(self, system: Any, thread: Any, request: int, argument: int) -> int:
        raise OSError(errno.ENOTTY, "")

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, saved: dict[str, Any], clock: Any) -> None: ...


class Launcher:
    """There are no vCPUs."""

    def free_vcpus(self) -> int:
        return 0

    def launch(self, *arguments: Any) -> None: ...

    def look_at(self, thread: Thread) -> None: ...

    def forget_space(self, space: Space) -> None: ...

    def host_address(self, frame: int, offset: int) -> int:
        raise AssertionError

    def wrote(self, frame: int) -> None: ...

    def forget_tables(self) -> None: ...


def laid_out(space: Space, at: int, arguments: Sequence[int | bytes | Out]) -> tuple[list[int], list[tuple[int, int]]]:
    """Arguments of a call, those that are memory from there on; where and how large each ``Out`` is. Raises
    SegmentationFault."""
    values, outs = [], []
    for each in arguments:
        if isinstance(each, int):
            values.append(each & (1 << 64) - 1)
            continue
        data = each if isinstance(each, bytes) else each.before.ljust(each.size, b"\0")
        space.write(at, data)
        values.append(at)
        if isinstance(each, Out):
            outs.append((at, each.size))
        at += -(-(len(data) + 1) // 64) * 64
    return values, outs


class Guest:
    """A system with a process, of one thread to begin with, that makes calls. ``now``: of its clocks; None: the
    host's."""

    def __init__(self) -> None:
        self.ram, self.pool = Ram(), Frames(FIRST, 4096)
        self.tables = Tables(memoryview(bytearray(256 * PAGE)).cast("Q"), 1 << 40)
        self.now: int | None = None
        files = FileSystem(self.ram, self.pool, clock=time.time_ns, random=os.urandom, blocks=4096)
        self.system = System(self.ram, self.pool, self.tables, files, Console(), realtime=self.clock,
                             monotonic=self.clock)
        self.system.launcher = Launcher()
        self.thread = self.process(1).threads[0]

    def clock(self) -> int:
        return time.monotonic_ns() if self.now is None else self.now

    def process(self, pid: int) -> Process:
        """Another one."""
        space = Space(self.ram, self.pool, self.tables, 1 << 30)
        self.system.files.root.keep()
        found = Process(pid, 0, space, FileTable(pid), self.system.files.root, mask=0)
        self.system.processes[pid] = found
        self.another(found, pid)
        self.scratch = space.map(0, _SCRATCH * PAGE, 3)
        return found

    def another(self, process: Process, tid: int) -> Thread:
        """A thread."""
        found = Thread(tid, process)
        process.threads.append(found)
        return found

    def fork(self, pid: int) -> Thread:
        """A process with the same files open."""
        parent = self.thread.process
        found = self.process(pid)
        found.files = parent.files.copy(found.pid)
        return found.threads[0]

    def call(self, name: str, *arguments: int | bytes | Out, thread: Thread | None = None) -> tuple[int, list[bytes]]:
        """What it gives, and what is then in each ``Out``. Raises OSError and Blocked."""
        thread = thread or self.thread
        space = thread.process.space
        values, outs = laid_out(space, self.scratch, arguments)
        result = self.system.call(thread, number_of(name), values + [0] * (6 - len(values)))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result, [space.read(*out) for out in outs]

    def take_notified(self) -> set[Any]:
        found, self.system.notified = self.system.notified, set()
        return found


def _on_host(name: str, arguments: Sequence[int | bytes | Out]) -> tuple[int, list[bytes]]:
    values: list[Any] = []
    outs = []
    for each in arguments:
        if isinstance(each, Out):
            outs.append(ctypes.create_string_buffer(each.before.ljust(each.size, b"\0"), each.size))
            values.append(outs[-1])
        else:
            values.append(each)
    return call(number_of(name), *values), [each.raw for each in outs]


def _leave_network() -> None:
    """Of this thread; in the new one there is the loopback device."""
    try:
        call(UNSHARE, CLONE_NEWNET)
    except OSError:
        pytest.skip("no network namespaces")
    with socket.socket() as found:
        fcntl.ioctl(found, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


@dataclass
class Twice:
    """Close it after use. ``apart``: the host's calls are made in a network of their own."""

    apart: bool = False
    guest: Guest = field(default_factory=Guest)
    open: list[Fd] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        if self.apart:
            self.thread.submit(_leave_network).result()

    def on_host(self, name: str, *arguments: int | bytes | Out) -> tuple[int, list[bytes]]:
        return self.thread.submit(_on_host, name, arguments).result()

    def close(self) -> None:
        self.thread.shutdown()
        for each in self.open:
            with contextlib.suppress(OSError):
                os.close(each.theirs)

    def keep(self, ours: int, theirs: int) -> Fd:
        found = Fd(ours, theirs)
        self.open.append(found)
        return found

    def shut(self, fd: Fd) -> None:
        self.open.remove(fd)
        self.same("close", fd)

    def both(self, name: str, *arguments: Any) -> tuple[Any, Any]:
        """What it gives here, what it gives there: (result, outs), or the errno's name."""
        found = []
        for side, made in (("ours", self.guest.call), ("theirs", self.on_host)):
            given = [getattr(each, side) if isinstance(each, Fd) else each for each in arguments]
            try:
                found.append(made(name, *given))
            except OSError as error:
                found.append(errno.errorcode[error.errno or 0])
        return found[0], found[1]

    def same(self, name: str, *arguments: Any) -> Any:
        """What both give."""
        ours, theirs = self.both(name, *arguments)
        assert ours == theirs, (name, short(arguments), short(ours), short(theirs))
        return ours

    def new(self, name: str, *arguments: Any) -> Fd | str:
        """A call whose result is a descriptor; or the errno."""
        ours, theirs = self.both(name, *arguments)
        if isinstance(theirs, str) or isinstance(ours, str):
            assert ours == theirs, (name, short(arguments), ours, theirs)
            return str(ours)
        return self.keep(ours[0], theirs[0])

    def made(self, name: str, *arguments: Any) -> Fd:
        found = self.new(name, *arguments)
        assert isinstance(found, Fd), (name, arguments, found)
        return found

    def pair(self, name: str, *arguments: Any) -> tuple[Fd, Fd]:
        """A call that writes two descriptors: ``Out(8)`` is among its arguments."""
        ours, theirs = self.both(name, *arguments)
        assert not isinstance(ours, str), ours
        assert not isinstance(theirs, str), theirs
        (one, two), (other, another) = struct.unpack("<ii", ours[1][0]), struct.unpack("<ii", theirs[1][0])
        return self.keep(one, other), self.keep(two, another)

    def poll(self, *fds: Fd, events: int = 0x7FFF & ~0x20) -> list[int]:
        """What can be done with each, as both say."""
        found = []
        for side, made in (("ours", self.guest.call), ("theirs", self.on_host)):
            before = packed([getattr(each, side) for each in fds], events)
            found.append([bits for _, _, bits in struct.iter_unpack(
                "<iHH", made("poll", Out(len(before), before), len(fds), 0)[1][0])])
        assert found[0] == found[1], ([hex(each) for each in found[0]], [hex(each) for each in found[1]])
        return found[0]


def short(what: object) -> str:
    found = repr(what)
    return found if len(found) < 500 else f"{found[:300]} ... {found[-150:]}"


def packed(numbers: Sequence[int], events: int) -> bytes:
    """For poll(2)."""
    return b"".join(struct.pack("<iHH", number, events, 0) for number in numbers)
