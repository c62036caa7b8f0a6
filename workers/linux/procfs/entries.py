"""A tree of made files, written down as mappings from names to entries."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from ..directories import Directory
from ..inodes import Inode
from ..made import Link, MadeDirectory, Text

__all__ = ["Entries", "Entry", "folder", "link", "node", "text", "top"]

#: What there is under a name; made for a directory.
Entry = Callable[[MadeDirectory, bytes], Inode]
Entries = Mapping[bytes, Entry]

P = ParamSpec("P")
T = TypeVar("T")


def text(make: Callable[[], bytes] | bytes, write: Callable[[bytes], None] | None = None, *, mode: int = 0) -> Entry:
    """A file; ``make`` raises OSError."""
    contents = make if callable(make) else lambda: make

    def entry(parent: MadeDirectory, name: bytes) -> Inode:
        return Text(parent.store, parent.child(name), _while_there(parent, contents, errno.ESRCH),
                    write and _while_there(parent, write, errno.ESRCH), mode=mode)

    return entry


def link(to: Callable[[], bytes] | bytes, leads_to: Callable[[], Inode] | None = None, *, mode: int = 0o777) -> Entry:
    """A symlink, as `Link` has it."""
    target = to if callable(to) else lambda: to

    def entry(parent: MadeDirectory, name: bytes) -> Inode:
        return Link(parent.store, parent.child(name), _while_there(parent, target, errno.ENOENT),
                    leads_to and _while_there(parent, leads_to, errno.ENOENT), mode=mode)

    return entry


def folder(entries: Entries | Callable[[], Entries], *, mode: int = 0o555,
           is_there: Callable[[], bool] | None = None) -> Entry:
    """A directory. ``entries`` raises OSError where it is gone."""
    def entry(parent: MadeDirectory, name: bytes) -> Inode:
        made: MadeDirectory

        def found() -> Entries:
            if not made.is_there():
                raise OSError(errno.ENOENT, "")
            return entries() if callable(entries) else entries

        made = MadeDirectory(parent.store, parent.child(name), parent, found,
                             lambda directory, name: node(found(), directory, name), mode=mode,
                             refusal=parent.refusal, is_there=is_there)
        return made

    return entry


def _while_there(parent: MadeDirectory, function: Callable[P, T], code: int) -> Callable[P, T]:
    """Raises OSError with the errno when what it is about is gone."""
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if not parent.is_there():
            raise OSError(code, "")
        return function(*args, **kwargs)

    return checked


def node(entries: Entries, directory: MadeDirectory, name: bytes) -> Inode | None:
    entry = entries.get(name)
    return None if entry is None else entry(directory, name)


def top(root: Directory, path: bytes, entries: Callable[[], Entries], find: Callable[[bytes], Entry | None], *,
        refusal: int = errno.ENOENT) -> MadeDirectory:
    """The first directory of a tree. ``find``: an entry, also one that is not listed."""
    def make(directory: MadeDirectory, name: bytes) -> Inode | None:
        entry = find(name)
        return None if entry is None else entry(directory, name)

    return MadeDirectory(root.store, path, root, entries, make, refusal=refusal)
