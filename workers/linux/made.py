"""Files that are made when somebody looks (/proc, /sys): a directory's entries, a file's contents, where a link leads.

They are in no table of inodes: each look gives another object, which has the number that belongs to its path. So there
is little of them to save but a use, and that names the path (`gone` is for one that is found no more).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NoReturn

from .directories import LONGEST_NAME, Directory
from .inodes import Inode, Stat, Store, Symlink
from .openfiles import OpenFile

__all__ = ["Link", "MadeDirectory", "Text", "TextFile", "gone", "is_made", "load_made", "save_made"]

_NUMBERS = 1 << 48          # above those of all others
_NUMERIC = 1 << 20          # positions of entries whose names are numbers


def _number(path: bytes) -> int:
    return _NUMBERS | int.from_bytes(blake2b(path, digest_size=6).digest())


def _seen(found: Stat) -> Stat:
    """As on a device of its own."""
    return replace(found, dev=found.dev + 1)


class MadeDirectory(Directory):
    """``names`` gives those of its entries, ``make`` the entry of one of them (None: there is none). Each raises
    OSError where what it is about is gone. ``is_there``: it is not, and then nothing beneath it is either. ``refusal``:
    the errno of an attempt to make something in it."""

    __slots__ = ("_make", "_names", "is_there", "path", "refusal")

    def __init__(self, store: Store, path: bytes, parent: Directory | None, names: Callable[[], Iterable[bytes]],
                 make: Callable[[MadeDirectory, bytes], Inode | None], *, mode: int = 0o555,
                 refusal: int = errno.ENOENT, is_there: Callable[[], bool] | None = None) -> None:
        super().__init__(store, stat.S_IFDIR | mode, number=_number(path))
        del store.inodes[self.number]
        self.path, self._names, self._make, self.refusal = path, names, make, refusal
        self.is_there: Callable[[], bool] = is_there or (
            parent.is_there if isinstance(parent, MadeDirectory) else lambda: True)
        if parent is not None:
            self.parent = parent

    @property
    def size(self) -> int:
        return 0

    def stat(self) -> Stat:
        return _seen(super().stat())

    def find(self, name: bytes) -> Inode | None:
        if len(name) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, "")
        return self._make(self, name)

    def empty(self) -> bool:
        return False

    def entries(self, position: int = 0) -> Iterator[tuple[bytes, Inode, int]]:
        dots: list[tuple[bytes, Inode, int]] = [(b".", self, 0), (b"..", self.parent, 1)]
        yield from dots[position:]
        for at, name in enumerate(self._names(), 2):
            place = _NUMERIC + int(name) if name.isdigit() else at
            inode = self._make(self, name) if place >= position else None
            if inode is not None:
                yield name, inode, place

    def name_of(self, inode: Inode) -> bytes | None:
        path = getattr(inode, "path", b"")
        parent, _, name = path.rpartition(b"/")
        return name if parent == self.path else None

    def check_enters(self, name: bytes) -> None:
        raise OSError(self.refusal, "")

    def check_leaves(self, name: bytes) -> None:
        raise OSError(errno.EPERM, "")

    def child(self, name: bytes) -> bytes:
        """The path of an entry."""
        return self.path + b"/" + name


class Text(Inode):
    """A file. ``make`` gives what is in it, ``write`` takes what is written to it at once; each raises OSError."""

    __slots__ = ("make", "path", "write")

    def __init__(self, store: Store, path: bytes, make: Callable[[], bytes],
                 write: Callable[[bytes], None] | None = None, *, mode: int = 0) -> None:
        super().__init__(store, stat.S_IFREG | (mode or (0o644 if write else 0o444)), number=_number(path))
        del store.inodes[self.number]
        self.path, self.make, self.write = path, make, write

    def stat(self) -> Stat:
        return _seen(super().stat())


class Link(Symlink):
    """A symlink. ``to`` gives its text; ``leads_to``, where it is a magic one, what it leads to whatever that says.
    Each raises OSError."""

    __slots__ = ("_leads_to", "_to", "path")

    def __init__(self, store: Store, path: bytes, to: Callable[[], bytes],
                 leads_to: Callable[[], Inode] | None = None, *, mode: int = 0o777) -> None:
        super().__init__(store, stat.S_IFLNK | mode, number=_number(path))
        del store.inodes[self.number]
        self.path, self._to, self._leads_to = path, to, leads_to

    @property
    def target(self) -> bytes:
        return self._to()

    @property
    def size(self) -> int:
        return 64 if self._leads_to else 0

    def leads(self) -> Inode | None:
        return self._leads_to() if self._leads_to else None

    def stat(self) -> Stat:
        return _seen(super().stat())


class TextFile(OpenFile):
    """An open `Text`: what is in it is made when it is opened, and again whenever it is read from its beginning. What
    is done with it raises OSError."""

    __slots__ = ("_text",)

    inode: Text

    def __init__(self, inode: Text, flags: int, number: int = 0) -> None:
        """Raises OSError."""
        self._text = inode.make() if flags & os.O_ACCMODE != os.O_WRONLY else b""
        super().__init__(inode, flags, number)

    def read(self, count: int) -> bytes:
        self._check(self.readable)
        found = self._read(self.position, count)
        self.position += len(found)
        return found

    def _read(self, offset: int, count: int) -> bytes:
        self._check_range(offset, count)
        if not offset:
            self._text = self.inode.make()
        return self._text[offset:offset + count]

    def _write(self, offset: int, data: bytes | memoryview) -> tuple[int, int]:
        if self.inode.write is None:
            raise OSError(errno.EIO, "")
        self.inode.write(bytes(data))
        return offset, len(data)

    def seek(self, offset: int, whence: int) -> int:
        self._check(not self.path_only)
        if whence not in (os.SEEK_SET, os.SEEK_CUR):
            raise OSError(errno.EINVAL, "")
        offset += self.position if whence == os.SEEK_CUR else 0
        if offset < 0:
            raise OSError(errno.EINVAL, "")
        self.position = offset
        return offset


    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return super().save() | {"text": self._text}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self._text = saved["text"]


def is_made(inode: Inode) -> bool:
    return isinstance(inode, (MadeDirectory, Text, Link))


# --- as data -------------------------------------------------------------------------------------------------------


def save_made(inode: Inode) -> dict[str, Any]:
    assert isinstance(inode, (MadeDirectory, Text, Link))
    return {"path": inode.path, **Inode.save(inode)}


def load_made(root: Directory, saved: dict[str, Any]) -> Inode:
    """As it is found now."""
    found: Inode | None = root
    try:
        for name in saved["path"].split(b"/")[1:]:
            found = found.find(name) if isinstance(found, Directory) else None
    except OSError:
        found = None
    if found is None or not is_made(found) or found.kind != stat.S_IFMT(saved["mode"]):
        found = gone(root.store, saved["path"], saved["mode"])
    found.mode, found.uid, found.gid = saved["mode"], saved["uid"], saved["gid"]
    Inode.load(found, saved)
    return found


def gone(store: Store, path: bytes, mode: int) -> Inode:
    """One that there was: what it is asked for raises OSError."""
    def no_entry(*_: object) -> NoReturn:
        raise OSError(errno.ENOENT, "")

    def no_process(*_: object) -> NoReturn:
        raise OSError(errno.ESRCH, "")

    if stat.S_ISDIR(mode):
        return MadeDirectory(store, path, None, no_entry, no_entry, is_there=lambda: False)
    if stat.S_ISLNK(mode):
        return Link(store, path, no_entry, no_entry)
    return Text(store, path, no_process, no_process)
