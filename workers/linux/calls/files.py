"""Files, directories, descriptors."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from ..channels import Channel
from ..contents import Regular
from ..directories import Directory
from ..inodes import Inode, Stat, Symlink
from ..locks import Held, Lock
from ..made import is_made
from ..openfiles import OpenFile
from ..paths import LONGEST_PATH
from ..pipes import PipeEnd
from ..space import PAGE, SegmentationFault
from ..vfs import UTIME_NOW, UTIME_OMIT
from .registry import Blocked, served, signed, signed32

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW, _AT_REMOVEDIR, _AT_SYMLINK_FOLLOW, _AT_EMPTY_PATH = 0x100, 0x200, 0x400, 0x1000    # linux/fcntl.h
_AT_EACCESS, _AT_NO_AUTOMOUNT, _AT_STATX_SYNC = 0x200, 0x800, 0x6000
_STAT_FLAGS = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_EMPTY_PATH | _AT_STATX_SYNC
_STATX_RESERVED = 1 << 31
_CLOSE_UNSHARE, _CLOSE_ON_EXEC = 2, 4   # CLOSE_RANGE_*
_COUNT_MAX = 0x7FFF_F000                # of bytes that one call moves (MAX_RW_COUNT)
_VECTORS_MAX = 1024                     # UIO_MAXIOV
_PART = 1 << 20                         # bytes that are moved at a time
_PIECE = 1 << 16                        # the same, to a channel
_ADVICES = 6                            # POSIX_FADV_*
_SECOND = 10**9
_STAT = struct.Struct("<QQQIIIIQqqqqqqqqq24x")
_STATX = struct.Struct("<IIQIIIHHQQQQ" + "qIi" * 4 + "IIII")
_STATX_BASIC, _STATX_BTIME = 0x7FF, 0x800
_STATFS = struct.Struct("<qqqqqqqiiqqq32x")

# --- where a path leads ------------------------------------------------------------------------------------------


def _directory(thread: Thread, fd: int) -> Inode:
    """Where a relative path begins."""
    number = signed32(fd)
    if number == _AT_FDCWD:
        return thread.process.directory
    return thread.process.files.get(number, path_only=True).inode


def _path(thread: Thread, address: int) -> bytes:
    return thread.process.space.text(address, LONGEST_PATH + 1)


def _check(flags: int, known: int) -> None:
    """Raises OSError."""
    if flags & 0xFFFF_FFFF & ~known:
        raise OSError(errno.EINVAL, "")


def located(system: System, thread: Thread, fd: int, path: int, flags: int = 0, *, follow: bool = True) -> Inode:
    text = b"" if flags & _AT_EMPTY_PATH and not path else _path(thread, path)
    at = thread.process.directory if text.startswith(b"/") else _directory(thread, fd)
    return system.files.find(at, text, follow=follow and not flags & _AT_SYMLINK_NOFOLLOW,
                             empty=bool(flags & _AT_EMPTY_PATH))


def _place(system: System, thread: Thread, fd: int, path: int) -> tuple[Inode, bytes]:
    text = _path(thread, path)
    return (thread.process.directory if text.startswith(b"/") else _directory(thread, fd)), text


# --- opening -----------------------------------------------------------------------------------------------------


def give_pair(thread: Thread, pair: tuple[OpenFile, OpenFile], address: int, *, close_on_exec: bool) -> None:
    """Two new files: their descriptors are written to that address. Neither is left where that fails. Raises
    OSError."""
    files, ends, numbers = thread.process.files, list(pair), list[int]()
    try:
        while ends:
            numbers.append(files.add(ends.pop(0), close_on_exec=close_on_exec))
        thread.process.space.write(address, struct.pack("<ii", *numbers))
    except Exception:
        for end in ends:
            end.let_go()
        for number in numbers:
            files.close(number)
        raise


@served("openat")
def openat(system: System, thread: Thread, fd: int, path: int, flags: int, mode: int, *_: int) -> int:
    file, thread.opening = thread.opening, None
    if file is None:
        at, text = _place(system, thread, fd, path)
        file = system.files.open(at, text, flags & 0xFFFF_FFFF, mode & 0o7777 & ~thread.process.mask)
    file = system.opened(file, thread)
    return thread.process.files.add(file, close_on_exec=bool(flags & os.O_CLOEXEC))


@served("open")
def open_(system: System, thread: Thread, path: int, flags: int, mode: int, *_: int) -> int:
    return openat(system, thread, _AT_FDCWD, path, flags, mode)


@served("creat")
def creat(system: System, thread: Thread, path: int, mode: int, *_: int) -> int:
    return openat(system, thread, _AT_FDCWD, path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)


@served("close")
def close(system: System, thread: Thread, fd: int, *_: int) -> int:
    files = thread.process.files
    inode = files.get(signed32(fd), path_only=True).inode
    files.close(signed32(fd))
    system.notify(inode)        # whoever waits for a lock
    return 0


@served("close_range")
def close_range(system: System, thread: Thread, first: int, last: int, flags: int, *_: int) -> int:
    first, last = first & 0xFFFF_FFFF, last & 0xFFFF_FFFF
    if first > last or flags & ~(_CLOSE_UNSHARE | _CLOSE_ON_EXEC):
        raise OSError(errno.EINVAL, "")
    if flags & _CLOSE_UNSHARE:
        system.unshare_files(thread.process)
    for number in thread.process.files:
        if first <= number <= last:
            if flags & _CLOSE_ON_EXEC:
                thread.process.files.descriptor(number).close_on_exec = True
            else:
                close(system, thread, number)
    return 0


@served("dup")
def dup(system: System, thread: Thread, fd: int, *_: int) -> int:
    return _duplicate(thread, fd)


def _duplicate(thread: Thread, fd: int, *, least: int = 0, close_on_exec: bool = False) -> int:
    files = thread.process.files
    file = files.get(signed32(fd), path_only=True)
    file.keep()
    return files.add(file, close_on_exec=close_on_exec, least=least)


@served("dup2")
def dup2(system: System, thread: Thread, fd: int, new: int, *_: int) -> int:
    if signed32(fd) == signed32(new):
        thread.process.files.get(signed32(fd), path_only=True)
        return signed32(new)
    return dup3(system, thread, fd, new, 0)


@served("dup3")
def dup3(system: System, thread: Thread, fd: int, new: int, flags: int, *_: int) -> int:
    if signed32(fd) == signed32(new) or flags & ~os.O_CLOEXEC:
        raise OSError(errno.EINVAL, "")
    files = thread.process.files
    file = files.get(signed32(fd), path_only=True)
    file.keep()
    files.put(signed32(new), file, close_on_exec=bool(flags & os.O_CLOEXEC))
    return signed32(new)


# --- reading and writing -----------------------------------------------------------------------------------------


def _take(system: System, thread: Thread, file: Channel, buffers: list[tuple[int, int]], offset: int | None) -> int:
    """What there is, once, into all buffers."""
    if offset is not None:
        raise OSError(errno.ESPIPE, "")
    if not file.readable:
        raise OSError(errno.EBADF, "")
    count = min(sum(size for _, size in buffers), _PART)
    if count < file.least:
        raise OSError(errno.EINVAL, "")
    if not count:
        return 0
    try:
        data = file.take(system, thread, count)
    except Blocked as blocked:
        block(system, thread, file, blocked, writing=False)
    scatter(thread, buffers, data)
    return len(data)


def _put(system: System, thread: Thread, file: Channel, buffers: list[tuple[int, int]]) -> int:
    """All of it, where the descriptor blocks: what has been written of a call that waits for room is kept in the
    thread, and not written again."""
    total = min(sum(size for _, size in buffers), _COUNT_MAX)
    while True:
        left = total - thread.done
        # With the part that is not whole pages, which a pipe looks at first.
        size = min(left, _PART if file.whole else _PIECE + left % PAGE)
        try:
            thread.done += file.put(system, thread, gather(thread, buffers, thread.done, size))
        except Blocked as blocked:
            try:
                block(system, thread, file, blocked, writing=True)
            except OSError:
                if not thread.done:
                    raise
                return thread.done
        except (OSError, SegmentationFault):
            if not thread.done:
                raise
            return thread.done
        if file.whole or thread.done >= total:
            return thread.done


def block(system: System, thread: Thread, file: OpenFile, blocked: Blocked, *, writing: bool,
          now: bool = False) -> NoReturn:
    """What becomes of it, as the descriptor has been told; ``now``: it does not wait. Raises OSError (EAGAIN), and
    Blocked."""
    if now or file.flags & os.O_NONBLOCK:
        raise OSError(errno.EAGAIN, "") from None
    patience = file.patience(writing=writing) if isinstance(file, Channel) else 0
    if not patience:
        raise blocked
    if thread.deadline is None:
        thread.deadline = system.monotonic() + patience
    if system.monotonic() >= thread.deadline:
        raise OSError(errno.EAGAIN, "") from None
    raise Blocked(thread.deadline, blocked.on) from None


def scatter(thread: Thread, buffers: list[tuple[int, int]], data: bytes, at: int = 0) -> None:
    """Into buffers (address, size), from byte ``at`` of them on, as far as it goes."""
    for address, size in buffers:
        if at < size and data:
            thread.process.space.write(address + at, data[:size - at])
            data = data[size - at:]
        at = max(0, at - size)


def gather(thread: Thread, buffers: list[tuple[int, int]], at: int, count: int) -> bytes:
    """Of what is in buffers (address, size), ``count`` bytes from ``at`` on."""
    parts = []
    for address, size in buffers:
        if at < size and count:
            part = min(size - at, count)
            parts.append(thread.process.space.read(address + at, part))
            count -= part
        at = max(0, at - size)
    return b"".join(parts)


def _into(system: System, thread: Thread, fd: int, buffers: list[tuple[int, int]], offset: int | None) -> int:
    """What a file gives, into buffers (address, size)."""
    file = thread.process.files.get(signed32(fd))
    if isinstance(file, Channel):
        return _take(system, thread, file, buffers, offset)
    done = 0
    for address, size in _parts(buffers):
        try:
            data = file.read(size) if offset is None else file.pread(size, offset + done)
        except OSError:
            if done:
                break
            raise
        try:
            thread.process.space.write(address, data)
        except SegmentationFault:
            if offset is None and isinstance(file.inode, Regular):
                file.position -= len(data)
            if done:
                break
            raise
        done += len(data)
        if len(data) < size:
            break
    else:
        if not buffers:
            file.read(0)
    return done


def _from(system: System, thread: Thread, fd: int, buffers: list[tuple[int, int]], offset: int | None) -> int:
    file = thread.process.files.get(signed32(fd))
    if isinstance(file, Channel) and offset is not None:
        raise OSError(errno.ESPIPE, "")
    if not file.writable:
        raise OSError(errno.EBADF, "")
    if isinstance(file, Channel):
        return _put(system, thread, file, buffers)
    done = 0
    for address, size in _parts(buffers):
        try:
            data = thread.process.space.read(address, size)
            written = file.write(data) if offset is None else file.pwrite(data, offset + done)
        except (OSError, SegmentationFault):
            if done:
                break
            raise
        done += written
        if written < size:
            break
    return done


def _parts(buffers: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    left = _COUNT_MAX
    for address, size in buffers:
        size = min(size, left)
        left -= size
        at = 0
        while True:
            part = min(size - at, _PART)
            yield address + at, part
            at += part
            if at >= size:
                break


def vectors(thread: Thread, address: int, count: int) -> list[tuple[int, int]]:
    count = signed32(count)
    if not 0 <= count <= _VECTORS_MAX:
        raise OSError(errno.EINVAL, "")
    found = list(struct.iter_unpack("<QQ", thread.process.space.read(address, 16 * count)))
    if any(size >> 63 for _, size in found):
        raise OSError(errno.EINVAL, "")
    return found


@served("read")
def read(system: System, thread: Thread, fd: int, address: int, count: int, *_: int) -> int:
    return _into(system, thread, fd, [(address, count)], None)


@served("readv")
def readv(system: System, thread: Thread, fd: int, address: int, count: int, *_: int) -> int:
    return _into(system, thread, fd, vectors(thread, address, count), None)


@served("pread64")
def pread64(system: System, thread: Thread, fd: int, address: int, count: int, offset: int, *_: int) -> int:
    return _into(system, thread, fd, [(address, count)], signed(offset))


@served("preadv")
def preadv(system: System, thread: Thread, fd: int, address: int, count: int, offset: int, *_: int) -> int:
    return _into(system, thread, fd, vectors(thread, address, count), signed(offset))


@served("write")
def write(system: System, thread: Thread, fd: int, address: int, count: int, *_: int) -> int:
    return _from(system, thread, fd, [(address, count)], None)


@served("writev")
def writev(system: System, thread: Thread, fd: int, address: int, count: int, *_: int) -> int:
    return _from(system, thread, fd, vectors(thread, address, count), None)


@served("pwrite64")
def pwrite64(system: System, thread: Thread, fd: int, address: int, count: int, offset: int, *_: int) -> int:
    return _from(system, thread, fd, [(address, count)], signed(offset))


@served("pwritev")
def pwritev(system: System, thread: Thread, fd: int, address: int, count: int, offset: int, *_: int) -> int:
    return _from(system, thread, fd, vectors(thread, address, count), signed(offset))


@served("sendfile")
def sendfile(system: System, thread: Thread, out: int, source: int, offset: int, count: int, *_: int) -> int:
    files = thread.process.files
    file = files.get(signed32(source))
    if not file.readable:
        raise OSError(errno.EBADF, "")
    at = file.position
    if offset:
        at, = struct.unpack("<q", thread.process.space.read(offset, 8))
        if isinstance(file, Channel):
            raise OSError(errno.ESPIPE, "")
        if at < 0:
            raise OSError(errno.EINVAL, "")
    target = files.get(signed32(out))
    if not target.writable:
        raise OSError(errno.EBADF, "")
    if not isinstance(file.inode, Regular) or target.flags & os.O_APPEND:
        raise OSError(errno.EINVAL, "")
    done, count = 0, min(count, _COUNT_MAX)
    while done < count and (data := file.pread(min(_PIECE, count - done), at + done)):
        try:
            done += target.put(system, thread, data) if isinstance(target, Channel) else target.write(data)
        except Blocked:
            if done:
                break
            if target.flags & os.O_NONBLOCK:
                raise OSError(errno.EAGAIN, "") from None
            raise
    if offset:
        thread.process.space.write(offset, struct.pack("<q", at + done))
    else:
        file.position = at + done
    return done


@served("lseek")
def lseek(system: System, thread: Thread, fd: int, offset: int, whence: int, *_: int) -> int:
    file = thread.process.files.get(signed32(fd))
    if isinstance(file, Channel):
        raise OSError(errno.ESPIPE, "")
    return file.seek(signed(offset), signed32(whence))


@served("fsync", "fdatasync")
def fsync(system: System, thread: Thread, fd: int, *_: int) -> int:
    """Files are memory."""
    inode = thread.process.files.get(signed32(fd)).inode
    if is_made(inode) or not isinstance(inode, (Regular, Directory)):
        raise OSError(errno.EINVAL, "")
    return 0


@served("syncfs")
def syncfs(system: System, thread: Thread, fd: int, *_: int) -> int:
    thread.process.files.get(signed32(fd))
    return 0


@served("sync")
def sync(system: System, thread: Thread, *_: int) -> int:
    return 0


@served("fadvise64")
def fadvise64(system: System, thread: Thread, fd: int, offset: int, length: int, advice: int, *_: int) -> int:
    """All of it is in memory already."""
    inode = thread.process.files.get(signed32(fd)).inode
    if inode.kind == stat.S_IFIFO:
        raise OSError(errno.ESPIPE, "")
    if signed(length) < 0 or signed32(advice) not in range(_ADVICES):
        raise OSError(errno.EINVAL, "")
    return 0


@served("ftruncate")
def ftruncate(system: System, thread: Thread, fd: int, size: int, *_: int) -> int:
    thread.process.files.get(signed32(fd)).resize(signed(size))
    return 0


@served("truncate")
def truncate(system: System, thread: Thread, path: int, size: int, *_: int) -> int:
    system.files.truncate(located(system, thread, _AT_FDCWD, path), signed(size))
    return 0


@served("fallocate")
def fallocate(system: System, thread: Thread, fd: int, mode: int, offset: int, length: int, *_: int) -> int:
    thread.process.files.get(signed32(fd)).allocate(signed32(mode), signed(offset), signed(length))
    return 0


# --- what is known about a file ----------------------------------------------------------------------------------


def _packed(found: Stat) -> bytes:
    return _STAT.pack(found.dev, found.ino, found.nlink, found.mode, found.uid, found.gid, 0, found.rdev, found.size,
                      found.blksize, found.blocks, *divmod(found.atime, _SECOND), *divmod(found.mtime, _SECOND),
                      *divmod(found.ctime, _SECOND))


@served("stat")
def stat_(system: System, thread: Thread, path: int, address: int, *_: int) -> int:
    return newfstatat(system, thread, _AT_FDCWD, path, address, 0)


@served("lstat")
def lstat(system: System, thread: Thread, path: int, address: int, *_: int) -> int:
    return newfstatat(system, thread, _AT_FDCWD, path, address, _AT_SYMLINK_NOFOLLOW)


@served("fstat")
def fstat(system: System, thread: Thread, fd: int, address: int, *_: int) -> int:
    file = thread.process.files.get(signed32(fd), path_only=True)
    thread.process.space.write(address, _packed(file.inode.stat()))
    return 0


@served("newfstatat")
def newfstatat(system: System, thread: Thread, fd: int, path: int, address: int, flags: int, *_: int) -> int:
    _check(flags, _STAT_FLAGS)
    thread.process.space.write(address, _packed(located(system, thread, fd, path, flags).stat()))
    return 0


@served("statx")
def statx(system: System, thread: Thread, fd: int, path: int, flags: int, mask: int, address: int, *_: int) -> int:
    _check(flags, _STAT_FLAGS)
    if mask & _STATX_RESERVED or flags & _AT_STATX_SYNC == _AT_STATX_SYNC:
        raise OSError(errno.EINVAL, "")
    found = located(system, thread, fd, path, flags).stat()
    times = [(*divmod(each, _SECOND), 0) for each in (found.atime, found.btime, found.ctime, found.mtime)]
    packed = _STATX.pack(_STATX_BASIC | _STATX_BTIME, found.blksize, 0, found.nlink, found.uid, found.gid, found.mode,
                         0, found.ino, found.size, found.blocks, 0, *[part for each in times for part in each],
                         os.major(found.rdev), os.minor(found.rdev), os.major(found.dev), os.minor(found.dev))
    thread.process.space.write(address, packed.ljust(256, b"\0"))
    return 0


@served("access")
def access(system: System, thread: Thread, path: int, mode: int, *_: int) -> int:
    return faccessat2(system, thread, _AT_FDCWD, path, mode, 0)


@served("faccessat")
def faccessat(system: System, thread: Thread, fd: int, path: int, mode: int, *_: int) -> int:
    return faccessat2(system, thread, fd, path, mode, 0)


@served("faccessat2")
def faccessat2(system: System, thread: Thread, fd: int, path: int, mode: int, flags: int, *_: int) -> int:
    _check(flags, _AT_SYMLINK_NOFOLLOW | _AT_EACCESS | _AT_EMPTY_PATH)
    _check(mode, os.R_OK | os.W_OK | os.X_OK)
    system.files.access(located(system, thread, fd, path, flags), signed32(mode))
    return 0


@served("statfs")
def statfs(system: System, thread: Thread, path: int, address: int, *_: int) -> int:
    return _statfs(system, thread, address, located(system, thread, _AT_FDCWD, path))


@served("fstatfs")
def fstatfs(system: System, thread: Thread, fd: int, address: int, *_: int) -> int:
    return _statfs(system, thread, address, thread.process.files.get(signed32(fd), path_only=True).inode)


def _statfs(system: System, thread: Thread, address: int, inode: Inode) -> int:
    found = system.files.statfs(inode)
    thread.process.space.write(address, _STATFS.pack(
        found.type, found.bsize, found.blocks, found.bfree, found.bavail, found.files, found.ffree, 0, 0,
        found.namelen, found.bsize, 0x20))
    return 0


@served("readlink")
def readlink(system: System, thread: Thread, path: int, address: int, size: int, *_: int) -> int:
    return readlinkat(system, thread, _AT_FDCWD, path, address, size)


@served("readlinkat")
def readlinkat(system: System, thread: Thread, fd: int, path: int, address: int, size: int, *_: int) -> int:
    if signed32(size) <= 0:
        raise OSError(errno.EINVAL, "")
    inode = located(system, thread, fd, path, _AT_EMPTY_PATH, follow=False)
    if not _path(thread, path) and not isinstance(inode, Symlink):
        raise OSError(errno.ENOENT, "")
    target = system.files.readlink(inode)[:signed32(size)]
    thread.process.space.write(address, target)
    return len(target)


@served("chmod")
def chmod(system: System, thread: Thread, path: int, mode: int, *_: int) -> int:
    return fchmodat(system, thread, _AT_FDCWD, path, mode)


@served("fchmodat")
def fchmodat(system: System, thread: Thread, fd: int, path: int, mode: int, *_: int) -> int:
    system.files.chmod(located(system, thread, fd, path), mode & 0o7777)
    return 0


@served("fchmod")
def fchmod(system: System, thread: Thread, fd: int, mode: int, *_: int) -> int:
    system.files.chmod(thread.process.files.get(signed32(fd)).inode, mode & 0o7777)
    return 0


def _id(number: int) -> int:
    """Of a user or a group; -1: as it is."""
    number &= 0xFFFF_FFFF
    return -1 if number == 0xFFFF_FFFF else number


@served("chown")
def chown(system: System, thread: Thread, path: int, uid: int, gid: int, *_: int) -> int:
    return fchownat(system, thread, _AT_FDCWD, path, uid, gid, 0)


@served("lchown")
def lchown(system: System, thread: Thread, path: int, uid: int, gid: int, *_: int) -> int:
    return fchownat(system, thread, _AT_FDCWD, path, uid, gid, _AT_SYMLINK_NOFOLLOW)


@served("fchown")
def fchown(system: System, thread: Thread, fd: int, uid: int, gid: int, *_: int) -> int:
    system.files.chown(thread.process.files.get(signed32(fd)).inode, _id(uid), _id(gid))
    return 0


@served("fchownat")
def fchownat(system: System, thread: Thread, fd: int, path: int, uid: int, gid: int, flags: int, *_: int) -> int:
    _check(flags, _AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH)
    system.files.chown(located(system, thread, fd, path, flags), _id(uid), _id(gid))
    return 0


@served("utimensat")
def utimensat(system: System, thread: Thread, fd: int, path: int, times: int, flags: int, *_: int) -> int:
    wanted = ((0, UTIME_NOW), (0, UTIME_NOW))
    if times:
        a, b, c, d = struct.unpack("<4q", thread.process.space.read(times, 32))
        wanted = ((a, b), (c, d))
        if b == d == UTIME_OMIT:        # the file is not even looked for
            return 0
    if path or signed32(fd) == _AT_FDCWD:
        _check(flags, _AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH)
        inode = located(system, thread, fd, path, flags)
    else:
        _check(flags, 0)
        inode = thread.process.files.get(signed32(fd)).inode
    system.files.set_times(inode, *wanted)
    return 0


# --- names -------------------------------------------------------------------------------------------------------


@served("getcwd")
def getcwd(system: System, thread: Thread, address: int, size: int, *_: int) -> int:
    path = system.files.path_of(thread.process.directory) + b"\0"
    if len(path) > size:
        raise OSError(errno.ERANGE, "")
    thread.process.space.write(address, path)
    return len(path)


@served("chdir")
def chdir(system: System, thread: Thread, path: int, *_: int) -> int:
    return _change_directory(thread, located(system, thread, _AT_FDCWD, path))


@served("fchdir")
def fchdir(system: System, thread: Thread, fd: int, *_: int) -> int:
    return _change_directory(thread, thread.process.files.get(signed32(fd), path_only=True).inode)


def _change_directory(thread: Thread, inode: Inode) -> int:
    if not isinstance(inode, Directory):
        raise OSError(errno.ENOTDIR, "")
    inode.keep()
    thread.process.directory.let_go()
    thread.process.directory = inode
    return 0


@served("getdents64")
def getdents64(system: System, thread: Thread, fd: int, address: int, size: int, *_: int) -> int:
    data = thread.process.files.get(signed32(fd)).getdents(size & 0xFFFF_FFFF)
    thread.process.space.write(address, data)
    return len(data)


@served("mkdir")
def mkdir(system: System, thread: Thread, path: int, mode: int, *_: int) -> int:
    return mkdirat(system, thread, _AT_FDCWD, path, mode)


@served("mkdirat")
def mkdirat(system: System, thread: Thread, fd: int, path: int, mode: int, *_: int) -> int:
    system.files.mkdir(*_place(system, thread, fd, path), mode & 0o7777 & ~thread.process.mask)
    return 0


@served("mknod")
def mknod(system: System, thread: Thread, path: int, mode: int, device: int, *_: int) -> int:
    return mknodat(system, thread, _AT_FDCWD, path, mode, device)


@served("mknodat")
def mknodat(system: System, thread: Thread, fd: int, path: int, mode: int, device: int, *_: int) -> int:
    system.files.mknod(*_place(system, thread, fd, path), mode & 0o177777 & ~thread.process.mask, device)
    return 0


@served("unlink")
def unlink(system: System, thread: Thread, path: int, *_: int) -> int:
    return unlinkat(system, thread, _AT_FDCWD, path, 0)


@served("rmdir")
def rmdir(system: System, thread: Thread, path: int, *_: int) -> int:
    return unlinkat(system, thread, _AT_FDCWD, path, _AT_REMOVEDIR)


@served("unlinkat")
def unlinkat(system: System, thread: Thread, fd: int, path: int, flags: int, *_: int) -> int:
    if flags & ~_AT_REMOVEDIR:
        raise OSError(errno.EINVAL, "")
    remove = system.files.rmdir if flags else system.files.unlink
    remove(*_place(system, thread, fd, path))
    return 0


@served("rename")
def rename(system: System, thread: Thread, old: int, new: int, *_: int) -> int:
    return renameat2(system, thread, _AT_FDCWD, old, _AT_FDCWD, new, 0)


@served("renameat")
def renameat(system: System, thread: Thread, old_fd: int, old: int, fd: int, new: int, *_: int) -> int:
    return renameat2(system, thread, old_fd, old, fd, new, 0)


@served("renameat2")
def renameat2(system: System, thread: Thread, old_fd: int, old: int, fd: int, new: int, flags: int, *_: int) -> int:
    system.files.rename(*_place(system, thread, old_fd, old), *_place(system, thread, fd, new), flags & 0xFFFF_FFFF)
    return 0


@served("link")
def link(system: System, thread: Thread, old: int, new: int, *_: int) -> int:
    return linkat(system, thread, _AT_FDCWD, old, _AT_FDCWD, new, 0)


@served("linkat")
def linkat(system: System, thread: Thread, old_fd: int, old: int, fd: int, new: int, flags: int, *_: int) -> int:
    _check(flags, _AT_SYMLINK_FOLLOW | _AT_EMPTY_PATH)
    system.files.link(*_place(system, thread, old_fd, old), *_place(system, thread, fd, new),
                      follow=bool(flags & _AT_SYMLINK_FOLLOW), empty=bool(flags & _AT_EMPTY_PATH))
    return 0


@served("symlink")
def symlink(system: System, thread: Thread, target: int, path: int, *_: int) -> int:
    return symlinkat(system, thread, target, _AT_FDCWD, path)


@served("symlinkat")
def symlinkat(system: System, thread: Thread, target: int, fd: int, path: int, *_: int) -> int:
    system.files.symlink(_path(thread, target), *_place(system, thread, fd, path))
    return 0


@served("umask")
def umask(system: System, thread: Thread, mask: int, *_: int) -> int:
    old, thread.process.mask = thread.process.mask, mask & 0o777
    return old


# --- descriptors and locks ---------------------------------------------------------------------------------------

_F = {"DUPFD": 0, "GETFD": 1, "SETFD": 2, "GETFL": 3, "SETFL": 4, "GETLK": 5, "SETLK": 6, "SETLKW": 7,
      "OFD_GETLK": 36, "OFD_SETLK": 37, "OFD_SETLKW": 38,
      "DUPFD_CLOEXEC": 1030, "SETPIPE_SZ": 1031, "GETPIPE_SZ": 1032}
_OF_PROCESSES, _OF_FILES = (
    {_F[prefix + name]: name for name in ("GETLK", "SETLK", "SETLKW")} for prefix in ("", "OFD_"))
_FLOCK = struct.Struct("<hh4xqqi4x")
_UNLOCK = 2


@served("fcntl")
def fcntl(system: System, thread: Thread, fd: int, command: int, argument: int, *_: int) -> int:
    files, number = thread.process.files, signed32(fd)
    file = files.get(number, path_only=command in (_F["DUPFD"], _F["DUPFD_CLOEXEC"], _F["GETFD"], _F["SETFD"],
                                                   _F["GETFL"]))
    if command in (_F["DUPFD"], _F["DUPFD_CLOEXEC"]):
        if not 0 <= signed32(argument) < files.limit:
            raise OSError(errno.EINVAL, "")
        return _duplicate(thread, fd, least=signed32(argument), close_on_exec=command == _F["DUPFD_CLOEXEC"])
    if command == _F["GETFD"]:
        return int(files.descriptor(number).close_on_exec)
    if command == _F["SETFD"]:
        files.descriptor(number).close_on_exec = bool(argument & 1)
        return 0
    if command == _F["GETFL"]:
        return file.flags
    if command == _F["SETFL"]:
        file.set_flags(argument & 0xFFFF_FFFF)
        return 0
    if command in _OF_PROCESSES:
        return _record_lock(system, thread, file, _OF_PROCESSES[command], argument, files.owner)
    if command in _OF_FILES:
        return _record_lock(system, thread, file, _OF_FILES[command], argument, -file.number)
    if command in (_F["SETPIPE_SZ"], _F["GETPIPE_SZ"]):
        if not isinstance(file, PipeEnd):
            raise OSError(errno.EBADF, "")
        return file.pipe.resize(argument & 0xFFFF_FFFF) if command == _F["SETPIPE_SZ"] else file.pipe.size
    raise OSError(errno.EINVAL, "")


def _record_lock(system: System, thread: Thread, file: OpenFile, command: str, address: int, owner: int) -> int:
    """``owner``: as a `Lock` has it."""
    space = thread.process.space
    kind, whence, start, length, pid = _FLOCK.unpack(space.read(address, _FLOCK.size))
    if owner < 0 and pid:
        raise OSError(errno.EINVAL, "")
    if command == "GETLK":
        held: Lock | None = file.conflict(owner, kind, whence, start, length)
        if held is None:
            space.write(address, struct.pack("<h", _UNLOCK))
        else:
            end = 0 if held.end >= 1 << 63 else held.end - held.start
            space.write(address, _FLOCK.pack(int(held.exclusive), os.SEEK_SET, held.start, end, max(held.owner, -1)))
        return 0
    try:
        file.lock(owner, kind, whence, start, length)
    except Held as held_up:
        if command != "SETLKW":
            raise
        if owner > 0 and system.would_wait_forever(owner, held_up.lock.owner):
            raise OSError(errno.EDEADLK, "") from None
        thread.lock_owner = held_up.lock.owner
        raise Blocked(on=(file.inode,)) from None
    system.notify(file.inode)
    return 0


@served("flock")
def flock(system: System, thread: Thread, fd: int, operation: int, *_: int) -> int:
    file = thread.process.files.get(signed32(fd))
    try:
        file.flock(signed32(operation))
    except OSError as error:
        if error.errno == errno.EAGAIN and not operation & 4:       # LOCK_NB
            raise Blocked(on=(file.inode,)) from None
        raise
    system.notify(file.inode)
    return 0


_FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x541B, 0x5421, 0x5450, 0x5451      # uapi/asm-generic/ioctls.h


@served("ioctl")
def ioctl(system: System, thread: Thread, fd: int, request: int, argument: int, *_: int) -> int:
    files, space, request = thread.process.files, thread.process.space, request & 0xFFFF_FFFF
    file = files.get(signed32(fd))
    if request in (_FIOCLEX, _FIONCLEX):
        files.descriptor(signed32(fd)).close_on_exec = request == _FIOCLEX
        return 0
    if request == _FIONBIO:
        file.set_flags(file.flags & ~os.O_NONBLOCK | (os.O_NONBLOCK if any(space.read(argument, 4)) else 0))
        return 0
    if isinstance(file, Channel):
        return file.control(system, thread, request, argument)
    if request == _FIONREAD and isinstance(file.inode, Regular):
        space.write(argument, struct.pack("<I", file.inode.size - file.position & 0xFFFF_FFFF))
        return 0
    raise OSError(errno.ENOTTY, "")
