"""Calls that have nearly the same answer for everybody, because what they are about is not there: extended attributes,
capabilities, memory policies; and old forms of others."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING

from ..contents import Regular
from ..space import PAGE
from ..vfs import UTIME_NOW
from .files import located, preadv, pwritev, readv, writev
from .registry import served, signed, signed32

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_AT_FDCWD = -100
_ASKED = 0xFFFF_FFFF                        # no personality, but the question for it
_SYNC_FLAGS = 7                             # SYNC_FILE_RANGE_*
#: _LINUX_CAPABILITY_VERSION_*, and how many bytes they have.
_CAPABILITIES = {0x1998_0330: 12, 0x2007_1026: 24, 0x2008_0522: 24}
_NEWEST = 0x2008_0522
_ALL_CAPABILITIES = (1 << 41) - 1


@served("getxattr", "lgetxattr", "setxattr", "lsetxattr", "removexattr", "lremovexattr")
def attribute(system: System, thread: Thread, path: int, *_: int) -> int:
    located(system, thread, _AT_FDCWD, path)
    raise OSError(errno.EOPNOTSUPP, "")


@served("fgetxattr", "fsetxattr", "fremovexattr")
def file_attribute(system: System, thread: Thread, fd: int, *_: int) -> int:
    thread.process.files.get(signed32(fd))
    raise OSError(errno.EOPNOTSUPP, "")


@served("listxattr", "llistxattr")
def attributes(system: System, thread: Thread, path: int, *_: int) -> int:
    located(system, thread, _AT_FDCWD, path)
    return 0


@served("flistxattr")
def file_attributes(system: System, thread: Thread, fd: int, *_: int) -> int:
    thread.process.files.get(signed32(fd))
    return 0


@served("sync_file_range")
def sync_file_range(system: System, thread: Thread, fd: int, offset: int, length: int, flags: int, *_: int) -> int:
    """Files are memory."""
    inode = thread.process.files.get(signed32(fd)).inode
    if flags & ~_SYNC_FLAGS or signed(offset) < 0 or signed(length) < 0 or offset + length >> 63:
        raise OSError(errno.EINVAL, "")
    if inode.kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK, stat.S_IFLNK):
        raise OSError(errno.ESPIPE, "")
    return 0


@served("readahead")
def readahead(system: System, thread: Thread, fd: int, *_: int) -> int:
    """All of it is in memory already."""
    file = thread.process.files.get(signed32(fd))
    if not file.readable:
        raise OSError(errno.EBADF, "")
    if file.inode.kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, "")
    return 0


@served("ioprio_set", "ioprio_get", "membarrier", "set_mempolicy", "mbind", "migrate_pages")
def nothing(system: System, thread: Thread, *_: int) -> int:
    """It is as it is: that is the usual answer (of membarrier(2), to MEMBARRIER_CMD_QUERY: there are none)."""
    return 0


@served("personality")
def personality(system: System, thread: Thread, wanted: int, *_: int) -> int:
    """What it was. It is kept for those who look (ADDR_NO_RANDOMIZE: addresses are never random)."""
    process, wanted = thread.process, wanted & _ASKED
    before = process.persona
    if wanted != _ASKED:
        process.persona = wanted
    return before


@served("capget")
def capget(system: System, thread: Thread, header: int, data: int, *_: int) -> int:
    """All that user 0 has."""
    version, pid = struct.unpack("<Ii", thread.process.space.read(header, 8))
    if version not in _CAPABILITIES:
        thread.process.space.write(header, struct.pack("<I", _NEWEST))
    if not data:            # asked for the version only
        return 0
    if version not in _CAPABILITIES or pid < 0:
        raise OSError(errno.EINVAL, "")
    if pid and pid not in system.processes:
        system.thread(pid)
    low, high = _ALL_CAPABILITIES & 0xFFFF_FFFF, _ALL_CAPABILITIES >> 32
    thread.process.space.write(data, struct.pack("<6I", low, low, 0, high, high, 0)[:_CAPABILITIES[version]])
    return 0


@served("capset")
def capset(system: System, thread: Thread, header: int, data: int, *_: int) -> int:
    """They stay as they are."""
    version, pid = struct.unpack("<Ii", thread.process.space.read(header, 8))
    if version not in _CAPABILITIES:
        thread.process.space.write(header, struct.pack("<I", _NEWEST))
        raise OSError(errno.EINVAL, "")
    if pid not in (0, thread.process.pid, thread.tid):
        raise OSError(errno.EPERM, "")
    thread.process.space.read(data, _CAPABILITIES[version])
    return 0


@served("mincore")
def mincore(system: System, thread: Thread, address: int, length: int, vector: int, *_: int) -> int:
    if address % PAGE:
        raise OSError(errno.EINVAL, "")
    space = thread.process.space
    space.write(vector, space.in_memory(address, length) if length else b"")
    return 0


# --- times of files ---------------------------------------------------------------------------------------------------


@served("utime")
def utime(system: System, thread: Thread, path: int, times: int, *_: int) -> int:
    pair = struct.unpack("<qq", thread.process.space.read(times, 16)) if times else None
    return _set_times(system, thread, _AT_FDCWD, path, None if pair is None else (pair[0], 0, pair[1], 0))


@served("utimes")
def utimes(system: System, thread: Thread, path: int, times: int, *_: int) -> int:
    return futimesat(system, thread, _AT_FDCWD, path, times)


@served("futimesat")
def futimesat(system: System, thread: Thread, fd: int, path: int, times: int, *_: int) -> int:
    four = struct.unpack("<4q", thread.process.space.read(times, 32)) if times else None
    return _set_times(system, thread, fd, path, four)


def _set_times(system: System, thread: Thread, fd: int, path: int, times: tuple[int, ...] | None) -> int:
    """Seconds and microseconds of each; None: now."""
    a, b, c, d = times or (0, 0, 0, 0)
    if not (0 <= b < 10**6 and 0 <= d < 10**6):
        raise OSError(errno.EINVAL, "")
    wanted = ((a, b * 1000), (c, d * 1000)) if times else ((0, UTIME_NOW), (0, UTIME_NOW))
    system.files.set_times(located(system, thread, fd, path), *wanted)
    return 0


# --- reading and writing in other forms -----------------------------------------------------------------------------


@served("preadv2")
def preadv2(system: System, thread: Thread, fd: int, vector: int, count: int, low: int, high: int, flags: int) -> int:
    if flags & ~0x1F:
        raise OSError(errno.EOPNOTSUPP, "")
    if signed(low) == -1:
        return readv(system, thread, fd, vector, count)
    return preadv(system, thread, fd, vector, count, low)


@served("pwritev2")
def pwritev2(system: System, thread: Thread, fd: int, vector: int, count: int, low: int, high: int, flags: int) -> int:
    if flags & ~0x1F:
        raise OSError(errno.EOPNOTSUPP, "")
    if signed(low) == -1:
        return writev(system, thread, fd, vector, count)
    return pwritev(system, thread, fd, vector, count, low)


@served("copy_file_range")
def copy_file_range(system: System, thread: Thread, source: int, source_at: int, target: int, target_at: int,
                    count: int, flags: int) -> int:
    """Of regular files."""
    files, space = thread.process.files, thread.process.space
    one, two = files.get(signed32(source)), files.get(signed32(target))
    if flags or not isinstance(one.inode, Regular) or not isinstance(two.inode, Regular):
        raise OSError(errno.EINVAL, "")
    if two.flags & os.O_APPEND:
        raise OSError(errno.EBADF, "")
    places = [struct.unpack("<q", space.read(at, 8))[0] if at else file.position
              for at, file in ((source_at, one), (target_at, two))]
    if one.inode is two.inode and abs(places[0] - places[1]) < count:
        raise OSError(errno.EINVAL, "")
    data = one.pread(min(count, 1 << 20), places[0])
    written = two.pwrite(data, places[1]) if data else 0
    for at, file, place in ((source_at, one, places[0]), (target_at, two, places[1])):
        if at:
            space.write(at, struct.pack("<q", place + written))
        else:
            file.position = place + written
    return written
