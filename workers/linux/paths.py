"""From a path to what it names."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from .directories import Directory
from .inodes import Inode, Symlink

__all__ = ["LONGEST_PATH", "Links", "Paths", "Place"]

LONGEST_PATH = 4095         # bytes, without the zero at the end
_MOST_LINKS = 40


@dataclass(slots=True)
class Place:
    """Where a path ends: its last name in a directory. The name is empty, "." or ".." where that is no entry; ``slash``
    follows it."""

    directory: Directory
    name: bytes
    slash: bool

    @property
    def is_entry(self) -> bool:
        return self.name not in (b"", b".", b"..")


class Links:
    """How many symlinks a walk has followed."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0

    def follow(self) -> None:
        """Raises OSError."""
        self.number += 1
        if self.number > _MOST_LINKS:
            raise OSError(errno.ELOOP, "")


class Paths:
    """As they are seen from the root, which is its own parent. ``at`` is where one begins that is relative."""

    def __init__(self, root: Directory) -> None:
        self.root = root

    def find(self, at: Inode, path: bytes, follow: bool, links: Links) -> Inode:
        """``follow``: also a symlink that is the last name; one with a slash behind it always is. Raises OSError."""
        place = self.place(at, path, links)
        inode = self.step(place.directory, place.name)
        if isinstance(inode, Symlink) and (follow or place.slash):
            inode = self._target(place.directory, inode, links)
        if place.slash and not isinstance(inode, Directory):
            raise OSError(errno.ENOTDIR, "")
        return inode

    def place(self, at: Inode, path: bytes, links: Links) -> Place:
        """All of the path but its last name is walked. Raises OSError."""
        if not path:
            raise OSError(errno.ENOENT, "")
        if len(path) > LONGEST_PATH:
            raise OSError(errno.ENAMETOOLONG, "")
        here: Inode = self.root if path.startswith(b"/") else at
        names = [name for name in path.split(b"/") if name]
        for name in names[:-1]:
            directory = _directory(here)
            here = self.step(directory, name)
            if isinstance(here, Symlink):
                here = self._target(directory, here, links)
        return Place(_directory(here), names[-1] if names else b"", path.endswith(b"/"))

    def step(self, directory: Directory, name: bytes) -> Inode:
        """Raises OSError."""
        if name in (b"", b"."):
            return directory
        if name == b"..":
            return directory.parent
        inode = directory.find(name)
        if inode is None:
            raise OSError(errno.ENOENT, "")
        return inode

    def path_of(self, directory: Directory) -> bytes:
        """Raises OSError where it was removed."""
        names: list[bytes] = []
        while directory is not self.root:
            name = directory.parent.name_of(directory)
            if name is None:
                raise OSError(errno.ENOENT, "")
            names.append(name)
            directory = directory.parent
        return b"/" + b"/".join(reversed(names))

    def _target(self, directory: Directory, link: Symlink, links: Links) -> Inode:
        links.follow()
        link.accessed()
        return link.leads() or self.find(directory, link.target, True, links)


def _directory(inode: Inode) -> Directory:
    """Raises OSError."""
    if not isinstance(inode, Directory):
        raise OSError(errno.ENOTDIR, "")
    return inode
