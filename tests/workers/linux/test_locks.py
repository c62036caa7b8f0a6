"""Locks on files against the host's kernel."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
from both import Ours, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.linux.contents import LARGEST
from workers.linux.locks import FOREVER, Held, Lock
from workers.linux.openfiles import OpenFile

FLOCK = struct.Struct("hhqqi4x")        # struct flock
SIZE = 50
FLAGS = (os.O_RDWR, os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY, os.O_PATH, os.O_ACCMODE)


@dataclass
class Both:
    """A file that is opened several times, here and there."""

    ours: Ours = field(default_factory=Ours)

    def __post_init__(self) -> None:
        self.fds = [os.memfd_create("test-locks")]
        os.ftruncate(self.fds[0], SIZE)
        self.fds += [os.open(f"/proc/self/fd/{self.fds[0]}", flags) for flags in FLAGS]
        os.close(self.fds.pop(0))
        fs = self.ours.fs
        self.files = [fs.open(fs.root, b"a", os.O_CREAT | os.O_RDWR, 0o644)]
        self.files[0].resize(SIZE)
        self.files += [fs.open(fs.root, b"a", flags) for flags in FLAGS]
        self.files.pop(0).let_go()

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def do(self, index: int, ours: Callable[[OpenFile], object], theirs: Callable[[int], object]) -> None:
        file, fd = self.files[index], self.fds[index]
        found, expected = outcome(lambda: ours(file)), outcome(lambda: theirs(fd))
        assert found == expected, (found, expected)

    def flock(self, index: int, operation: int) -> None:
        self.do(index, lambda file: file.flock(operation), lambda fd: fcntl.flock(fd, operation | fcntl.LOCK_NB))

    def seek(self, index: int, offset: int) -> None:
        self.do(index, lambda file: file.seek(offset, os.SEEK_SET), lambda fd: os.lseek(fd, offset, os.SEEK_SET))

    def set(self, index: int, *wanted: int) -> None:
        self.do(index, lambda file: file.lock(-file.number, *wanted),
                lambda fd: fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(*wanted, 0)) and None)

    def get(self, index: int, *wanted: int) -> None:
        def ours(file: OpenFile) -> tuple[int, int, int] | None:
            found = file.conflict(-file.number, *wanted)
            if found is None:
                return None
            return (fcntl.F_WRLCK if found.exclusive else fcntl.F_RDLCK, found.start,
                    0 if found.end == FOREVER else found.end - found.start)

        def theirs(fd: int) -> tuple[int, int, int] | None:
            kind, _, start, length, _ = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(*wanted, 0)))
            return None if kind == fcntl.F_UNLCK else (kind, start, length)

        self.do(index, ours, theirs)

    def reopen(self, index: int) -> None:
        """Which gives up what it had."""
        self.files[index].let_go()
        self.files[index] = self.ours.fs.open(self.ours.fs.root, b"a", FLAGS[index])
        old = self.fds[index]
        self.fds[index] = os.open(f"/proc/self/fd/{old}", FLAGS[index])
        os.close(old)

    def reload(self) -> None:
        self.files = self.ours.reload(self.files)


indices = st.sampled_from([*[0, 0, 1, 2] * 4, 3, 4, 5, 6])
starts = st.one_of(st.sampled_from([0, 10, 20]), st.sampled_from([0, 10, 20]), st.integers(0, 60),
                   st.sampled_from([-SIZE, -5, LARGEST, LARGEST - 5]))
lengths = st.one_of(st.sampled_from([10, 10, 20, 0]), st.sampled_from([10, 10, 20, 0]), st.integers(0, 20),
                    st.sampled_from([-3, -30, LARGEST, LARGEST - 30, -LARGEST]))
whences = st.sampled_from([*[os.SEEK_SET] * 12, os.SEEK_CUR, os.SEEK_END, 3])
locks = st.tuples(st.just("set"), indices, st.sampled_from([fcntl.F_WRLCK, fcntl.F_WRLCK, fcntl.F_RDLCK]), whences,
                  starts, lengths)
others = st.one_of(
    st.tuples(st.just("set"), indices, st.sampled_from([fcntl.F_UNLCK, fcntl.F_UNLCK, 77]), whences, starts, lengths),
    st.tuples(st.just("get"), indices, st.sampled_from([fcntl.F_WRLCK, fcntl.F_RDLCK, 77]), whences, starts, lengths),
    st.tuples(st.just("seek"), indices, st.integers(0, 60)), st.tuples(st.just("reopen"), indices),
    st.tuples(st.just("reload"))).map(tuple)
on_whole_files = st.one_of(
    st.tuples(st.just("flock"), indices, st.sampled_from([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN, 0, 3])),
    st.tuples(st.just("flock"), indices, st.sampled_from([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN, 0, 3])),
    st.tuples(st.just("reopen"), indices), st.tuples(st.just("reload")))

EXAMPLES = int(os.environ.get("EXAMPLES", "60"))
Actions = list[tuple[Any, ...]]


def check(actions: Actions) -> None:
    with closing(Both()) as both:
        for name, *arguments in actions:
            getattr(both, name)(*arguments)


@settings(max_examples=EXAMPLES)
@given(st.lists(on_whole_files, min_size=10, max_size=30))
def test_flocks_are_as_on_the_host(found: Actions) -> None:
    check(found)


@settings(max_examples=EXAMPLES)
@given(st.lists(st.one_of(locks, locks, others), min_size=15, max_size=40))
def test_locks_of_ranges_are_as_on_the_host(found: Actions) -> None:
    """And then all that there is to see of them."""
    check(found + [("get", index, fcntl.F_WRLCK, os.SEEK_SET, start, length)
                   for index in (0, 1, 2, 3) for start, length in ((0, 0), *((at, 5) for at in range(0, 70, 5)))])


@pytest.fixture
def files() -> list[OpenFile]:
    fs = Ours().fs
    return [fs.open(fs.root, b"a", os.O_CREAT | os.O_RDWR, 0o644) for _ in range(3)]


def refused(call: Callable[[], None]) -> Lock:
    with pytest.raises(Held) as found:
        call()
    return found.value.lock


def test_a_refusal_says_who_is_in_the_way(files: list[OpenFile]) -> None:
    one, other, third = files
    one.lock(100, fcntl.F_RDLCK, os.SEEK_SET, 10, 10)
    other.lock(200, fcntl.F_RDLCK, os.SEEK_SET, 15, 10)
    third.lock(-third.number, fcntl.F_WRLCK, os.SEEK_SET, 100, 0)
    wanted = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0)
    assert refused(lambda: one.lock(100, *wanted)) == one.conflict(100, *wanted) == Lock(200, False, 15, 25)
    assert refused(lambda: one.lock(200, *wanted)) == Lock(100, False, 10, 20)
    assert refused(lambda: one.lock(100, fcntl.F_RDLCK, os.SEEK_SET, 50, 0)).owner == -third.number
    one.flock(fcntl.LOCK_EX)
    assert refused(lambda: other.flock(fcntl.LOCK_SH)).owner == one.number


def test_a_process_s_locks_go_all_at_once(files: list[OpenFile]) -> None:
    """Whichever descriptor it closes; those of open files stay."""
    one, other, _ = files
    one.lock(100, fcntl.F_WRLCK, os.SEEK_SET, 0, 10)
    one.lock(100, fcntl.F_WRLCK, os.SEEK_SET, 20, 10)
    one.lock(-one.number, fcntl.F_RDLCK, os.SEEK_SET, 40, 10)
    other.inode.locks.unlock(100)
    assert other.conflict(200, fcntl.F_WRLCK, os.SEEK_SET, 0, 40) is None
    assert other.conflict(200, fcntl.F_WRLCK, os.SEEK_SET, 0, 41) == Lock(-one.number, False, 40, 50)
    one.let_go()
    assert other.conflict(200, fcntl.F_WRLCK, os.SEEK_SET, 0, 0) is None
