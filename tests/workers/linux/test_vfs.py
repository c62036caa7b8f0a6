"""The file system against the host's kernel: the same calls in the same order, then the same results, errnos, times
that changed, and the same tree; and of frames what no program sees."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import stat
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from both import AT_EMPTY_PATH, AT_SYMLINK_FOLLOW, PAGES, Both, Existing, Ours, host_getdents, outcome, parsed
from host import Host, host
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.linux.contents import LARGEST, Regular
from workers.linux.directories import Directory
from workers.linux.frames import NoFrames
from workers.linux.inodes import Inode
from workers.linux.space import PAGE, SegmentationFault, Space
from workers.linux.tables import Tables
from workers.linux.vfs import UTIME_NOW, UTIME_OMIT


@pytest.fixture(scope="module")
def kernel() -> Iterator[Host]:
    with host() as found:
        yield found


names = st.sampled_from([b"a", b"b", b"c"])
plain_paths = st.one_of(names, names, names, st.builds(lambda *found: b"/".join(found), names, names),
                        st.builds(lambda *found: b"/".join(found), names, names, names))
components = st.sampled_from([b"a", b"b", b"c", b"a", b"b", b"c", b".", b"..", b"x" * 255, b"x" * 256])
odd_paths = st.builds(lambda names, first, between, last: first + between.join(names) + last,
                      st.lists(components, max_size=3), st.sampled_from([b"", b"", b"/", b"//"]),
                      st.sampled_from([b"/", b"/", b"//"]), st.sampled_from([b"", b"", b"", b"/", b"/.", b"//"]))
existing = st.builds(Existing, st.integers(0, 15), st.sampled_from([*[b""] * 6, b"/a", b"/b", b"/c", b"/"]))
paths = st.one_of(plain_paths, plain_paths, odd_paths, existing, existing)
#: Longer ones take a block there.
targets = st.one_of(plain_paths, plain_paths, odd_paths).filter(lambda path: len(path) < 128)
numbers = st.integers(0, 9)
ats = st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
offsets = st.sampled_from([0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 5 * PAGE - 7, 6 * PAGE, 20 * PAGE, 1 << 40,
                           1 << 62, 2**63 - 1, -1])
# Not the very last: with data in a file's last page Linux's SEEK_HOLE overflows.
sizes = offsets.filter(lambda offset: offset != 2**63 - 1)
counts = st.sampled_from([0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 10 * PAGE + 5])
data = st.builds(lambda value, count: bytes([value]) * count, st.integers(1, 255), counts)
modes = st.sampled_from([0o644, 0o755, 0, 0o7777, 0o2775, 0o4711, 0o6644, 0o40755])
access = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, os.O_ACCMODE])
flags = st.builds(lambda one, others: one | sum(set(others)), access, st.lists(st.sampled_from([
    os.O_CREAT, os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW,
    os.O_TMPFILE & ~os.O_DIRECTORY, os.O_PATH, os.O_NONBLOCK, os.O_NOATIME]), max_size=3))
opened = st.one_of(flags, st.just(os.O_CREAT | os.O_RDWR),
                   st.sampled_from([os.O_CREAT | os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_TMPFILE, os.O_PATH]))
ids = st.sampled_from([-1, 0, 7])
moments = st.tuples(st.integers(-2, 10), st.sampled_from([0, 5, 10**9 - 1, 10**9, UTIME_NOW, UTIME_OMIT]))
nodes = st.sampled_from([(stat.S_IFREG | 0o640, 0), (0o600, 5), (stat.S_IFSOCK | 0o755, 0), (stat.S_IFDIR | 0o755, 0),
                         (stat.S_IFLNK | 0o777, 0), (stat.S_IFCHR | 0o4666, os.makedev(1, 3)),
                         (stat.S_IFCHR | 0o666, os.makedev(1, 5)), (stat.S_IFCHR | 0o666, os.makedev(1, 7)),
                         (stat.S_IFBLK | 0o600, os.makedev(200, 77))])
on_names = [
    st.tuples(st.just("open"), ats, paths, opened, modes),
    st.tuples(st.just("open"), ats, paths, opened, modes),
    st.tuples(st.just("mkdir"), ats, paths, modes),
    st.tuples(st.just("mkdir"), ats, paths, modes),
    st.builds(lambda at, path, node: ("mknod", at, path, *node), ats, paths, nodes),
    st.tuples(st.just("symlink"), targets, ats, paths), st.tuples(st.just("symlink"), targets, ats, paths),
    st.tuples(st.just("link"), ats, paths, ats, paths,
              st.sampled_from([0, 0, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH])),
    st.tuples(st.just("unlink"), ats, paths), st.tuples(st.just("rmdir"), ats, paths),
    st.tuples(st.just("rename"), ats, paths, ats, paths, st.sampled_from([0, 0, 0, 1, 2, 3])),
    st.tuples(st.just("rename"), ats, paths, ats, paths, st.sampled_from([0, 0, 0, 1, 2, 3])),
    st.tuples(st.just("rename"), ats, existing, ats, paths, st.sampled_from([0, 0, 0, 1, 2])),
    st.tuples(st.just("rmdir"), ats, existing),
    st.tuples(st.just("readlink"), ats, paths), st.tuples(st.just("readlink"), ats, existing),
    st.tuples(st.just("stat"), ats, paths, st.booleans()), st.tuples(st.just("fstat"), numbers),
    st.tuples(st.just("access"), ats, paths, st.sampled_from([0, 4, 2, 1, 7])),
    st.tuples(st.just("chmod"), ats, paths, modes),
    st.tuples(st.just("chown"), ats, paths, ids, ids, st.booleans()),
    st.tuples(st.just("set_times"), ats, paths, moments, moments, st.booleans()),
    st.tuples(st.just("truncate"), paths, sizes), st.tuples(st.just("list"), numbers)]
on_files = [
    st.tuples(st.just("read"), numbers, counts), st.tuples(st.just("pread"), numbers, counts, offsets),
    st.tuples(st.just("write"), numbers, data), st.tuples(st.just("write"), numbers, data),
    st.tuples(st.just("pwrite"), numbers, data, offsets),
    st.tuples(st.just("seek"), numbers, offsets, st.integers(-1, 5)),
    st.tuples(st.just("resize"), numbers, sizes),
    st.tuples(st.just("allocate"), numbers, st.sampled_from([0, 0, 1, 1, 3, 3, 2, 8, 9, 16, 17, 32, 64, 256]), offsets,
              offsets),
    st.tuples(st.just("set_flags"), numbers, flags), st.tuples(st.just("close_file"), numbers),
    st.tuples(st.just("reload"))]

#: To begin with something.
NAMES = [("mkdir", 0, b"a", 0o755), ("mkdir", 0, b"a/b", 0o700), ("open", 0, b"b", os.O_CREAT | os.O_RDWR, 0o644),
         ("write", 0, b"12345"), ("symlink", b"a", 0, b"c"), ("symlink", b"../b", 0, b"a/c"),
         ("open", 0, b"a", os.O_RDONLY, 0), ("link", 0, b"b", 0, b"a/a", 0), ("mkdir", 0, b"a/b/a", 0o755),
         ("mknod", 0, b"a/b/a/b", stat.S_IFREG, 0)]
FILES = [("open", 0, b"a", os.O_CREAT | os.O_RDWR, 0o644), ("open", 0, b"a", os.O_RDWR | os.O_APPEND, 0),
         ("open", 0, b"b", os.O_CREAT | os.O_RDWR, 0o644), ("open", 0, b"a", os.O_RDONLY, 0),
         ("pwrite", 0, b"12345", 2 * PAGE), ("unlink", 0, b"b")]

EXAMPLES = int(os.environ.get("EXAMPLES", "60"))
Actions = list[tuple[Any, ...]]


def check(kernel: Host, actions: Actions) -> None:
    with contextlib.closing(Both(kernel)) as both:
        both.run(actions)
        both.compare()
        both.remove_all()


@pytest.mark.root
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from([NAMES, []]),
       st.lists(st.one_of(*on_names, *on_names, *on_names, *on_files), min_size=20, max_size=50))
def test_names_are_as_on_the_host(kernel: Host, first: Actions, found: Actions) -> None:
    check(kernel, first + found)


@pytest.mark.root
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.one_of(*on_files), min_size=20, max_size=50))
def test_contents_are_as_on_the_host(kernel: Host, found: Actions) -> None:
    check(kernel, FILES + found)


# --- what sequences of calls seldom get to ---------------------------------------------------------------------------

@pytest.fixture
def both(kernel: Host) -> Iterator[Both]:
    """And in the end the trees are the same."""
    with contextlib.closing(Both(kernel)) as found:
        yield found
        found.compare()
        found.remove_all()


@pytest.mark.root
def test_how_long_paths_names_and_targets_may_be(both: Both) -> None:
    both.run([("mkdir", 0, b"a", 0o755), *(("stat", 0, path, True) for path in (
        b"a" + b"/." * 2047, b"a" + b"/." * 2047 + b"/", b"a/" + b"./" * 2046, b"./" * 2047 + b"a", b"./" * 2048 + b"a",
        b"", b"x" * 255, b"x" * 256, b"a/" + b"x" * 256, b"a/" + b"x" * 256 + b"/..", b"y/" + b"x" * 256))])
    both.run([("symlink", b"x" * 4096, 0, b"b"), ("symlink", b"x" * 4095, 0, b"/b"), ("symlink", b"", 0, b"c"),
              ("readlink", 0, b"b"), ("unlink", 0, b"b"), ("mkdir", 0, b"x" * 255, 0o755)])


@pytest.mark.root
def test_forty_symlinks_are_followed(both: Both) -> None:
    both.run([("mkdir", 0, b"0", 0o755), *(("symlink", b"%d" % at, 0, b"%d" % (at + 1)) for at in range(42))])
    both.run([("stat", 0, path, follow) for path in (b"40", b"41", b"42", b"40/.", b"41/.", b"40/", b"41/", b"20/../20",
                                                     b"20/../21", b"/20/../20/../1") for follow in (True, False)])
    both.run([("open", 0, path, flags, 0o644) for path in (b"40", b"41", b"41/")
              for flags in (os.O_RDONLY, os.O_RDONLY | os.O_NOFOLLOW, os.O_PATH | os.O_NOFOLLOW)])


@pytest.mark.root
def test_no_path_leaves_the_root(both: Both) -> None:
    both.run([("mkdir", 0, b"a", 0o755), ("symlink", b"/../../a", 0, b"b"), ("symlink", b"/", 0, b"a/c"),
              ("open", 0, b"..", os.O_RDONLY, 0), ("mkdir", 1, b"../../x", 0o700), ("stat", 1, b"../..", True),
              ("stat", 0, b"b/..", True), ("stat", 0, b"a/c/../../x", True)])


@pytest.mark.root
def test_dangling_symlinks_and_creation(both: Both) -> None:
    both.run([("mkdir", 0, b"a", 0o755), ("symlink", b"a/x", 0, b"b"), ("symlink", b"a/y/", 0, b"c"),
              ("symlink", b"a", 0, b"d"), ("symlink", b"/none/x", 0, b"e")])
    creating = os.O_CREAT | os.O_RDWR
    both.run([("open", 0, path, flags, 0o600)
              for path in (b"b", b"c", b"d", b"e", b"d/", b"d/.", b"d/z", b"b", b"/", b".")
              for flags in (creating | os.O_EXCL, creating | os.O_NOFOLLOW, creating, os.O_RDONLY | os.O_DIRECTORY,
                            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, os.O_RDONLY | os.O_TRUNC)])


@pytest.mark.root
def test_a_removed_directory(both: Both) -> None:
    """Its parent is still above it, and that one's, though they are removed as well."""
    both.run([("mkdir", 0, b"a", 0o755), ("mkdir", 0, b"a/b", 0o755), ("mkdir", 0, b"a/b/c", 0o755),
              ("open", 0, b"a/b/c", os.O_RDONLY, 0), ("open", 0, b"a/b", os.O_PATH, 0),
              ("rmdir", 0, b"a/b/c"), ("rmdir", 0, b"a/b"), ("rmdir", 0, b"a")])
    for _ in range(2):
        both.run([("fstat", 0), ("fstat", 1), ("list", 0), ("stat", 1, b"..", True), ("stat", 1, b"../..", True),
                  ("stat", 1, b"../../..", True), ("stat", 1, b".", True), ("stat", 1, b"x", True),
                  ("stat", 1, b"x" * 256, True), ("mkdir", 1, b"x", 0o755), ("open", 1, b"x", os.O_CREAT, 0o644),
                  ("mkdir", 1, b"../x", 0o755), ("rename", 0, b"/", 1, b"x", 0), ("chmod", 1, b".", 0o711),
                  ("open", 1, b".", os.O_RDWR | os.O_TMPFILE, 0o644), ("open", 1, b".", os.O_RDONLY, 0),
                  ("close_file", 3), ("close_file", 2), ("reload",)])
        assert len(both.fs.store.inodes) == 4
    both.run([("close_file", 1), ("fstat", 0), ("close_file", 0)])
    assert len(both.fs.store.inodes) == 1


