"""Mapped files that are cut, punched, unlinked: the same calls here and in the host's kernel, then the same memory and
the same signals; and of what nobody sees, that nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twice import Guest

from workers.linux.abi import number_of
from workers.linux.contents import Regular
from workers.linux.space import PAGE, SegmentationFault, Space
from workers.linux.tables import FRAME

#: Where nothing of this process is, nor will be.
BASE = 0x10_0000_0000
PAGES = 16
FILE_PAGES = 6
SHARED, PRIVATE, FIXED = 1, 2, 0x10
MAYMOVE, MOVE_FIXED, DONTNEED = 1, 2, 4
KEEP_SIZE, PUNCH = 1, 2

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def on_host(name: str, *arguments: int) -> int:
    return int(libc.syscall(*(ctypes.c_long(each) for each in (number_of(name), *arguments))))


@dataclass
class Both:
    """A file here and one of the host, mapped at the same addresses."""

    guest: Guest = field(default_factory=Guest)

    def __post_init__(self) -> None:
        contents = b"".join(bytes([65 + page]) * PAGE for page in range(FILE_PAGES))
        self.ours = self.guest.call("open", b"/file\0", os.O_CREAT | os.O_RDWR, 0o600)[0]
        self.guest.call("write", self.ours, contents, len(contents))
        self.theirs = os.memfd_create("test-mapped")
        os.write(self.theirs, contents)
        self.memory = os.open("/proc/self/mem", os.O_RDWR)
        file = self.guest.thread.process.files.get(self.ours).inode
        assert isinstance(file, Regular)
        self.file = file

    def close(self) -> None:
        on_host("munmap", BASE, 2 * PAGES * PAGE)
        os.close(self.theirs)
        os.close(self.memory)

    @property
    def space(self) -> Space:
        return self.guest.thread.process.space

    def do(self, name: str, *arguments: int, fd: int = -1) -> None:
        """``fd``: which argument is that of the file."""
        ours, theirs = list(arguments), list(arguments)
        if fd >= 0:
            ours.insert(fd, self.ours)
            theirs.insert(fd, self.theirs)
        try:
            self.guest.call(name, *ours)
            failed = False
        except OSError:
            failed = True
        assert failed == (on_host(name, *theirs) < 0), (name, arguments)

    def map(self, page: int, count: int, prot: int, kind: int, offset: int) -> None:
        self.do("mmap", BASE + page * PAGE, count * PAGE, prot, kind | FIXED, offset * PAGE, fd=4)

    def write(self, page: int, value: int) -> None:
        """Where the program may."""
        found = self.space.find((BASE >> 12) + page)
        if found is None or not found.prot & 2:
            return
        data = struct.pack("<I", value)
        ours = touched(lambda: self.space.write(BASE + page * PAGE, data))
        theirs = touched(lambda: os.pwrite(self.memory, data, BASE + page * PAGE) and None)
        assert ours == theirs

    def compare(self) -> None:
        for page in range(PAGES):
            address = BASE + page * PAGE
            found = self.space.find(address >> 12)
            if found is not None and found.prot:
                ours = touched(lambda: self.space.read(address, PAGE))      # noqa: B023 (is called at once)
                theirs = touched(lambda: os.pread(self.memory, PAGE, address))      # noqa: B023
                assert ours == theirs, page
        size = os.fstat(self.theirs).st_size
        assert self.file.size == size
        assert self.file.read(0, size) == os.pread(self.theirs, size, 0)
        self.check()

    def check(self) -> None:
        """Each frame has as many uses as entries, and one more where it is the file's; free ones are zero."""
        uses: dict[int, int] = dict.fromkeys([*self.file._frames.values(), *self.file._reserved.values()], 1)
        for each in self.space.mappings:
            for page in range(each.start, each.end):
                entry = self.guest.tables.get(self.space.root, page)
                if entry:
                    uses[(entry & FRAME) >> 12] = uses.get((entry & FRAME) >> 12, 0) + 1
        assert {frame: count for frame, count in uses.items() if self.guest.pool.uses(frame) != count} == {}
        assert self.guest.pool.free == 4096 - len(uses)
        assert not [frame for frame, data in self.guest.ram.frames.items() if frame not in uses and any(data)]
        mapped = any(each.backing is self.file for each in self.space.mappings)
        assert (self.file.mapped, self.file.uses) == (mapped, 1 + mapped)


def touched(call: Callable[[], object]) -> object:
    try:
        return call()
    except SegmentationFault as fault:
        return "bus" if fault.bus else "segv"
    except OSError:
        return "bus"        # what /proc/self/mem says of it


pages, counts, offsets = st.integers(0, PAGES - 1), st.integers(1, 6), st.integers(0, FILE_PAGES)
sizes = st.integers(0, FILE_PAGES * PAGE) | st.integers(0, FILE_PAGES).map(lambda pages: pages * PAGE)
actions = st.one_of(
    st.tuples(st.just("map"), pages, counts, st.sampled_from([1, 3]), st.sampled_from([SHARED, PRIVATE]), offsets),
    st.tuples(st.just("unmap"), pages, counts),
    st.tuples(st.just("protect"), pages, counts, st.sampled_from([0, 1, 3])),
    st.tuples(st.just("move"), pages, counts, counts, st.integers(0, PAGES)),
    st.tuples(st.just("unneeded"), pages, counts),
    st.tuples(st.just("cut"), sizes), st.tuples(st.just("cut"), sizes),
    st.tuples(st.just("write"), pages, st.integers(1, 2**32 - 1)))


