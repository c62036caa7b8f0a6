"""The file system against the host's kernel: the same calls in the same order, then the same results, errnos, times
that changed, and the same tree; and of frames what no program sees."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import pytest
from both import AT_EMPTY_PATH, AT_SYMLINK_FOLLOW, Both, Existing
from host import Host, host
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.linux.space import PAGE
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

EXAMPLES = int(os.environ.get("EXAMPLES", "100"))
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