@pytest.mark.root
def test_files_without_a_name(both: Both) -> None:
    unnamed = os.O_RDWR | os.O_TMPFILE
    both.run([("open", 0, b"/", unnamed, 0o640), ("open", 0, b"/", unnamed | os.O_EXCL, 0o640), ("fstat", 0),
              ("write", 0, b"12"), ("link", 1, b"", 0, b"a", 0), ("reload",), ("link", 1, b"", 0, b"a", AT_EMPTY_PATH),
              ("link", 2, b"", 0, b"b", AT_EMPTY_PATH), ("reload",), ("link", 1, b"", 0, b"c", AT_EMPTY_PATH),
              ("unlink", 0, b"a"), ("unlink", 0, b"c"), ("link", 1, b"", 0, b"d", AT_EMPTY_PATH), ("fstat", 0),
              ("open", 0, b"e", unnamed, 0o640), ("open", 0, b"/", os.O_TMPFILE, 0o640),
              ("open", 0, b"/", unnamed | os.O_CREAT, 0o640)])


@pytest.mark.root
def test_a_group_is_inherited(both: Both) -> None:
    both.run([("mkdir", 0, b"a", 0o755), ("chown", 0, b"a", 0, 7, True), ("chmod", 0, b"a", 0o2775),
              ("mkdir", 0, b"a/a", 0o6755), ("mkdir", 0, b"a/a/a", 0o755), ("open", 0, b"a/b", os.O_CREAT, 0o6777),
              ("symlink", b"x", 0, b"a/c"), ("mknod", 0, b"a/d", stat.S_IFSOCK | 0o7777, 0),
              ("open", 0, b"a", os.O_RDWR | os.O_TMPFILE, 0o600), ("fstat", 0), ("fstat", 1)])


