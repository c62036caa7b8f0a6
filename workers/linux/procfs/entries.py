"""A tree of made files, written down as mappings from names to entries."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from ..directories import Directory
from ..inodes import Inode
from ..made import Link, MadeDirectory, Text

__all__ = ["Entries", "Entry", "folder", "link", "node", "text", "top"]

#: What there is under a name; made for a directory.
Entry = Callable[[MadeDirectory, bytes], Inode]
Entries = Mapping[bytes, Entry]


def text(make: Callable[[], bytes] | bytes, write: Callable[[bytes], None] | None = None, *, mode: int = 0) -> Entry:
    """A file; ``make`` raises OSError."""
    contents = make if callable(make) else lambda: make
    return lambda parent, name: Text(parent.store, parent.child(name), contents, write, mode=mode)


def link(to: Callable[[], bytes] | bytes, leads_to: Callable[[], Inode] | None = None, *, mode: int = 0o777) -> Entry:
    """A symlink, as `Link` has it."""
    target = to if callable(to) else lambda: to
    return lambda parent, name: Link(parent.store, parent.child(name), target, leads_to, mode=mode)


def folder(entries: Entries | Callable[[], Entries], *, mode: int = 0o555) -> Entry:
    """A directory. ``entries`` raises OSError where it is gone."""
    def found() -> Entries:
        return entries() if callable(entries) else entries

    return lambda parent, name: MadeDirectory(
        parent.store, parent.child(name), parent, found, lambda directory, name: node(found(), directory, name),
        mode=mode, refusal=parent.refusal)


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
