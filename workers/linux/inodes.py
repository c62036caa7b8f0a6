"""What a file system consists of: inodes. What all kinds have in common, and the kinds without contents; contents.py
has regular files, directories.py directories."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .frames import Frames
from .locks import Locks
from .sources import NANOSECONDS, Entry, Source
from .space import PAGE, Memory

__all__ = ["Cut", "Inode", "Node", "Origin", "Stat", "Store", "Symlink", "origin_of", "read_source"]

#: Where something was imported from: the name of a source, the path there.
Origin = tuple[str, bytes]

_DAY = 24 * 3600 * NANOSECONDS


@dataclass(frozen=True, slots=True)
class Stat:
    """struct stat; times in nanoseconds. ``btime``: of creation, which statx(2) gives too."""

    dev: int
    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blksize: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    btime: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Pages that a file has lost, and the frames that they had. ``frames`` None: a mapping loses also what it has in
    their place, copies that a program has made by writing."""

    inode: Inode
    first: int
    end: int
    frames: frozenset[int] | None


@dataclass(eq=False)
class Store:
    """What the inodes of a file system share. ``clock``: nanoseconds since 1970. ``random``: so many random bytes."""

    memory: Memory
    frames: Frames
    clock: Callable[[], int]
    random: Callable[[int], bytes]
    device: int
    sources: dict[str, Source] = field(default_factory=dict)
    #: All that there are, by number.
    inodes: dict[int, Inode] = field(default_factory=dict)
    #: Those with several names in a source, by source and identity.
    imported: dict[tuple[str, bytes], int] = field(default_factory=dict)
    next_inode: int = 1
    next_file: int = 1
    #: What mapped files have lost: whoever maps them must unmap those pages.
    cut: list[Cut] = field(default_factory=list)

    def source(self, name: str) -> Source:
        """Raises OSError where it is not there (any more)."""
        try:
            return self.sources[name]
        except KeyError:
            raise OSError(errno.EIO, "") from None