@pytest.mark.root
def test_a_new_owner_takes_rights_away(both: Both) -> None:
    both.run([("mknod", 0, b"a", stat.S_IFREG | 0o644, 0), ("mkdir", 0, b"b", 0o755), ("symlink", b"a", 0, b"c"),
              ("mknod", 0, b"d", stat.S_IFSOCK, 0)])
    for path, mode, ids in itertools.product((b"a", b"b", b"d"), (0o6755, 0o6745, 0o4644, 0o2710), ((1, 2), (-1, -1))):
        both.run([("chmod", 0, path, mode), ("chown", 0, path, *ids, True), ("stat", 0, path, True)])
    both.run([("chown", 0, b"c", 3, 4, False), ("stat", 0, b"c", False), ("stat", 0, b"c", True)])


@pytest.mark.root
def test_the_largest_file(both: Both) -> None:
    both.run([("open", 0, b"a", os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644), ("resize", 0, LARGEST), ("fstat", 0),
              ("write", 0, b"1"), ("write", 0, b""), ("pwrite", 0, b"1", 0), ("seek", 0, 0, os.SEEK_END),
              ("seek", 0, 1, os.SEEK_CUR), ("seek", 0, 1, os.SEEK_END), ("write", 0, b"1"), ("read", 0, 1),
              ("read", 0, 0), ("seek", 0, -1, os.SEEK_END), ("read", 0, 1), ("allocate", 0, 0, 1, LARGEST),
              ("allocate", 0, 1, LARGEST, 1), ("allocate", 0, 3, 0, LARGEST), ("seek", 0, 0, os.SEEK_HOLE),
              ("seek", 0, 0, os.SEEK_DATA), ("resize", 0, LARGEST - 1), ("write", 0, b"12"), ("fstat", 0),
              ("resize", 0, 0)])


