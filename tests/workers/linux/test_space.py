"""Address spaces against the host's kernel: the same calls in the same order, then the same mappings, rights, contents
and errors; and of frames and tables what no program sees."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from system import FIRST, System

from workers.linux.space import PAGE, Mapping, SegmentationFault
from workers.linux.tables import FRAME, PRESENT, WRITE

#: Where nothing of this process is, nor will be.
BASE = 0x10_0000_0000
PAGES = 24
FILE_PAGES = 6
MAP_FIXED, MAP_PRIVATE, MAP_SHARED, MAP_ANONYMOUS = 0x10, 2, 1, 0x20
MAYMOVE, FIXED, DONTNEED = 1, 2, 4

libc = ctypes.CDLL(None, use_errno=True)
for name, result, arguments in (
        ("mmap", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]),
        ("munmap", ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t]),
        ("mprotect", ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]),
        ("madvise", ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]),
        ("mremap", ctypes.c_void_p,
         [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p])):
    getattr(libc, name).restype, getattr(libc, name).argtypes = result, arguments


CONTENTS = b"".join(bytes([65 + page]) * PAGE for page in range(FILE_PAGES))


class Both:
    """Each call here and in the host's kernel."""

    def __init__(self) -> None:
        self.system = System(frames=4 * PAGES)
        self.space = self.system.space
        self.file = self.system.file(CONTENTS)
        self.fd = os.memfd_create("test-space")
        os.write(self.fd, CONTENTS)
        self.memory = os.open("/proc/self/mem", os.O_RDWR)

    def close(self) -> None:
        libc.munmap(BASE, 2 * PAGES * PAGE)
        os.close(self.fd)
        os.close(self.memory)

    def do(self, ours: Callable[[], int | None], theirs: Callable[[], int | None]) -> None:
        assert outcome(ours) == outcome(theirs, native=True)

    def map(self, page: int, count: int, prot: int, kind: str, offset: int) -> None:
        address = BASE + page * PAGE
        backing = self.file if kind != "anonymous" else None
        flags = MAP_FIXED | (MAP_SHARED if kind == "shared" else MAP_PRIVATE) | (0 if backing else MAP_ANONYMOUS)
        self.do(lambda: self.space.map(address, count * PAGE, prot, fixed=True, shared=kind == "shared",
                                       backing=backing, offset=offset if backing else 0),
                lambda: libc.mmap(address, count * PAGE, prot, flags, self.fd if backing else -1,
                                  offset * PAGE if backing else 0))

    def unmap(self, page: int, count: int) -> None:
        self.do(lambda: self.space.unmap(BASE + page * PAGE, count * PAGE),
                lambda: libc.munmap(BASE + page * PAGE, count * PAGE))

    def protect(self, page: int, count: int, prot: int) -> None:
        self.do(lambda: self.space.protect(BASE + page * PAGE, count * PAGE, prot),
                lambda: libc.mprotect(BASE + page * PAGE, count * PAGE, prot))

    def unneeded(self, page: int, count: int) -> None:
        self.do(lambda: self.space.advise_unneeded(BASE + page * PAGE, count * PAGE),
                lambda: libc.madvise(BASE + page * PAGE, count * PAGE, DONTNEED))

    def remap(self, page: int, old: int, new: int, to: int | None) -> None:
        found = self.space.find((BASE >> 12) + page)
        if to is not None and found is not None and found.end < (BASE >> 12) + page + min(old, new):
            return      # since Linux 6.17 that moves several mappings at once; before, and here, it is EFAULT
        address, target = BASE + page * PAGE, None if to is None else BASE + to * PAGE
        self.do(lambda: self.space.remap(address, old * PAGE, new * PAGE, may_move=to is not None, to=target),
                lambda: libc.mremap(address, old * PAGE, new * PAGE, 0 if to is None else MAYMOVE | FIXED, target or 0))

    def write(self, page: int, value: int) -> None:
        """Where the program may."""
        found = self.space.find((BASE >> 12) + page)
        data = value.to_bytes(4, "little")
        theirs: object = errno.EFAULT
        if found is not None and found.prot & 2:
            theirs = outcome(lambda: os.pwrite(self.memory, data, BASE + page * PAGE) and None)
        ours = touched(lambda: self.space.write(BASE + page * PAGE, data))
        assert ours == (None if theirs is None else "bus" if theirs == errno.EIO else "segv")

    def compare(self) -> None:
        assert joined(map(shown, self.space.mappings)) == joined(host_mappings())
        for page in range(2 * PAGES):
            found = self.space.find((BASE >> 12) + page)
            if found is not None and found.prot:
                theirs = outcome(functools.partial(os.pread, self.memory, PAGE, BASE + page * PAGE))
                ours = touched(functools.partial(self.space.read, BASE + page * PAGE, PAGE))
                assert ours == ("bus" if theirs == errno.EIO else theirs), page
        self.check()

    def check(self) -> None:
        """What no program sees: each frame in the tables has as many uses as entries, free ones are zero, nothing
        is writable that may not be, promises are counted."""
        space, pool, ram = self.space, self.system.pool, self.system.ram
        uses: dict[int, int] = dict.fromkeys(self.file.frames, 1)
        for each in space.mappings:
            for page in range(each.start, each.end):
                entry = self.system.page_tables.get(space.root, page)
                if entry:
                    uses[(entry & FRAME) >> 12] = uses.get((entry & FRAME) >> 12, 0) + 1
                    assert bool(entry & PRESENT) == bool(each.prot)
                    assert not entry & WRITE or each.prot & 2
                    assert not (entry & WRITE and not each.shared and (entry & FRAME) >> 12 in self.file.frames)
        assert {frame: count for frame, count in uses.items() if pool.uses(frame) != count} == {}
        assert pool.free == self.system.frames - len(uses)
        for frame in range(FIRST, FIRST + self.system.frames):
            assert frame in uses or not any(ram.of(frame)), frame
        assert space.promised == sum(each.end - each.start for each in space.mappings
                                     if each.prot & 2 and not each.shared)