class Inode:
    """``mode`` has the type too. ``uses``: open files, working directories, mappings, and removed directories in it;
    it lives while it has links or uses. ``place``: the directory and the name that it was given last, where it may not
    be any more."""

    __slots__ = ("atime", "btime", "ctime", "gid", "linkable", "locks", "mode", "mtime", "nlink", "number", "place",
                 "rdev", "store", "uid", "uses")

    def __init__(self, store: Store, mode: int, uid: int = 0, gid: int = 0, rdev: int = 0, *, number: int = 0) -> None:
        """``number``: 0 for a new one."""
        self.store, self.mode, self.uid, self.gid, self.rdev = store, mode, uid, gid, rdev
        if not number:
            number = store.next_inode
            store.next_inode += 1
        self.number = number
        store.inodes[number] = self
        self.nlink = 1
        self.uses = 0
        self.linkable = False           # although it has no links (O_TMPFILE)
        self.locks = Locks()
        self.place: tuple[Inode, bytes] | None = None
        self.atime = self.mtime = self.ctime = self.btime = store.clock()

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> int:
        """S_IFREG, S_IFDIR ..."""
        return stat.S_IFMT(self.mode)

    @property
    def size(self) -> int:
        """In bytes."""
        return 0

    @property
    def blocks(self) -> int:
        """Pages it takes."""
        return 0

    def stat(self) -> Stat:
        """Raises OSError where a directory cannot be read from its source."""
        size = self.size        # first: of a directory it needs its entries, as the number of links does
        return Stat(self.store.device, self.number, self.mode, self.nlink, self.uid, self.gid, self.rdev, size, PAGE,
                    self.blocks * (PAGE // 512), self.atime, self.mtime, self.ctime, self.btime)

    # --- time ------------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """What is known about it is not what it was."""
        self.ctime = self.store.clock()

    def modified(self) -> None:
        """What it contains is not what it was."""
        self.mtime = self.ctime = self.store.clock()

    def accessed(self) -> None:
        """As mounted with ``relatime``: once after each change, and once a day."""
        now = self.store.clock()
        if self.atime <= self.mtime or self.atime <= self.ctime or now - self.atime >= _DAY:
            self.atime = now

    # --- life ------------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """One use more."""
        self.uses += 1

    def let_go(self) -> None:
        """One use less. It is gone when that was the last and it has no links."""
        self.uses -= 1
        self.dispose_if_unused()

    def unlinked(self) -> None:
        """One link less."""
        self.nlink -= 1
        self.changed()
        self.dispose_if_unused()

    def dispose_if_unused(self) -> None:
        if not self.nlink and not self.uses:
            del self.store.inodes[self.number]
            self.dispose()

    def dispose(self) -> None:
        """Nobody can get at it any more: what it holds goes back."""

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return {"number": self.number, "mode": self.mode, "uid": self.uid, "gid": self.gid, "rdev": self.rdev,
                "nlink": self.nlink, "uses": self.uses, "linkable": self.linkable,
                "times": [part for each in (self.atime, self.mtime, self.ctime, self.btime)
                          for part in divmod(each, NANOSECONDS)],
                "locks": self.locks.save() if self.locks else None}

    def load(self, saved: dict[str, Any]) -> None:
        """All but what the constructor was given."""
        self.nlink, self.uses, self.linkable = saved["nlink"], saved["uses"], saved["linkable"]
        times = saved["times"]
        self.atime, self.mtime, self.ctime, self.btime = (
            seconds * NANOSECONDS + rest for seconds, rest in zip(times[::2], times[1::2], strict=True))
        self.locks = Locks(saved["locks"])

    def load_entry(self, entry: Entry, origin: Origin) -> None:
        """As it is in its source."""
        self.atime, self.mtime, self.ctime = entry.atime, entry.mtime, entry.ctime
        self.btime = min(entry.mtime, entry.ctime)


class Symlink(Inode):
    """``target`` is read from its source at first use."""

    __slots__ = ("_origin", "_size", "_target")

    def __init__(self, store: Store, mode: int, uid: int = 0, gid: int = 0, rdev: int = 0, *, target: bytes = b"",
                 number: int = 0) -> None:
        super().__init__(store, mode, uid, gid, number=number)
        self._target = target
        self._size = len(target)
        self._origin: Origin | None = None

    @property
    def size(self) -> int:
        return self._size

    @property
    def target(self) -> bytes:
        """Raises OSError."""
        if self._origin is not None:
            name, path = self._origin
            self._target = read_source(lambda: self.store.source(name).readlink(path))
            self._size = len(self._target)
            self._origin = None
        return self._target

    def leads(self) -> Inode | None:
        """What it leads to, where its target does not say that (made.py). Raises OSError."""
        return None

    def save(self) -> dict[str, Any]:
        return super().save() | {"target": self._target, "size": self._size,
                                 "origin": list(self._origin) if self._origin else None}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self._target, self._size = saved["target"], saved["size"]
        self._origin = origin_of(saved)

    def load_entry(self, entry: Entry, origin: Origin) -> None:
        super().load_entry(entry, origin)
        self._size, self._origin = entry.size, origin


class Node(Inode):
    """A fifo, a socket, a device: a name for something that is elsewhere. The devices served here:"""

    __slots__ = ()

    NULL, ZERO, FULL = os.makedev(1, 3), os.makedev(1, 5), os.makedev(1, 7)
    RANDOM = (os.makedev(1, 8), os.makedev(1, 9))
    #: tty and console: others serve them.
    TERMINALS = (os.makedev(5, 0), os.makedev(5, 1))

    @property
    def served(self) -> bool:
        """Here, not by others."""
        return stat.S_ISCHR(self.mode) and self.rdev in (self.NULL, self.ZERO, self.FULL, *self.RANDOM)

    def check_opens(self) -> None:
        """Raises OSError: there is nothing behind it."""
        if self.kind != stat.S_IFIFO and not self.served and not (
                stat.S_ISCHR(self.mode) and self.rdev in self.TERMINALS):
            raise OSError(errno.ENXIO, "")

    def read(self, count: int) -> bytes:
        """Raises OSError where others serve it."""
        if not self.served:
            raise OSError(errno.EINVAL, "")
        if self.rdev == self.NULL:
            return b""
        return self.store.random(count) if self.rdev in self.RANDOM else bytes(count)

    def write(self, count: int) -> int:
        """How many bytes were taken. Raises OSError."""
        if not self.served:
            raise OSError(errno.EINVAL, "")
        if self.rdev == self.FULL:
            raise OSError(errno.ENOSPC, "")
        return count


def read_source(call: Callable[[], Any]) -> Any:
    """What it gives. What the host says when it fails is nothing to a guest: raises OSError (EIO)."""
    try:
        return call()
    except OSError:
        raise OSError(errno.EIO, "") from None


def origin_of(saved: dict[str, Any]) -> Origin | None:
    found = saved["origin"]
    return None if found is None else (found[0], found[1])