@pytest.mark.root
def test_what_is_allocated_is_data_when_it_is_allocated_again(both: Both) -> None:
    both.run([("open", 0, b"a", os.O_CREAT | os.O_RDWR, 0o644), ("allocate", 0, 0, 0, 2 * PAGE),
              ("seek", 0, 0, os.SEEK_DATA), ("fstat", 0), ("allocate", 0, 1, PAGE, 2 * PAGE),
              ("seek", 0, 0, os.SEEK_DATA), ("seek", 0, PAGE, os.SEEK_HOLE), ("fstat", 0), ("write", 0, b"1"),
              ("seek", 0, 0, os.SEEK_DATA), ("resize", 0, 2 * PAGE), ("fstat", 0)])


@pytest.mark.root
def test_devices(both: Both) -> None:
    for name, minor in ((b"null", 3), (b"zero", 5), (b"full", 7), (b"nothing", 99)):
        both.run([("mknod", 0, name, stat.S_IFCHR | 0o666, os.makedev(1, minor)), ("stat", 0, name, True),
                  ("open", 0, name, os.O_RDWR | os.O_TRUNC, 0), ("read", 0, 10), ("write", 0, b"abc"),
                  ("write", 0, b""), ("pread", 0, 10, 5), ("pwrite", 0, b"abc", 5), ("seek", 0, 7, os.SEEK_SET),
                  ("seek", 0, 0, os.SEEK_CUR), ("resize", 0, 5), ("allocate", 0, 0, 0, 5), ("allocate", 0, 3, 0, 5),
                  ("list", 0), ("fstat", 0), ("truncate", name, 3), ("open", 0, name, os.O_DIRECTORY, 0),
                  ("close_file", 0)])
    both.run([("mknod", 0, b"socket", stat.S_IFSOCK | 0o666, 0), ("open", 0, b"socket", os.O_RDWR, 0),
              ("open", 0, b"socket", os.O_PATH, 0), ("close_file", 0), ("truncate", b"socket", 0),
              ("mknod", 0, b"disk", stat.S_IFBLK | 0o600, os.makedev(250, 1000)), ("open", 0, b"disk", os.O_RDONLY, 0)])


