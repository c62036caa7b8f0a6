"""Directories: names, each with a position that stays its own while others come and go; and what becomes of the entries
of an imported one."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from typing import Any

from .contents import Regular
from .inodes import Inode, Node, Origin, Store, Symlink, origin_of, read_source
from .sources import Entry

__all__ = ["LONGEST_NAME", "Directory", "new_inode"]

LONGEST_NAME = 255

_FIRST_POSITION = 2         # "." and ".." have 0 and 1
_SIZE_OF_ENTRY = 20         # as tmpfs counts


class Directory(Inode):
    """``parent``: of the root itself. One that was removed has no links, no entries and gets none; its parent remains.
    An imported one is read at first use. ``covered``: what is mounted on names that are there, and is not saved."""

    __slots__ = ("_entries", "_next", "_origin", "covered", "parent")

    def __init__(self, store: Store, mode: int, uid: int = 0, gid: int = 0, rdev: int = 0, *, number: int = 0) -> None:
        super().__init__(store, mode, uid, gid, number=number)
        self.nlink = 2
        self.parent = self
        self._entries: dict[bytes, tuple[Inode, int]] = {}      # in the order of their positions
        self._next = _FIRST_POSITION
        self._origin: Origin | None = None
        self.covered: dict[bytes, Directory] = {}

    @property
    def size(self) -> int:
        """Raises OSError."""
        return (2 + len(self._listed())) * _SIZE_OF_ENTRY

    def find(self, name: bytes) -> Inode | None:
        """Raises OSError."""
        if not self.nlink:
            raise OSError(errno.ENOENT, "")
        if len(name) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, "")
        if name in self.covered:
            return self.covered[name]
        found = self._listed().get(name)
        return None if found is None else found[0]

    def there(self, name: bytes) -> Inode | None:
        """The same, without looking into a source."""
        return self._entries.get(name, (None,))[0]

    def empty(self) -> bool:
        """Raises OSError."""
        return not self._listed()

    def entries(self, position: int = 0) -> Iterator[tuple[bytes, Inode, int]]:
        """(name, inode, position) from that position on. Raises OSError."""
        dots = [(b".", self, 0), (b"..", self.parent, 1)]
        yield from dots[position:]
        for name, (inode, at) in self._listed().items():
            if at >= position:
                yield name, self.covered.get(name, inode), at

    def name_of(self, inode: Inode) -> bytes | None:
        """Any of its names here. Raises OSError."""
        for name, each in self.covered.items():
            if each is inode:
                return name
        return next((name for name, (each, _) in self._listed().items() if each is inode), None)

    def is_beneath(self, other: Inode) -> bool:
        """Or the same."""
        here = self
        while here is not other:
            if here.parent is here:
                return False
            here = here.parent
        return True

    def check_enters(self, name: bytes) -> None:
        """Something can get this name. Raises OSError."""

    def check_leaves(self, name: bytes) -> None:
        """What has the name can be removed, or get another one. Raises OSError."""
        if name in self.covered:
            raise OSError(errno.EBUSY, "")

    def cover(self, name: bytes, directory: Directory) -> None:
        """It is mounted on a name that there is."""
        self.covered[name] = directory
        directory.parent = self

    def forget_source(self) -> None:
        """One that was imported, and never looked at, is empty."""
        self._origin = None

    def enter(self, name: bytes, inode: Inode) -> None:
        """In place of what has the name, which the caller has seen to; then it keeps the position. Raises OSError."""
        entries = self._listed()
        inode.place = self, name
        old = entries.get(name)
        if old is None:
            entries[name] = inode, self._next
            self._next += 1
        else:
            entries[name] = inode, old[1]
            self.nlink -= isinstance(old[0], Directory)
        if isinstance(inode, Directory):
            inode.parent = self
            self.nlink += 1

    def leave(self, name: bytes) -> Inode:
        """What had the name. Raises OSError."""
        inode, _ = self._listed().pop(name)
        self.nlink -= isinstance(inode, Directory)
        return inode

    def unlinked(self) -> None:
        """It is removed; it is empty."""
        self.nlink = 0
        self.changed()
        self.parent.keep()
        self.dispose_if_unused()

    def dispose(self) -> None:
        self.parent.let_go()

    # --- imported --------------------------------------------------------------------------------------------------

    def attach(self, origin: Origin) -> None:
        """Its entries are those of a directory of a source. It is empty."""
        self._origin = origin

    def _listed(self) -> dict[bytes, tuple[Inode, int]]:
        """Raises OSError where the source fails."""
        if self._origin is not None:
            name, path = self._origin
            found: list[Entry] = read_source(lambda: self.store.source(name).list(path))
            self._origin = None
            for entry in sorted(found, key=lambda entry: entry.name):
                self.enter(entry.name, self._imported(entry, name, path))
        return self._entries

    def _imported(self, entry: Entry, source: str, path: bytes) -> Inode:
        """A file that has several names is found again, and has as many links as names have been seen."""
        known = self.store.imported
        if entry.identity:
            inode = self.store.inodes.get(known.get((source, entry.identity), 0))
            if inode is not None:
                inode.nlink += 1
                return inode
        inode = new_inode(self.store, entry.mode, entry.uid, entry.gid, entry.rdev)
        inode.load_entry(entry, (source, path + b"/" + entry.name if path else entry.name))
        if entry.identity:
            known[source, entry.identity] = inode.number
        return inode

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return super().save() | {
            "parent": self.parent.number, "next": self._next, "origin": list(self._origin) if self._origin else None,
            "entries": [[name, inode.number, at] for name, (inode, at) in self._entries.items()]}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self._next, self._origin = saved["next"], origin_of(saved)

    def connect(self, saved: dict[str, Any]) -> None:
        """The rest: all inodes are there now."""
        parent = self.store.inodes[saved["parent"]]
        assert isinstance(parent, Directory)
        self.parent = parent
        self._entries = {name: (self.store.inodes[number], at) for name, number, at in saved["entries"]}
        for name, (inode, _) in self._entries.items():
            inode.place = self, name

    def load_entry(self, entry: Entry, origin: Origin) -> None:
        super().load_entry(entry, origin)
        self.attach(origin)


def new_inode(store: Store, mode: int, uid: int = 0, gid: int = 0, rdev: int = 0, *, number: int = 0) -> Inode:
    """Of the kind that ``mode`` says."""
    kinds: dict[int, type[Inode]] = {stat.S_IFREG: Regular, stat.S_IFDIR: Directory, stat.S_IFLNK: Symlink}
    return kinds.get(stat.S_IFMT(mode), Node)(store, mode, uid, gid, rdev, number=number)
