"""Open file descriptions: what a descriptor refers to, shared by dup(2) and fork(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from .contents import LARGEST, Regular
from .directories import Directory
from .inodes import Inode, Node, Store
from .locks import FOREVER, Lock

if TYPE_CHECKING:
    from .state import Loading, Saving

__all__ = ["FALLOC_KEEP_SIZE", "FALLOC_PUNCH_HOLE", "OpenFile"]

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2              # uapi/linux/falloc.h
#: What fallocate(2) can be asked for at all: also to collapse (8), zero (16), insert (32), unshare (64).
_FALLOC_MODES = (0, 1, 3, 8, 16, 17, 32, 64, 65)

#: Of open(2)'s flags, those that fcntl(2) can set.
_SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME | os.O_ASYNC

_MOST = 0x7FFF_F000                                     # bytes that one call reads or writes
_DIRENT = struct.Struct("<QqHB")                        # linux_dirent64 up to the name


class OpenFile:
    """``number``: its own, for locks. ``flags`` as fcntl(2) gives them. ``uses``: descriptors; it begins with one.
    Fifos, sockets and terminals are served by others; here they are EINVAL."""

    __slots__ = ("flags", "inode", "number", "position", "uses")

    #: What a link of /proc to it says, where its inode has no name.
    label = b""

    def __init__(self, inode: Inode, flags: int, number: int = 0) -> None:
        """``number``: 0 for a new one; then the inode is kept."""
        self.inode, self.flags = inode, flags
        if not number:
            number = inode.store.next_file
            inode.store.next_file += 1
            inode.keep()
        self.number = number
        self.position = 0
        self.uses = 1

    def keep(self) -> None:
        """One descriptor more."""
        self.uses += 1

    def let_go(self) -> None:
        """One descriptor less. Without any it is closed: its locks are gone."""
        self.uses -= 1
        if not self.uses:
            self.inode.locks.flock(self.number, fcntl.LOCK_UN)
            self.inode.locks.unlock(-self.number)
            self.inode.let_go()

    @property
    def path_only(self) -> bool:
        """O_PATH: for nothing but its place."""
        return bool(self.flags & os.O_PATH)

    @property
    def readable(self) -> bool:
        return not self.path_only and self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writable(self) -> bool:
        return not self.path_only and self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    def set_flags(self, flags: int) -> None:
        """F_SETFL. Raises OSError."""
        self._check(not self.path_only)
        self.flags = self.flags & ~_SETTABLE | flags & _SETTABLE

    # --- reading and writing ---------------------------------------------------------------------------------------

    def read(self, count: int) -> bytes:
        """read(2). Raises OSError."""
        self._check(self.readable)
        found = self._read(self.position, count)
        if isinstance(self.inode, Regular):
            self.position += len(found)
        return found

    def pread(self, count: int, offset: int) -> bytes:
        """pread(2). Raises OSError."""
        self._check_offset(offset)
        self._check(self.readable)
        self._check_seeks()
        return self._read(offset, count)

    def write(self, data: bytes | memoryview) -> int:
        """write(2): how many bytes were written. Raises OSError."""
        self._check(self.writable)
        offset, written = self._write(self.position, data)
        if isinstance(self.inode, Regular):
            self.position = offset + written
        return written

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        """pwrite(2): at the end, whatever the offset, where O_APPEND is set. Raises OSError."""
        self._check_offset(offset)
        self._check(self.writable)
        self._check_seeks()
        return self._write(offset, data)[1]

    def _read(self, offset: int, count: int) -> bytes:
        self._check_range(offset, count)
        if isinstance(self.inode, Directory):
            raise OSError(errno.EISDIR, "")
        count = min(count, _MOST)
        if isinstance(self.inode, Node):
            return self.inode.read(count)
        assert isinstance(self.inode, Regular)
        found = self.inode.read(offset, count)
        self._accessed()
        return found

    def _write(self, offset: int, data: bytes | memoryview) -> tuple[int, int]:
        """Where, and how many."""
        self._check_range(offset, len(data))
        if len(data) > _MOST:
            data = data[:_MOST]
        if isinstance(self.inode, Node):
            return offset, self.inode.write(len(data))
        assert isinstance(self.inode, Regular)
        if not data:
            return offset, 0
        if self.flags & os.O_APPEND:
            offset = self.inode.size
        if offset >= LARGEST:
            raise OSError(errno.EFBIG, "")
        self.inode.modified()           # in Linux too, also when there is no room
        return offset, self.inode.write(offset, data[:LARGEST - offset])

    def resize(self, size: int) -> None:
        """ftruncate(2). Raises OSError."""
        if size < 0:
            raise OSError(errno.EINVAL, "")
        self._check(not self.path_only)
        if not isinstance(self.inode, Regular) or not self.writable:
            raise OSError(errno.EINVAL, "")
        self.inode.resize(size)
        self.inode.modified()

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). Raises OSError."""
        self._check(not self.path_only)
        if offset < 0 or length <= 0:
            raise OSError(errno.EINVAL, "")
        if mode not in _FALLOC_MODES:
            raise OSError(errno.EOPNOTSUPP, "")
        self._check(self.writable)
        if not isinstance(self.inode, Regular):
            raise OSError(errno.ESPIPE if self.inode.kind == stat.S_IFIFO else errno.ENODEV, "")
        if offset + length > LARGEST:
            raise OSError(errno.EFBIG, "")
        if mode & ~(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE):
            raise OSError(errno.EOPNOTSUPP, "")
        if mode & FALLOC_PUNCH_HOLE:
            self.inode.punch(offset, offset + length)
        else:
            self.inode.allocate(offset, offset + length, grow=not mode)
        self.inode.modified()

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2): the new position. Raises OSError."""
        self._check(not self.path_only)
        self._check_seeks()
        if not 0 <= whence <= os.SEEK_HOLE:
            raise OSError(errno.EINVAL, "")
        inode = self.inode
        if isinstance(inode, Node):
            return self.position        # of devices, always the beginning
        if whence == os.SEEK_CUR:
            offset += self.position
        elif whence != os.SEEK_SET:
            if not isinstance(inode, Regular):
                raise OSError(errno.EINVAL, "")
            if whence == os.SEEK_END:
                offset += inode.size
            else:
                offset = inode.next_data(offset) if whence == os.SEEK_DATA else inode.next_hole(offset)
        if not 0 <= offset <= LARGEST:
            raise OSError(errno.EINVAL, "")
        self.position = offset
        return offset

    def _accessed(self) -> None:
        if not self.flags & os.O_NOATIME:
            self.inode.accessed()

    # --- directories -----------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[bytes, Inode, int]]:
        """(name, inode, position to go on from), from ``position`` on. Raises OSError."""
        self._check(not self.path_only)
        if not isinstance(self.inode, Directory):
            raise OSError(errno.ENOTDIR, "")
        if not self.inode.nlink:
            raise OSError(errno.ENOENT, "")
        for name, inode, at in self.inode.entries(self.position):
            yield name, inode, at + 1

    def getdents(self, room: int) -> bytes:
        """getdents64(2): as many entries as there is room for, none at the end. Raises OSError."""
        found: list[bytes] = []
        for name, inode, following in self.entries():
            length = -(-(_DIRENT.size + len(name) + 1) // 8) * 8
            if length > room:
                if not found:
                    raise OSError(errno.EINVAL, "")
                break
            room -= length
            head = _DIRENT.pack(inode.number, following, length, stat.S_IFMT(inode.mode) >> 12)
            found.append((head + name).ljust(length, b"\0"))
            self.position = following
        self._accessed()
        return b"".join(found)

    # --- locks -----------------------------------------------------------------------------------------------------

    def flock(self, operation: int) -> None:
        """flock(2). Raises Held, and OSError."""
        operation &= ~fcntl.LOCK_NB
        if operation not in (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN):
            raise OSError(errno.EINVAL, "")
        self._check(self.readable or self.writable or (operation == fcntl.LOCK_UN and not self.path_only))
        self.inode.locks.flock(self.number, operation)

    def lock(self, owner: int, kind: int, whence: int, start: int, length: int) -> None:
        """fcntl(2), F_SETLK (``owner``: the process) and F_OFD_SETLK (``owner``: minus ``number``). Raises Held, and
        OSError."""
        first, end = self._range(whence, start, length)
        if kind == fcntl.F_UNLCK:
            self.inode.locks.unlock(owner, first, end)
            return
        if kind not in (fcntl.F_RDLCK, fcntl.F_WRLCK):
            raise OSError(errno.EINVAL, "")
        self._check(self.readable if kind == fcntl.F_RDLCK else self.writable)
        self.inode.locks.lock(Lock(owner, kind == fcntl.F_WRLCK, first, end))

    def conflict(self, owner: int, kind: int, whence: int, start: int, length: int) -> Lock | None:
        """fcntl(2), F_GETLK and F_OFD_GETLK: what is in the way. Raises OSError."""
        first, end = self._range(whence, start, length)
        if kind not in (fcntl.F_RDLCK, fcntl.F_WRLCK):
            raise OSError(errno.EINVAL, "")
        return self.inode.locks.conflict(Lock(owner, kind == fcntl.F_WRLCK, first, end))

    def _range(self, whence: int, start: int, length: int) -> tuple[int, int]:
        """Of struct flock: first byte, end. Raises OSError."""
        self._check(not self.path_only)
        if whence == os.SEEK_CUR:
            start += self.position
        elif whence == os.SEEK_END:
            start += self.inode.size
        elif whence != os.SEEK_SET:
            raise OSError(errno.EINVAL, "")
        end = start + length if length else FOREVER
        if start > LARGEST or end > FOREVER:
            raise OSError(errno.EOVERFLOW, "")
        if length < 0:
            start, end = end, start
        if start < 0:
            raise OSError(errno.EINVAL, "")
        return start, end

    # --- checks ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _check(allowed: bool) -> None:
        """Raises OSError."""
        if not allowed:
            raise OSError(errno.EBADF, "")

    @staticmethod
    def _check_offset(offset: int) -> None:
        """Raises OSError."""
        if offset < 0:
            raise OSError(errno.EINVAL, "")

    @staticmethod
    def _check_range(offset: int, count: int) -> None:
        """Raises OSError."""
        if count < 0 or offset + count > LARGEST:
            raise OSError(errno.EINVAL, "")

    def _check_seeks(self) -> None:
        """Raises OSError."""
        if self.inode.kind in (stat.S_IFIFO, stat.S_IFSOCK) or (isinstance(self.inode, Node) and not self.inode.served):
            raise OSError(errno.ESPIPE, "")

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return {"inode": self.inode.number, "number": self.number, "flags": self.flags, "position": self.position,
                "uses": self.uses}

    def save_links(self, saving: Saving) -> dict[str, Any]:
        """What else it leads to."""
        return {}

    @classmethod
    def load(cls, store: Store, saved: dict[str, Any], inode: Inode | None = None) -> Self:
        """Of a file system that was saved at the same time. It keeps the inode already. ``inode``: one that is in no
        table."""
        found = cls.__new__(cls)
        found.restore(inode or store.inodes[saved["inode"]], saved)
        return found

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        """Of one that was made without more, all but what it leads to."""
        self.inode, self.flags, self.number = inode, saved["flags"], saved["number"]
        self.position, self.uses = saved["position"], saved["uses"]

    def link(self, loading: Loading, saved: dict[str, Any]) -> None:
        """The rest: all open files are there now."""