def test_random_bytes_are_those_of_the_generator() -> None:
    ours = Ours()
    fs = ours.fs
    fs.mknod(fs.root, b"random", stat.S_IFCHR | 0o666, os.makedev(1, 8))
    fs.mknod(fs.root, b"urandom", stat.S_IFCHR | 0o666, os.makedev(1, 9))
    expected = random.Random(1)
    for name in (b"random", b"urandom"):
        file = fs.open(fs.root, name, os.O_RDWR)
        assert file.read(5) == expected.randbytes(5)
        assert file.write(b"12345") == 5
        assert file.pread(5, 0) == expected.randbytes(5)


def test_what_others_serve_is_opened_here() -> None:
    fs = Ours().fs
    for name, mode, device in ((b"fifo", stat.S_IFIFO, 0), (b"tty", stat.S_IFCHR, os.makedev(5, 0)),
                               (b"console", stat.S_IFCHR, os.makedev(5, 1))):
        fs.mknod(fs.root, name, mode | 0o600, device)
        file = fs.open(fs.root, name, os.O_RDWR)
        assert (file.inode.kind, file.inode.rdev) == (mode, device)
        for call, found in ((functools.partial(file.read, 1), "Invalid argument"),
                            (functools.partial(file.write, b"1"), "Invalid argument"),
                            (functools.partial(file.seek, 0, 0), "Illegal seek"),
                            (functools.partial(file.pread, 1, 0), "Illegal seek")):
            assert outcome(call) == found