def touched(call: Callable[[], object]) -> object:
    """What it gives, or the signal that the program gets."""
    try:
        return call()
    except SegmentationFault as fault:
        return "bus" if fault.bus else "segv"


def outcome(call: Callable[[], object], *, native: bool = False) -> object:
    """What it gives, or its errno."""
    try:
        result = call()
    except OSError as error:
        return error.errno
    if native and result in (-1, ctypes.c_void_p(-1).value):
        return ctypes.get_errno()
    return None if result == 0 else result


#: First address, the one behind the last, rights, shared.
Row = tuple[int, int, int, bool]


def shown(mapping: Mapping) -> Row:
    return mapping.start * PAGE, mapping.end * PAGE, mapping.prot, mapping.shared


def joined(rows: Iterable[Row]) -> list[Row]:
    """Neighbours alike are one: the kernel keeps some apart for its own accounts."""
    found: list[Row] = []
    for low, high, rights, shared in rows:
        if found and found[-1][1:] == (low, rights, shared):
            found[-1] = (found[-1][0], high, rights, shared)
        else:
            found.append((low, high, rights, shared))
    return found


def host_mappings() -> Iterator[Row]:
    """Of the window, as the kernel has them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high, rights, shared = re.match(r"(\w+)-(\w+) (...)([sp])", line).groups()     # type: ignore[union-attr]
        if BASE <= int(low, 16) < BASE + 2 * PAGES * PAGE:
            yield (int(low, 16), int(high, 16),
                   sum(bit for bit, letter in ((1, "r"), (2, "w"), (4, "x")) if letter in rights), shared == "s")


pages, counts = st.integers(0, PAGES - 1), st.integers(0, 8)
rights = st.sampled_from([0, 1, 3, 5, 7])
actions = st.one_of(
    st.tuples(st.just("map"), pages, counts, rights, st.sampled_from(["anonymous", "private", "shared"]),
              st.integers(0, 3)),
    st.tuples(st.just("unmap"), pages, counts), st.tuples(st.just("protect"), pages, counts, rights),
    st.tuples(st.just("unneeded"), pages, counts),
    st.tuples(st.just("remap"), pages, counts, counts, st.none() | st.integers(0, 2 * PAGES - 8)),
    st.tuples(st.just("write"), pages, st.integers(1, 2**32 - 1)))


@settings(max_examples=100, deadline=None)
@given(st.lists(actions, max_size=25))
def test_as_the_host_does(found: list[tuple]) -> None:
    with contextlib.closing(Both()) as both:
        for name, *arguments in found:
            getattr(both, name)(*arguments)
        both.compare()