def act(both: Both, name: str, *arguments: int) -> None:
    if name in ("map", "write"):
        getattr(both, name)(*arguments)
    elif name == "cut":
        both.do("ftruncate", arguments[0], fd=0)
    elif name == "punch":
        both.do("fallocate", KEEP_SIZE | PUNCH, *arguments, fd=0)
    elif name == "move":
        page, old, new, to = arguments
        found = both.space.find((BASE >> 12) + page)
        if found is not None and found.end >= (BASE >> 12) + page + min(old, new):      # else it depends on the kernel
            both.do("mremap", BASE + page * PAGE, old * PAGE, new * PAGE, MAYMOVE | MOVE_FIXED, BASE + to * PAGE)
    else:
        call, *more = {"unmap": ("munmap",), "protect": ("mprotect", *arguments[2:]),
                       "unneeded": ("madvise", DONTNEED)}[name]
        both.do(str(call), BASE + arguments[0] * PAGE, arguments[1] * PAGE, *map(int, more))


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=20))
def test_cut_as_the_host_does(found: list[tuple]) -> None:
    with contextlib.closing(Both()) as both:
        for name, *arguments in found:
            act(both, name, *arguments)
        both.compare()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([SHARED, PRIVATE]), st.lists(st.one_of(
    st.tuples(st.just("write"), st.integers(0, FILE_PAGES - 1), st.integers(1, 2**32 - 1)),
    st.tuples(st.just("punch"), sizes, st.sampled_from([1, 100, PAGE, 2 * PAGE, 3 * PAGE])),
    st.tuples(st.just("cut"), sizes)), max_size=12))
@example(SHARED, [("cut", 1), ("write", 0, 256), ("cut", 1)])
@example(PRIVATE, [("write", 2, 1), ("punch", 2 * PAGE, PAGE)])
@example(PRIVATE, [("write", 2, 1), ("cut", PAGE + 1), ("cut", 3 * PAGE)])
def test_punched_as_the_host_does(kind: int, found: list[tuple]) -> None:
    """What a program has written to a private mapping stays. (What it may write to there, and has not, is its own here
    as soon as it has been looked at: so nobody looks before.)"""
    with contextlib.closing(Both()) as both:
        both.map(0, FILE_PAGES, 3, kind, 0)
        for name, *arguments in found:
            act(both, name, *arguments)
        both.compare()


def test_what_is_unlinked_and_closed_stays_until_nobody_maps_it() -> None:
    guest = Guest()
    fd = guest.call("open", b"/file\0", os.O_CREAT | os.O_RDWR, 0o600)[0]
    guest.call("write", fd, b"contents", 8)
    inode = guest.thread.process.files.get(fd).inode
    space = guest.thread.process.space
    free = guest.pool.free
    first = guest.call("mmap", 0, 2 * PAGE, 3, SHARED, fd, 0)[0]
    second = guest.call("mmap", 0, PAGE, 1, PRIVATE, fd, 0)[0]
    guest.call("unlink", b"/file\0")
    guest.call("close", fd)
    assert inode.number in guest.system.files.store.inodes
    assert space.read(first, 8) == space.read(second, 8) == b"contents"
    space.write(first, b"written!")
    assert space.read(second, 8) == b"written!"
    guest.call("munmap", first, PAGE)
    guest.call("mremap", second, PAGE, PAGE, MAYMOVE | MOVE_FIXED, second - 16 * PAGE)
    assert space.read(second - 16 * PAGE, 8) == b"written!"
    child = space.fork()
    guest.call("munmap", first + PAGE, PAGE)
    guest.call("munmap", second - 16 * PAGE, PAGE)
    assert child.read(second - 16 * PAGE, 8) == b"written!"
    assert inode.number in guest.system.files.store.inodes
    child.close()
    assert inode.number not in guest.system.files.store.inodes
    assert guest.pool.free == free + 1


def test_a_program_that_is_removed_runs_on() -> None:
    """Its own file, as any that it has mapped."""
    guest = Guest()
    fd = guest.call("open", b"/file\0", os.O_CREAT | os.O_RDWR, 0o600)[0]
    guest.call("write", fd, b"x" * PAGE, PAGE)
    address = guest.call("mmap", 0, PAGE, 5, PRIVATE, fd, 0)[0]
    guest.call("close", fd)
    guest.call("unlink", b"/file\0")
    assert guest.thread.process.space.read(address, PAGE) == b"x" * PAGE
    guest.thread.process.space.close()
    assert list(guest.system.files.store.inodes) == [
        each for each in guest.system.files.store.inodes if guest.system.files.store.inodes[each].nlink]


class Launched:
    """Whose translations were dropped."""

    def __init__(self) -> None:
        self.forgotten: list[Space] = []

    def forget_space(self, space: Space) -> None:
        self.forgotten.append(space)
        space.take_stale()


def test_other_processes_lose_it_too() -> None:
    guest = Guest()
    launcher = guest.system.launcher = Launched()        # type: ignore[assignment]
    fd = guest.call("open", b"/file\0", os.O_CREAT | os.O_RDWR, 0o600)[0]
    guest.call("write", fd, b"x" * 3 * PAGE, 3 * PAGE)
    other = guest.fork(2)
    spaces = [guest.thread.process.space, other.process.space]
    addresses = [each.map(0, 3 * PAGE, 3, shared=True, backing=guest.thread.process.files.get(fd).inode)    # type: ignore[arg-type]
                 for each in spaces]
    for space, address in zip(spaces, addresses, strict=True):
        space.read(address, 3 * PAGE)
    guest.call("ftruncate", fd, PAGE, thread=guest.thread)
    for space, address in zip(spaces, addresses, strict=True):
        assert space.read(address, PAGE) == b"x" * PAGE
        with pytest.raises(SegmentationFault) as fault:
            space.read(address + PAGE, 1)
        assert fault.value.bus
    assert launcher.forgotten in ([], [spaces[1]])      # frames that nobody uses any more are cleared instead