@pytest.mark.root
@pytest.mark.parametrize("moment", [1, 10**10])
def test_reading_is_noted_as_with_relatime(both: Both, moment: int) -> None:
    """Where the last time was before the last change, or not."""
    both.run([("open", 0, b"file", os.O_CREAT | os.O_RDWR, 0o644), ("open", 0, b"file", os.O_RDWR | os.O_NOATIME, 0),
              ("write", 0, b"12345"), ("symlink", b"file", 0, b"link"), ("mkdir", 0, b"directory", 0o755),
              ("mkdir", 0, b"directory/a", 0o755), ("open", 0, b"directory", os.O_RDONLY, 0),
              ("symlink", b"directory", 0, b"way"), ("open", 0, b"directory", os.O_RDONLY | os.O_NOATIME, 0)])
    names = [b"file", b"link", b"directory", b"way"]

    def noted() -> list[bool]:
        ours = [both.fs.find(both.fs.root, name, follow=False).atime for name in names]
        theirs = both.host.do(lambda: [os.lstat(name).st_atime_ns for name in names])
        found = [each != moment * 10**9 for each in ours]
        assert found == [each != moment * 10**9 for each in theirs], (action, arguments)
        return found

    seen = []
    actions: Actions = [
        ("pread", 0, 5, 0), ("pread", 0, 0, 0), ("pread", 0, 5, 100), ("pread", 1, 5, 0), ("pwrite", 0, b"1", 0),
        ("pwrite", 1, b"1", 0), ("resize", 0, 3), ("readlink", 0, b"link"), ("stat", 0, b"link", False),
        ("stat", 0, b"link", True), ("open", 0, b"link", os.O_RDONLY, 0), ("list", 2), ("list", 3),
        ("stat", 0, b"way/a", True), ("chmod", 0, b"file", 0o600), ("truncate", b"link", 2),
        ("stat", 0, b"directory/a", True), ("open", 0, b"directory", os.O_RDONLY, 0)]
    for action, *arguments in actions:
        for name in names:
            both.set_times(0, name, (moment, 0), (0, UTIME_OMIT), False)
        getattr(both, action)(*arguments)
        seen.append(noted())
    assert any(map(any, seen)) == (moment == 1)


def test_reading_is_noted_once_a_day() -> None:
    ours = Ours()
    fs = ours.fs
    file = fs.open(fs.root, b"a", os.O_CREAT | os.O_RDONLY, 0o644)
    assert [file.read(1), file.read(1)] == [b"", b""]
    first = file.inode.atime
    assert first > file.inode.ctime
    for hours, noted in ((23, False), (25, True)):
        ours.ticks = itertools.count(first + hours * 3600 * 10**9)
        file.read(1)
        assert (file.inode.atime != first) == noted


@pytest.mark.root
def test_the_path_of_a_directory(both: Both) -> None:
    both.run([("mkdir", 0, b"a", 0o755), ("mkdir", 0, b"a/b", 0o755), ("mkdir", 0, b"c", 0o755)])

    def path(found: Inode) -> bytes:
        assert isinstance(found, Directory)
        return both.fs.path_of(found)

    def host_path(where: bytes) -> bytes:
        os.chdir(where)
        try:
            return os.getcwdb()
        finally:
            os.chdir(b"/")

    for where in (b"/", b"a", b"a/b", b"c/../a/b/.."):
        assert path(both.fs.find(both.fs.root, where)) == both.host.do(functools.partial(host_path, where))
    moved = both.fs.find(both.fs.root, b"a/b")
    both.run([("rename", 0, b"a", 0, b"c/d", 0)])
    assert path(moved) == b"/c/d/b"
    moved.keep()
    both.run([("rmdir", 0, b"c/d/b")])
    assert outcome(lambda: path(moved)) == "No such file or directory"
    moved.let_go()


@pytest.mark.root
def test_the_file_system_s_state(both: Both) -> None:
    both.run([("open", 0, b"a", os.O_CREAT | os.O_RDWR, 0o644), ("write", 0, b"1" * 5 * PAGE)])
    found, theirs = both.fs.statfs(), both.host.do(lambda: os.statvfs("/"))
    assert (found.bsize, found.blocks, found.bfree, found.bavail, found.namelen) == (
        theirs.f_bsize, theirs.f_blocks, theirs.f_bfree, theirs.f_bavail, theirs.f_namemax)


# --- directories that change while they are read ----------------------------------------------------------------------

@pytest.mark.parametrize("by_seek", [False, True])
@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "rename", "replace", "read", "reload"]), st.integers(0, 30),
                          st.integers(0, 30)), max_size=60), st.integers(25, 200))
