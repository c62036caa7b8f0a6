"""A file system here and one of the host's: each call is made in both, and the results are compared."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import os
import random
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from host import Host, call
from system import FIRST, Ram

from workers.linux.contents import Regular
from workers.linux.directories import Directory
from workers.linux.frames import Frames
from workers.linux.inodes import Inode, Symlink
from workers.linux.openfiles import OpenFile
from workers.linux.space import PAGE
from workers.linux.vfs import UTIME_OMIT, FileSystem

__all__ = ["AT_EMPTY_PATH", "AT_SYMLINK_FOLLOW", "PAGES", "Both", "Existing", "Ours", "contents", "host_getdents",
           "outcome", "parsed", "tick", "tree"]

PAGES = 24      # of memory, there and here

RENAMEAT2, FALLOCATE, UTIMENSAT, LINKAT, FACCESSAT, GETDENTS = 316, 285, 280, 265, 269, 217     # x86-64
CLOCK_REALTIME_COARSE = 5
AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = -100, 0x100, 0x400, 0x1000

#: By path: inode, times.
Marks = dict[bytes, tuple[int, int, int]]


@dataclass(frozen=True)
class Existing:
    """The path of a file that there is, and something behind it."""

    number: int
    rest: bytes


class Ours:
    """A file system, and everything beneath it."""

    def __init__(self, pages: int = PAGES) -> None:
        self.ram = Ram()
        self.pages = pages
        self.frames = Frames(FIRST, pages)
        self.ticks = itertools.count(10**18)
        self.random = random.Random(1)
        self.fs = FileSystem(self.ram, self.frames, clock=self.clock, random=self.random.randbytes, blocks=pages)

    def clock(self) -> int:
        return next(self.ticks)

    def reload(self, files: list[OpenFile]) -> list[OpenFile]:
        """All of it becomes data, and the data a file system."""
        saved = msgspec.msgpack.decode(msgspec.msgpack.encode([self.fs.save(), [file.save() for file in files]]))
        sources = self.fs.store.sources
        self.fs = FileSystem.load(saved[0], self.ram, self.frames, clock=self.clock, random=self.random.randbytes)
        self.fs.store.sources = sources
        return [OpenFile.load(self.fs.store, each) for each in saved[1]]

    def check(self) -> None:
        """Each frame of a file is used once, by it alone; all others are free, and zero."""
        used = [frame for inode in self.fs.store.inodes.values() for frame in frames_of(inode)]
        assert len(used) == len(set(used))
        for frame in range(FIRST, FIRST + self.pages):
            assert self.frames.uses(frame) == (frame in used)
            assert frame in used or self.ram.of(frame) == bytes(PAGE)
        assert self.frames.free == self.pages - len(used)


def frames_of(inode: Inode) -> list[int]:
    return [*inode._frames.values(), *inode._reserved.values()] if isinstance(inode, Regular) else []


def outcome(what: Callable[[], object]) -> object:
    """What it gives, or its errno."""
    try:
        return what() or None
    except OSError as error:
        return os.strerror(error.errno or 0)


def spec(moment: tuple[int, int]) -> bytes:
    return struct.pack("<qq", *moment)


def tick() -> None:
    """What is changed from now on gets another time than what was before."""
    now = time.time_ns()
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= now:
        time.sleep(0.0002)


@functools.cache
def fine(host: Host) -> bool:
    """Each change gives a file another time than before, once that was looked at (multigrain timestamps)."""
    host.renew(PAGES)

    def probe() -> bool:
        os.mknod("/a")
        seen = [os.stat("/a").st_ctime_ns]
        for mode in range(200):
            os.chmod("/a", mode)
            seen.append(os.stat("/a").st_ctime_ns)
        return len(set(seen)) == len(seen)

    return host.do(probe)


#: They give a directory the time of the file, which need not be a new one for the directory.
COARSE = ("link", "unlink", "rmdir", "rename")


class Both:
    """Each call here and in the host's kernel."""

    def __init__(self, host: Host) -> None:
        self.host, self.fine = host, fine(host)
        self.ours = Ours()
        host.renew(PAGES)
        self.files: list[tuple[OpenFile, int]] = []
        self.before = self.marks()
        self.exact = True       # what is a hole

    def close(self) -> None:
        for _, fd in self.files:
            os.close(fd)

    @property
    def fs(self) -> FileSystem:
        return self.ours.fs

    def do(self, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        found, expected = outcome(ours), self.host.do(lambda: outcome(theirs))
        assert found == expected, (found, expected)

    def at(self, index: int) -> tuple[Inode, int]:
        """A directory to begin at, or what was hoped to be one."""
        index %= 1 + len(self.files)
        if not index:
            return self.fs.root, AT_FDCWD
        file, fd = self.files[index - 1]
        return file.inode, fd

    def run(self, actions: Iterable[tuple[Any, ...]]) -> None:
        for name, *arguments in actions:
            self.apply(name, *arguments)

    def apply(self, name: str, *arguments: Any) -> None:
        if not self.fine or name in COARSE:
            tick()
        paths = sorted(self.before[0])
        getattr(self, name)(*(paths[each.number % len(paths)] + each.rest if isinstance(each, Existing) else each
                              for each in arguments))
        marks = self.marks()
        found, expected = (changed(before, after) for before, after in zip(self.before, marks, strict=True))
        assert found == expected, (name, arguments, found, expected)
        self.before = marks

    # --- names -----------------------------------------------------------------------------------------------------

    def open(self, at: int, path: bytes, flags: int, mode: int) -> None:
        inode, fd = self.at(at)
        opened: list[Any] = []

        def ours() -> int:
            opened.append(self.fs.open(inode, path, flags, mode))
            return int(opened[0].flags)

        def theirs() -> int:
            opened.append(call(257, fd, path, flags | os.O_CLOEXEC, mode))
            return fcntl.fcntl(opened[-1], fcntl.F_GETFL)

        try:
            self.do(ours, theirs)
        except AssertionError:
            for each in opened:
                if isinstance(each, int):
                    os.close(each)
            raise
        if opened:
            self.files.append((opened[0], opened[1]))

    def mkdir(self, at: int, path: bytes, mode: int) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.mkdir(inode, path, mode), lambda: os.mkdir(path, mode, dir_fd=fd))

    def mknod(self, at: int, path: bytes, mode: int, device: int) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.mknod(inode, path, mode, device),
                lambda: os.mknod(path, mode, device, dir_fd=fd))

    def symlink(self, target: bytes, at: int, path: bytes) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.symlink(target, inode, path), lambda: os.symlink(target, path, dir_fd=fd))

    def link(self, old_at: int, old: bytes, at: int, path: bytes, flags: int) -> None:
        (old_inode, old_fd), (inode, fd) = self.at(old_at), self.at(at)
        self.do(lambda: self.fs.link(old_inode, old, inode, path, follow=bool(flags & AT_SYMLINK_FOLLOW),
                                     empty=bool(flags & AT_EMPTY_PATH)),
                lambda: call(LINKAT, old_fd, old, fd, path, flags))

    def unlink(self, at: int, path: bytes) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.unlink(inode, path), lambda: os.unlink(path, dir_fd=fd))

    def rmdir(self, at: int, path: bytes) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.rmdir(inode, path), lambda: os.rmdir(path, dir_fd=fd))

    def rename(self, old_at: int, old: bytes, at: int, path: bytes, flags: int) -> None:
        (old_inode, old_fd), (inode, fd) = self.at(old_at), self.at(at)
        self.do(lambda: self.fs.rename(old_inode, old, inode, path, flags),
                lambda: call(RENAMEAT2, old_fd, old, fd, path, flags))

    def readlink(self, at: int, path: bytes) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.readlink(self.fs.find(inode, path, follow=False)),
                lambda: os.readlink(path, dir_fd=fd))

    # --- what is known ---------------------------------------------------------------------------------------------

    def stat(self, at: int, path: bytes, follow: bool) -> None:
        inode, fd = self.at(at)
        self.do(lambda: ours_of(self.fs.find(inode, path, follow=follow)),
                lambda: theirs_of(os.stat(path, dir_fd=fd, follow_symlinks=follow)))

    def fstat(self, file: int) -> None:
        self.do_file(file, lambda found: ours_of(found.inode), lambda fd: theirs_of(os.fstat(fd)))

    def access(self, at: int, path: bytes, mode: int) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.access(self.fs.find(inode, path), mode),
                lambda: call(FACCESSAT, fd, path, mode))

    def chmod(self, at: int, path: bytes, mode: int) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.chmod(self.fs.find(inode, path), mode), lambda: os.chmod(path, mode, dir_fd=fd))

    def chown(self, at: int, path: bytes, uid: int, gid: int, follow: bool) -> None:
        inode, fd = self.at(at)
        self.do(lambda: self.fs.chown(self.fs.find(inode, path, follow=follow), uid, gid),
                lambda: os.chown(path, uid, gid, dir_fd=fd, follow_symlinks=follow))

    def set_times(self, at: int, path: bytes, atime: tuple[int, int], mtime: tuple[int, int], follow: bool) -> None:
        inode, fd = self.at(at)
        if atime[1] == mtime[1] == UTIME_OMIT:
            return
        self.do(lambda: self.fs.set_times(self.fs.find(inode, path, follow=follow), atime, mtime),
                lambda: call(UTIMENSAT, fd, path, spec(atime) + spec(mtime),
                             0 if follow else AT_SYMLINK_NOFOLLOW))

    def truncate(self, path: bytes, size: int) -> None:
        self.do(lambda: self.fs.truncate(self.fs.find(self.fs.root, path), size) if size >= 0 else os.truncate("", -1),
                lambda: os.truncate(path, size))

    # --- open files ------------------------------------------------------------------------------------------------

    def do_file(self, file: int, ours: Callable[[OpenFile], object], theirs: Callable[[int], object]) -> None:
        """With one of those that are open."""
        if self.files:
            found, fd = self.files[file % len(self.files)]
            self.do(lambda: ours(found), lambda: theirs(fd))

    def close_file(self, file: int) -> None:
        if self.files:
            found, fd = self.files.pop(file % len(self.files))
            found.let_go()
            os.close(fd)

    def read(self, file: int, count: int) -> None:
        self.do_file(file, lambda found: found.read(count), lambda fd: os.read(fd, count))

    def pread(self, file: int, count: int, offset: int) -> None:
        self.do_file(file, lambda found: found.pread(count, offset), lambda fd: os.pread(fd, count, offset))

    def write(self, file: int, data: bytes) -> None:
        self.do_file(file, lambda found: found.write(data), lambda fd: os.write(fd, data))

    def pwrite(self, file: int, data: bytes, offset: int) -> None:
        self.do_file(file, lambda found: found.pwrite(data, offset), lambda fd: os.pwrite(fd, data, offset))

    def seek(self, file: int, offset: int, whence: int) -> None:
        if self.files and isinstance(self.files[file % len(self.files)][0].inode, Directory):
            whence = os.SEEK_SET if whence == os.SEEK_CUR else whence       # positions of entries differ
        if self.exact or whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            self.do_file(file, lambda found: found.seek(offset, whence), lambda fd: os.lseek(fd, offset, whence))

    def resize(self, file: int, size: int) -> None:
        self.do_file(file, lambda found: found.resize(size), lambda fd: os.ftruncate(fd, size))

    def allocate(self, file: int, mode: int, offset: int, length: int) -> None:
        """Linux's may make data of what was allocated already, and then fail."""
        def ours(found: OpenFile) -> None:
            try:
                found.allocate(mode, offset, length)
            except OSError as error:
                self.exact &= error.errno != errno.ENOSPC
                raise

        self.do_file(file, ours, lambda fd: call(FALLOCATE, fd, mode, offset, length))

    def set_flags(self, file: int, flags: int) -> None:
        def ours(found: OpenFile) -> int:
            found.set_flags(flags)
            return found.flags

        self.do_file(file, ours, lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, flags) or fcntl.fcntl(fd, fcntl.F_GETFL))

    def list(self, file: int) -> None:
        """From the beginning."""
        def names(seek: Callable[[int, int], int], getdents: Callable[[int], bytes]) -> list[tuple[bytes, int]]:
            seek(0, os.SEEK_SET)
            return sorted((name, kind) for name, kind, _ in listed(getdents))

        self.do_file(file, lambda found: names(found.seek, found.getdents),
                     lambda fd: names(functools.partial(os.lseek, fd), functools.partial(host_getdents, fd)))

    def reload(self) -> None:
        files = self.ours.reload([file for file, _ in self.files])
        self.files = [(file, fd) for file, (_, fd) in zip(files, self.files, strict=True)]

    # --- all of it -------------------------------------------------------------------------------------------------

    def marks(self) -> tuple[Marks, Marks]:
        """When each file was changed, here and there."""
        ours = {path: (inode.number, inode.mtime, inode.ctime) for path, inode in tree(self.fs.root)}
        return ours, self.host.do(
            lambda: {path: (found.st_ino, found.st_mtime_ns, found.st_ctime_ns) for path, found in host_tree()})

    def compare(self) -> None:
        ours = {path: ours_of(inode) + contents(inode) for path, inode in tree(self.fs.root)}
        theirs = self.host.do(lambda: {path: theirs_of(found) + host_contents(path, found)
                                       for path, found in host_tree()})
        if not self.exact:
            ours, theirs = without_zeros(ours), without_zeros(theirs)
        assert ours == theirs, {path: (ours.get(path), theirs.get(path)) for path in ours.keys() | theirs.keys()
                                if ours.get(path) != theirs.get(path)}
        numbers = self.host.do(lambda: {path: found.st_ino for path, found in host_tree()})
        same = {(inode.number, numbers[path]) for path, inode in tree(self.fs.root)}
        assert len(same) == len({ours for ours, _ in same}) == len({theirs for _, theirs in same})
        self.ours.check()

    def remove_all(self) -> None:
        """Nothing remains, and nothing is lost."""
        for found, fd in self.files:
            found.let_go()
            os.close(fd)
        self.files = []
        for path, inode in sorted(tree(self.fs.root), reverse=True):
            if path != b"/":
                (self.fs.rmdir if isinstance(inode, Directory) else self.fs.unlink)(self.fs.root, path)
        assert list(self.fs.store.inodes.values()) == [self.fs.root]
        assert (self.fs.root.nlink, self.fs.root.uses) == (2, 1)
        assert self.ours.frames.free == PAGES
        self.ours.check()


