"""Trees of the host that a guest's file system is imported from, read when first asked for: a directory, a tar file.

Paths are relative to the tree, b"" for its root, and hold no symlink that would have to be followed. Nothing here
writes. Contents must stay as they are while a machine may still read them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

__all__ = ["Entry", "HostTree", "Source", "TarTree"]

NANOSECONDS = 10**9


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory, and what stat(2) would say. ``identity``: the same for all names of a file that has
    several, empty where it has one."""

    name: bytes
    mode: int
    size: int = 0
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    atime: int = 0
    mtime: int = 0
    ctime: int = 0
    identity: bytes = b""


class Source(Protocol):
    """A tree to import. Each raises OSError."""

    def list(self, path: bytes) -> list[Entry]: ...

    def read(self, path: bytes, offset: int, count: int) -> bytes:
        """Fewer bytes at the end only."""

    def readlink(self, path: bytes) -> bytes: ...


# --- a directory ---------------------------------------------------------------------------------------------------

_OPENAT2 = 437                                      # x86-64
_NO_MAGICLINKS, _BENEATH = 0x02, 0x08               # uapi/linux/openat2.h
_TRIES = 16                                         # while somebody renames directories: EAGAIN

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _How(ctypes.Structure):
    """struct open_how."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class HostTree:
    """A directory of the host, and nothing that lies outside it: the kernel refuses to resolve a path that leaves it,
    whatever was renamed or linked there meanwhile. Holds one descriptor, of the directory. Each call raises OSError."""

    def __init__(self, root: str | bytes | os.PathLike[str]) -> None:
        """Raises OSError."""
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._root)

    def list(self, path: bytes) -> list[Entry]:
        found = []
        with self._opened(path, os.O_RDONLY | os.O_DIRECTORY) as directory:
            for name in os.listdir(directory):
                try:
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                except FileNotFoundError:
                    continue        # gone since
                several = status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)
                found.append(Entry(
                    os.fsencode(name), status.st_mode, status.st_size, status.st_uid, status.st_gid, status.st_rdev,
                    status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns,
                    b"%d:%d" % (status.st_dev, status.st_ino) if several else b""))
        return found

    def read(self, path: bytes, offset: int, count: int) -> bytes:
        with self._opened(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as file:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EIO, "")
            parts = []
            while count and (part := os.pread(file, count, offset)):
                parts.append(part)
                offset += len(part)
                count -= len(part)
        return b"".join(parts)

    def readlink(self, path: bytes) -> bytes:
        with self._opened(path, os.O_PATH) as link:
            return os.readlink(b"", dir_fd=link)

    @contextmanager
    def _opened(self, path: bytes, flags: int) -> Iterator[int]:
        """Raises OSError."""
        how = _How(flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _BENEATH | _NO_MAGICLINKS)
        for left in reversed(range(_TRIES)):
            file = _libc.syscall(ctypes.c_long(_OPENAT2), ctypes.c_int(self._root), ctypes.c_char_p(path or b"."),
                                 ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
            if file >= 0:
                break
            code = ctypes.get_errno()
            if code not in (errno.EAGAIN, errno.EINTR) or not left:
                raise OSError(code, "")
        try:
            yield file
        finally:
            os.close(file)


# --- a tar file ----------------------------------------------------------------------------------------------------

_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK,
}


class TarTree:
    """A tar file. Its members are looked up once; contents are read from it when asked for, so one that is compressed
    as a whole is slow to read in any order but its own. A member whose name leads outside is left out. Each call raises
    OSError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError and tarfile.TarError."""
        self._tar = tarfile.open(path, encoding="utf-8", errors="surrogateescape")      # noqa: SIM115 (close)
        self._members: dict[bytes, tarfile.TarInfo] = {}
        self._directories: dict[bytes, dict[bytes, Entry]] = {b"": {}}
        try:
            for member in self._tar:
                self._add(member)
        except BaseException:
            self._tar.close()
            raise

    def close(self) -> None:
        self._tar.close()

    def list(self, path: bytes) -> list[Entry]:
        try:
            return list(self._directories[path].values())
        except KeyError:
            raise OSError(errno.ENOENT, "") from None

    def read(self, path: bytes, offset: int, count: int) -> bytes:
        try:
            file = self._tar.extractfile(self._member(path))
            if file is None:
                raise OSError(errno.EIO, "")
            with file:
                file.seek(offset)
                return file.read(count)
        except (tarfile.TarError, EOFError):
            raise OSError(errno.EIO, "") from None

    def readlink(self, path: bytes) -> bytes:
        return _bytes(self._member(path).linkname)

    def _member(self, path: bytes) -> tarfile.TarInfo:
        """Raises OSError."""
        try:
            return self._members[path]
        except KeyError:
            raise OSError(errno.ENOENT, "") from None

    def _add(self, member: tarfile.TarInfo) -> None:
        path = _inside(member.name)
        if not path:
            return
        parent, _, name = path.rpartition(b"/")
        time = int(member.mtime * NANOSECONDS)
        entry = Entry(name, _KINDS.get(member.type, stat.S_IFREG) | member.mode & 0o7777, 0, member.uid, member.gid,
                      0, time, time, time)
        if member.islnk():
            first = _inside(member.linkname)
            target = self._directories.get(first.rpartition(b"/")[0], {}).get(first.rpartition(b"/")[2])
            if target is None or stat.S_ISDIR(target.mode):
                return          # a link to nothing
            target = replace(target, identity=target.identity or first)
            self._place(first, target)
            entry, member = replace(target, name=name), self._members[first]
        elif member.isdir():
            self._directories.setdefault(path, {})
        elif member.issym():
            entry = replace(entry, size=len(_bytes(member.linkname)))
        elif member.isdev():
            entry = replace(entry, rdev=0 if member.isfifo() else os.makedev(member.devmajor, member.devminor))
        elif member.isreg():
            entry = replace(entry, size=member.size)
        else:
            return
        self._make_directories(parent, time)
        if not member.isdir():
            self._forget(path)
        self._members[path] = member
        self._place(path, entry)

    def _place(self, path: bytes, entry: Entry) -> None:
        parent, _, name = path.rpartition(b"/")
        self._directories[parent][name] = entry

    def _make_directories(self, path: bytes, time: int) -> None:
        """Those that are no members of their own, or only later."""
        parent, _, name = path.rpartition(b"/")
        if path not in self._directories:
            self._make_directories(parent, time)
            self._directories[path] = {}
            self._place(path, Entry(name, stat.S_IFDIR | 0o755, atime=time, mtime=time, ctime=time))

    def _forget(self, path: bytes) -> None:
        """A directory of this name, and all beneath it: a later member has taken its place."""
        for each in self._directories.pop(path, {}):
            self._forget(path + b"/" + each)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _inside(name: str) -> bytes:
    """The path without what means nothing; empty where it leads outside, and for the root itself."""
    parts = [part for part in _bytes(name).split(b"/") if part not in (b"", b".")]
    return b"" if b".." in parts else b"/".join(parts)