def test_every_entry_that_stays_is_given_once(by_seek: bool, actions: list[tuple[str, int, int]], room: int) -> None:
    """``by_seek``: each time by another open file, from where the last one ended."""
    ours = Ours()
    names = [b"%d" % number for number in range(30)]
    for name in names[::2]:
        ours.fs.mknod(ours.fs.root, name, 0o644)
    file = ours.fs.open(ours.fs.root, b"/", os.O_RDONLY)
    stays = {*names[::2], b".", b".."}
    given_names: list[bytes] = []

    def read() -> bool:
        nonlocal file
        entries = list(parsed(file.getdents(room)))
        given_names.extend(name for name, _, _ in entries)
        if by_seek and entries:
            file.let_go()
            file = ours.fs.open(ours.fs.root, b"/", os.O_RDONLY)
            file.seek(entries[-1][2], os.SEEK_SET)
        return bool(entries)

    for what, one, other in actions:
        root = ours.fs.root
        old, new = names[one % 30], names[other % 30]
        if what == "read":
            read()
        elif what == "reload":
            (file,) = ours.reload([file])
        elif what == "add" and root.find(old) is None:
            ours.fs.mknod(root, old, 0o644)
        elif what == "remove" and root.find(old) is not None:
            ours.fs.unlink(root, old)
            stays.discard(old)
        elif what in ("rename", "replace") and root.find(old) is not None and old != new \
                and (root.find(new) is None) == (what == "rename"):
            ours.fs.rename(root, old, root, new)
            stays.discard(old)
    while read():
        pass
    assert {name: given_names.count(name) for name in stays} == dict.fromkeys(stays, 1)


@pytest.mark.root
def test_there_must_be_room_for_an_entry(both: Both) -> None:
    both.run([("mknod", 0, b"x" * 200, 0o644, 0), ("open", 0, b"/", os.O_RDONLY, 0)])
    file, fd = both.files[0]
    rooms = (0, 23, 24, 23, 24, 223, 224, 500, 500)

    def lengths(getdents: Callable[[int], bytes]) -> list[object]:
        return [outcome(lambda room=room: len(getdents(room))) for room in rooms]      # type: ignore[misc]

    assert lengths(file.getdents) == both.host.do(lambda: lengths(lambda room: host_getdents(fd, room)))


# --- memory -----------------------------------------------------------------------------------------------------------

def test_when_the_memory_is_used_up_nothing_is_half_done() -> None:
    ours = Ours(4)
    fs = ours.fs
    file = fs.open(fs.root, b"a", os.O_CREAT | os.O_RDWR, 0o644)
    other = fs.open(fs.root, b"b", os.O_CREAT | os.O_RDWR, 0o644)
    assert file.write(b"1" * (3 * PAGE - 1)) == 3 * PAGE - 1
    assert other.write(b"2" * 3 * PAGE) == PAGE                     # as write(2) does: what there is room for
    assert outcome(lambda: other.write(b"2")) == "No space left on device"
    assert (other.inode.size, other.position) == (PAGE, PAGE)
    assert outcome(lambda: other.pwrite(b"2", 10 * PAGE)) == "No space left on device"
    assert outcome(lambda: file.allocate(0, 0, 5 * PAGE)) == "No space left on device"
    assert (file.inode.size, file.inode.blocks, ours.frames.free) == (3 * PAGE - 1, 3, 0)
    file.resize(5 * PAGE)
    assert isinstance(file.inode, Regular)
    with pytest.raises(NoFrames):
        file.inode.frame(4)
    assert file.pwrite(b"3" * PAGE, 2 * PAGE) == PAGE               # needs none
    ours.check()
    fs.unlink(fs.root, b"b")
    assert ours.frames.free == 0
    other.let_go()
    assert ours.frames.free == 1
    assert file.inode.frame(4) != file.inode.frame(0)
    ours.check()


def test_a_file_is_mapped_by_its_frames() -> None:
    ours = Ours()
    fs = ours.fs
    file = fs.open(fs.root, b"a", os.O_CREAT | os.O_RDWR, 0o644)
    inode = file.inode
    assert isinstance(inode, Regular)
    file.pwrite(b"end", 2 * PAGE)
    hole, last = inode.frame(1), inode.frame(2)
    assert (bytes(ours.ram.of(hole)), bytes(ours.ram.of(last)[:4])) == (bytes(PAGE), b"end\0")
    assert inode.frame(1) == hole
    for page in (-1, 3):
        with pytest.raises(IndexError):
            inode.frame(page)
    ours.ram.write(hole, 5, b"by a program")
    assert file.pread(12, PAGE + 5) == b"by a program"
    file.pwrite(b"by a call", PAGE)
    assert ours.ram.of(hole)[:9] == b"by a call"
    assert file.seek(0, os.SEEK_DATA) == PAGE
    ours.ram.write(last, 3, b"behind the end")
    file.pwrite(b"!", 2 * PAGE + 10)
    assert file.pread(20, 2 * PAGE) == b"end" + bytes(7) + b"!"
    ours.check()