def changed(before: Marks, after: Marks) -> dict[bytes, tuple[bool, bool]]:
    """Which times of which files; of new ones both."""
    old = {number: times for number, *times in before.values()}
    found = {path: (old.get(number, [0, 0])[0] != mtime, old.get(number, [0, 0])[1] != ctime)
             for path, (number, mtime, ctime) in after.items()}
    return {path: which for path, which in found.items() if any(which)}


def tree(root: Directory, path: bytes = b"/") -> Iterator[tuple[bytes, Inode]]:
    yield path, root
    for name, inode, position in root.entries():
        if position > 1:
            below = path.rstrip(b"/") + b"/" + name
            if isinstance(inode, Directory):
                yield from tree(inode, below)
            else:
                yield below, inode


def host_tree(path: bytes = b"/") -> Iterator[tuple[bytes, os.stat_result]]:
    found = os.lstat(path)
    yield path, found
    if stat.S_ISDIR(found.st_mode):
        for name in os.listdir(path):
            yield from host_tree(os.path.join(path, name))


def ours_of(inode: Inode) -> tuple[object, ...]:
    found = inode.stat()
    read = found.atime if isinstance(inode, Regular) else 0     # others are looked at by the test there
    return (oct(found.mode), found.nlink, found.uid, found.gid, found.rdev, found.size, found.blocks,
            known(read), known(found.mtime))