def test_mappings_are_told_what_a_file_has_lost() -> None:
    ours = Ours()
    fs = ours.fs
    file = fs.open(fs.root, b"a", os.O_CREAT | os.O_RDWR, 0o644)
    inode = file.inode
    assert isinstance(inode, Regular)
    file.write(b"1" * 6 * PAGE)
    file.resize(5 * PAGE)
    assert fs.take_cut() == []
    inode.keep_mapped()
    frames = [inode.frame(page) for page in range(5)]
    for frame in frames:
        ours.frames.share(frame)
    file.allocate(3, PAGE, PAGE)
    file.resize(3 * PAGE + 1)
    assert [(each.inode, each.first) for each in fs.take_cut()] == [(inode, 1), (inode, 4)]
    assert fs.take_cut() == []
    assert [ours.frames.uses(frame) for frame in frames] == [2, 1, 2, 2, 1]
    assert ours.ram.of(frames[1]) == b"1" * PAGE            # the mapping's, until that lets go
    assert ours.ram.of(frames[3]) == b"1" + bytes(PAGE - 1)
    (file,) = ours.reload([file])
    assert isinstance(file.inode, Regular)
    assert (file.inode.mapped, file.inode.uses) == (1, 2)
    unused = ours.frames.drop(frames)
    ours.ram.clear(unused)
    ours.frames.give(unused)
    ours.check()
    ours.fs.unlink(ours.fs.root, b"a")
    file.let_go()
    assert ours.frames.free == PAGES - 3
    file.inode.let_go()
    assert ours.frames.free == PAGES
    ours.check()


def test_a_description_is_closed_with_its_last_descriptor() -> None:
    ours = Ours()
    file = ours.fs.open(ours.fs.root, b"a", os.O_CREAT | os.O_RDWR, 0o644)
    ours.fs.unlink(ours.fs.root, b"a")
    file.write(b"1")
    file.keep()
    (file,) = ours.reload([file])
    file.let_go()
    assert file.pread(5, 0) == b"1"
    file.let_go()
    assert ours.frames.free == PAGES
    assert list(ours.fs.store.inodes.values()) == [ours.fs.root]


def test_a_program_maps_a_file() -> None:
    ours = Ours()
    tables = Tables(memoryview(array("Q", bytes(64 * PAGE))), 1 << 40)
    space = Space(ours.ram, ours.frames, tables, 1 << 40)
    file = ours.fs.open(ours.fs.root, b"a", os.O_CREAT | os.O_RDWR, 0o644)
    inode = file.inode
    assert isinstance(inode, Regular)
    file.resize(2 * PAGE + 5)
    shared = space.map(0, 4 * PAGE, 3, shared=True, backing=inode)
    private = space.map(0, PAGE, 3, backing=inode, offset=2)
    space.write(shared + PAGE, b"from the program")
    assert file.pread(20, PAGE) == b"from the program" + bytes(4)
    file.pwrite(b"12345", 2 * PAGE)
    assert space.read(private, 6) == space.read(shared + 2 * PAGE, 6) == b"12345\0"
    space.write(private, b"x")
    assert file.pread(5, 2 * PAGE) == b"12345"
    with pytest.raises(SegmentationFault) as fault:
        space.read(shared + 3 * PAGE, 1)
    assert fault.value.bus
    file.resize(PAGE)
    for cut in ours.fs.take_cut():
        assert cut.inode is inode
        space.lose(inode, cut.first, cut.end, cut.frames)
    with pytest.raises(SegmentationFault):
        space.read(shared + PAGE, 1)
    file.resize(2 * PAGE)
    assert space.read(shared + PAGE, 5) == bytes(5)
    space.close()
    assert not inode.mapped
    ours.check()