def theirs_of(found: os.stat_result) -> tuple[object, ...]:
    read = found.st_atime_ns if stat.S_ISREG(found.st_mode) else 0
    return (oct(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, found.st_size,
            found.st_blocks, known(read), known(found.st_mtime_ns))


def known(moment: int) -> int | None:
    """Where it was set, and not the clock's."""
    return moment if moment < 10**17 else None


def contents(inode: Inode) -> tuple[object, ...]:
    if isinstance(inode, Symlink):
        return (inode.target,)
    if not isinstance(inode, Regular):
        return ()
    file = OpenFile(inode, os.O_RDONLY | os.O_NOATIME)
    found = segments(lambda offset, whence: file.seek(offset, whence), lambda count, offset: file.pread(count, offset))
    file.let_go()
    return found


def host_contents(path: bytes, found: os.stat_result) -> tuple[object, ...]:
    if stat.S_ISLNK(found.st_mode):
        return (os.readlink(path),)
    if not stat.S_ISREG(found.st_mode):
        return ()
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        return segments(lambda offset, whence: os.lseek(fd, offset, whence),
                        lambda count, offset: os.pread(fd, count, offset))
    finally:
        os.close(fd)


def segments(seek: Callable[[int, int], int], read: Callable[[int, int], bytes]) -> tuple[object, ...]:
    """Data between holes."""
    found: list[object] = []
    end = 0
    with contextlib.suppress(OSError):
        while True:
            start = seek(end, os.SEEK_DATA)
            end = seek(start, os.SEEK_HOLE)
            assert start < end <= start + PAGES * PAGE
            found.append((start, read(end - start, start)))
    return tuple(found)


def without_zeros(files: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    """Pages of data that are zero might as well be holes."""
    def pages(found: object) -> list[object]:
        if not isinstance(found, tuple):
            return [found]
        start, data = found
        parts = [(start + at, data[at:at + PAGE]) for at in range(0, len(data), PAGE)]
        return [(at, part) for at, part in parts if any(part)]

    return {path: tuple(each for part in found for each in pages(part)) for path, found in files.items()}


def listed(getdents: Callable[[int], bytes]) -> Iterator[tuple[bytes, int, int]]:
    """To the end."""
    while data := getdents(300):
        yield from parsed(data)


def parsed(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, kind, position behind it)."""
    while data:
        _, position, length, kind = struct.unpack_from("<QqHB", data)
        yield data[19:length].partition(b"\0")[0], kind, position
        data = data[length:]


def host_getdents(fd: int, room: int) -> bytes:
    buffer = ctypes.create_string_buffer(room)
    count = call(GETDENTS, fd, buffer, room)
    return buffer.raw[:count]
