"""A file system in memory, as Linux's tmpfs is to a program of uid 0.

    FileSystem (here)           names: entries are made, moved and removed
      Paths (paths.py)            from a path to what it names
      OpenFile (openfiles.py)     reading and writing, positions, locks (locks.py)
      Directory (directories.py)  names of one directory
      Regular (contents.py)       contents, in frames of the machine's memory
      MadeDirectory (made.py)     what is made when somebody looks
      Source (sources.py)         a tree of the host that was imported: read at first use, never written to

Calls are given a directory to begin at (*at) and a path; they raise OSError with the errno that Linux has. What is done
to a file once it is found (chmod, reading ...) takes the inode. A file lives while it has a name or a use
(``Inode.keep``). All of it is plain data: ``save`` and ``load``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .contents import LARGEST, Regular
from .directories import Directory, new_inode
from .frames import Frames
from .inodes import Cut, Inode, Node, Store, Symlink
from .made import Link, MadeDirectory, Text, TextFile, is_made
from .openfiles import OpenFile
from .paths import LONGEST_PATH, Links, Paths, Place
from .sources import NANOSECONDS, Source
from .space import PAGE, Memory

__all__ = ["RENAME_EXCHANGE", "RENAME_NOREPLACE", "UTIME_NOW", "UTIME_OMIT", "FileSystem", "StatFs"]

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2                    # uapi/linux/fs.h
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2        # linux/stat.h

O_LARGEFILE = 0o100000                                      # asm-generic/fcntl.h; always set on 64 bits
_O_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY

_TMPFS, _PROC = 0x01021994, 0x9FA0                          # uapi/linux/magic.h


@dataclass(frozen=True, slots=True)
class StatFs:
    """struct statfs, in blocks of a page."""

    type: int
    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    namelen: int


class FileSystem:
    """``clock``: nanoseconds since 1970. ``random``: so many random bytes (random and urandom). ``blocks``: the frames
    that there are, for statfs(2). What is named after a system call raises OSError as that does."""

    #: (user, group) of what is made now.
    owner: tuple[int, int] = (0, 0)

    def __init__(self, memory: Memory, frames: Frames, *, clock: Callable[[], int], random: Callable[[int], bytes],
                 device: int = 1, blocks: int = 0) -> None:
        self.store = Store(memory, frames, clock, random, device)
        self._blocks = blocks
        self.root = Directory(self.store, stat.S_IFDIR | 0o755)
        self.root.keep()
        self._paths = Paths(self.root)

    # --- finding ---------------------------------------------------------------------------------------------------

    def find(self, at: Inode, path: bytes, *, follow: bool = True, empty: bool = False) -> Inode:
        """``follow``: also a symlink that is the last name. ``empty``: the empty path is ``at`` (AT_EMPTY_PATH)."""
        if empty and not path:
            return at
        return self._paths.find(at, path, follow, Links())

    def path_of(self, directory: Directory) -> bytes:
        """getcwd(2)."""
        return self._paths.path_of(directory)

    def name_of(self, inode: Inode) -> bytes:
        """The path of a file as /proc shows it. Raises OSError where a source fails."""
        path, there = self._named(inode)
        return (path or b"/") if there else path + b" (deleted)"

    def _named(self, inode: Inode) -> tuple[bytes, bool]:
        """And whether it is there."""
        if inode is self.root:
            return b"", True
        if isinstance(inode, (MadeDirectory, Text, Link)):
            return inode.path, True
        if inode.place is None:
            return b"/#%d" % inode.number, False
        directory, name = inode.place
        path, there = self._named(directory)
        there = there and isinstance(directory, Directory) and directory.find(name) is inode
        return path + b"/" + name, there

    # --- opening ---------------------------------------------------------------------------------------------------

    def open(self, at: Inode, path: bytes, flags: int, mode: int = 0) -> OpenFile:
        """openat(2). Whether a fifo has another end, and what a terminal is, others see to."""
        access = flags & os.O_ACCMODE
        if flags & os.O_PATH:
            flags &= os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
            inode = self.find(at, path, follow=not flags & os.O_NOFOLLOW)
            if flags & os.O_DIRECTORY and not isinstance(inode, Directory):
                raise OSError(errno.ENOTDIR, "")
            return OpenFile(inode, flags)
        flags |= O_LARGEFILE
        if flags & _O_TMPFILE:
            if not flags & os.O_DIRECTORY or flags & os.O_CREAT or access == os.O_RDONLY:
                raise OSError(errno.EINVAL, "")
            return self._open_unnamed(at, path, flags, mode)
        if flags & os.O_CREAT and flags & os.O_DIRECTORY:
            raise OSError(errno.EINVAL, "")
        inode, created = self._find_or_create(at, path, flags, mode)
        if isinstance(inode, Symlink):
            raise OSError(errno.ENOTDIR if flags & os.O_DIRECTORY else errno.ELOOP, "")
        if isinstance(inode, Directory):
            if access != os.O_RDONLY or flags & os.O_TRUNC:
                raise OSError(errno.EISDIR, "")
        elif flags & os.O_DIRECTORY:
            raise OSError(errno.ENOTDIR, "")
        if isinstance(inode, Node):
            inode.check_opens()
        flags &= ~(os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_CLOEXEC)
        if isinstance(inode, Text):
            return TextFile(inode, flags & ~os.O_TRUNC)
        found = OpenFile(inode, flags & ~os.O_TRUNC)
        if isinstance(inode, Regular) and flags & os.O_TRUNC and not created:
            inode.resize(0)
            inode.modified()
        return found

    def _find_or_create(self, at: Inode, path: bytes, flags: int, mode: int) -> tuple[Inode, bool]:
        """And whether it is new."""
        links = Links()
        create, exclusive = bool(flags & os.O_CREAT), bool(flags & os.O_EXCL)
        follow = not flags & os.O_NOFOLLOW and not (create and exclusive)
        directory = False               # it must be one
        while True:
            place = self._paths.place(at, path, links)
            if not place.is_entry:
                inode: Inode | None = self._paths.step(place.directory, place.name)
                break
            if place.slash:
                if create:
                    raise OSError(errno.EISDIR, "")
                follow = directory = True
            inode = place.directory.find(place.name)
            if not isinstance(inode, Symlink) or not follow:
                break
            links.follow()
            inode.accessed()
            led = inode.leads()
            if led is not None:
                inode = led
                break
            at, path = place.directory, inode.target
        if inode is None:
            if not create:
                raise OSError(errno.ENOENT, "")
            place.directory.check_enters(place.name)
            return self._create(place, stat.S_IFREG | mode & 0o7777), True
        if create and exclusive:
            raise OSError(errno.EEXIST, "")
        if create and isinstance(inode, Directory):
            raise OSError(errno.EISDIR, "")
        if directory and not isinstance(inode, Directory):
            raise OSError(errno.ENOTDIR, "")
        return inode, False

    def _open_unnamed(self, at: Inode, path: bytes, flags: int, mode: int) -> OpenFile:
        directory = self.find(at, path, follow=not flags & os.O_NOFOLLOW)
        if not isinstance(directory, Directory):
            raise OSError(errno.ENOTDIR, "")
        if is_made(directory):
            raise OSError(errno.EOPNOTSUPP, "")
        inode = self._new(directory, stat.S_IFREG | mode & 0o7777)
        inode.nlink, inode.linkable = 0, not flags & os.O_EXCL
        inode.place = directory, b"#%d" % inode.number
        return OpenFile(inode, flags & ~(os.O_EXCL | os.O_NOCTTY | os.O_TRUNC | os.O_CLOEXEC))

    # --- making ----------------------------------------------------------------------------------------------------

    def mkdir(self, at: Inode, path: bytes, mode: int) -> None:
        """mkdirat(2)."""
        place = self._free_place(at, path, directory=True)
        self._create(place, stat.S_IFDIR | mode & 0o1777)

    def mknod(self, at: Inode, path: bytes, mode: int, device: int = 0) -> None:
        """mknodat(2)."""
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind == stat.S_IFDIR:
            raise OSError(errno.EPERM, "")
        if kind not in (stat.S_IFREG, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            raise OSError(errno.EINVAL, "")
        self._create(self._free_place(at, path), kind | mode & 0o7777,
                     device if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)

    def symlink(self, target: bytes, at: Inode, path: bytes) -> None:
        """symlinkat(2)."""
        if not target:
            raise OSError(errno.ENOENT, "")
        if len(target) > LONGEST_PATH:
            raise OSError(errno.ENAMETOOLONG, "")
        place = self._free_place(at, path)
        self._enter(place, Symlink(self.store, stat.S_IFLNK | 0o777, *self._owner_in(place.directory), target=target))

    def link(self, old_at: Inode, old: bytes, at: Inode, path: bytes, *, follow: bool = False,
             empty: bool = False) -> None:
        """linkat(2); ``follow`` and ``empty`` are about ``old``."""
        inode = self.find(old_at, old, follow=follow, empty=empty)
        place = self._free_place(at, path)
        if is_made(inode):
            raise OSError(errno.EXDEV, "")
        if isinstance(inode, Directory):
            raise OSError(errno.EPERM, "")
        if not inode.nlink and not inode.linkable:
            raise OSError(errno.ENOENT, "")
        inode.linkable = False
        inode.nlink += 1
        inode.changed()
        self._enter(place, inode)

    def _free_place(self, at: Inode, path: bytes, *, directory: bool = False) -> Place:
        place = self._paths.place(at, path, Links())
        if not place.is_entry or place.directory.find(place.name) is not None:
            raise OSError(errno.EEXIST, "")
        if place.slash and not directory:
            raise OSError(errno.ENOENT, "")
        place.directory.check_enters(place.name)
        return place

    def _create(self, place: Place, mode: int, device: int = 0) -> Inode:
        inode = self._new(place.directory, mode, device)
        self._enter(place, inode)
        return inode

    def _new(self, directory: Directory, mode: int, device: int = 0) -> Inode:
        if stat.S_ISDIR(mode):
            mode |= directory.mode & stat.S_ISGID
        return new_inode(self.store, mode, *self._owner_in(directory), device)

    def _owner_in(self, directory: Directory) -> tuple[int, int]:
        """Of what is made in it."""
        user, group = self.owner
        return user, directory.gid if directory.mode & stat.S_ISGID else group

    def _enter(self, place: Place, inode: Inode) -> None:
        place.directory.enter(place.name, inode)
        place.directory.modified()

    # --- removing and moving ---------------------------------------------------------------------------------------

    def unlink(self, at: Inode, path: bytes) -> None:
        """unlinkat(2)."""
        place = self._paths.place(at, path, Links())
        if not place.is_entry:
            raise OSError(errno.EISDIR, "")
        inode = self._paths.step(place.directory, place.name)
        if isinstance(inode, Directory):
            raise OSError(errno.EISDIR, "")
        if place.slash:
            raise OSError(errno.ENOTDIR, "")
        place.directory.check_leaves(place.name)
        self._remove(place)

    def rmdir(self, at: Inode, path: bytes) -> None:
        """rmdir(2), and unlinkat(2) with AT_REMOVEDIR."""
        place = self._paths.place(at, path, Links())
        if not place.is_entry:
            raise OSError({b"": errno.EBUSY, b".": errno.EINVAL, b"..": errno.ENOTEMPTY}[place.name], "")
        inode = self._paths.step(place.directory, place.name)
        if not isinstance(inode, Directory):
            raise OSError(errno.ENOTDIR, "")
        place.directory.check_leaves(place.name)
        if not inode.empty():
            raise OSError(errno.ENOTEMPTY, "")
        self._remove(place)

    def rename(self, old_at: Inode, old: bytes, at: Inode, path: bytes, flags: int = 0) -> None:
        """renameat2(2), without RENAME_WHITEOUT."""
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "")
        exchange = flags == RENAME_EXCHANGE
        source_place, place = self._paths.place(old_at, old, Links()), self._paths.place(at, path, Links())
        if not source_place.is_entry:
            raise OSError(errno.EBUSY, "")
        if not place.is_entry:
            raise OSError(errno.EEXIST if flags == RENAME_NOREPLACE else errno.EBUSY, "")
        if is_made(source_place.directory) != is_made(place.directory):
            raise OSError(errno.EXDEV, "")
        place.directory.check_enters(place.name)
        source = self._paths.step(source_place.directory, source_place.name)
        target = place.directory.find(place.name)
        for each in (source_place, place):
            each.directory.check_leaves(each.name)
        self._check_rename(source_place, source, place, target, flags)
        if source is target:
            return
        if exchange:
            assert target is not None
            source_place.directory.enter(source_place.name, target)
            target.changed()
        else:
            source_place.directory.leave(source_place.name)
        place.directory.enter(place.name, source)
        source.changed()
        source_place.directory.modified()
        place.directory.modified()
        if target is not None and not exchange:
            target.unlinked()

    @staticmethod
    def _check_rename(source_place: Place, source: Inode, place: Place, target: Inode | None, flags: int) -> None:
        """In the order in which Linux does."""
        exchange = flags == RENAME_EXCHANGE
        from_directory, to_directory = isinstance(source, Directory), isinstance(target, Directory)
        if target is not None and flags == RENAME_NOREPLACE:
            raise OSError(errno.EEXIST, "")
        if target is None and exchange:
            raise OSError(errno.ENOENT, "")
        if exchange and not to_directory and place.slash:
            raise OSError(errno.ENOTDIR, "")
        if not from_directory and (source_place.slash or (place.slash and not exchange)):
            raise OSError(errno.ENOTDIR, "")
        if from_directory and place.directory.is_beneath(source):
            raise OSError(errno.EINVAL, "")
        if target is not None and to_directory and source_place.directory.is_beneath(target):
            raise OSError(errno.EINVAL if exchange else errno.ENOTEMPTY, "")
        if source is target or target is None or exchange:
            return
        if from_directory and not to_directory:
            raise OSError(errno.ENOTDIR, "")
        if to_directory and not from_directory:
            raise OSError(errno.EISDIR, "")
        if isinstance(target, Directory) and not target.empty():
            raise OSError(errno.ENOTEMPTY, "")

    def _remove(self, place: Place) -> None:
        inode = place.directory.leave(place.name)
        place.directory.modified()
        inode.unlinked()

    # --- what is known about a file --------------------------------------------------------------------------------

    @staticmethod
    def readlink(inode: Inode) -> bytes:
        """readlinkat(2)."""
        if not isinstance(inode, Symlink):
            raise OSError(errno.EINVAL, "")
        inode.accessed()
        return inode.target

    @staticmethod
    def access(inode: Inode, mode: int) -> None:
        """faccessat(2), as uid 0, with a mode that there is."""
        if mode & os.X_OK and not isinstance(inode, Directory) and not inode.mode & 0o111:
            raise OSError(errno.EACCES, "")

    @staticmethod
    def chmod(inode: Inode, mode: int) -> None:
        """fchmodat(2)."""
        if isinstance(inode, Symlink):
            raise OSError(errno.EOPNOTSUPP, "")
        inode.mode = inode.kind | mode & 0o7777
        inode.changed()

    @staticmethod
    def chown(inode: Inode, uid: int, gid: int) -> None:
        """fchownat(2): -1 for what remains."""
        if not isinstance(inode, Directory):
            inode.mode &= ~stat.S_ISUID
            if inode.mode & stat.S_IXGRP:
                inode.mode &= ~stat.S_ISGID
        inode.uid = inode.uid if uid == -1 else uid
        inode.gid = inode.gid if gid == -1 else gid
        inode.changed()

    @staticmethod
    def set_times(inode: Inode, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """utimensat(2), once the path is known: it is not looked at where both are UTIME_OMIT. Seconds and
        nanoseconds."""
        for _, nanoseconds in (atime, mtime):
            if nanoseconds not in (UTIME_NOW, UTIME_OMIT) and not 0 <= nanoseconds < NANOSECONDS:
                raise OSError(errno.EINVAL, "")
        if atime[1] == mtime[1] == UTIME_OMIT:
            return
        now = inode.store.clock()
        if atime[1] != UTIME_OMIT:
            inode.atime = now if atime[1] == UTIME_NOW else atime[0] * NANOSECONDS + atime[1]
        if mtime[1] != UTIME_OMIT:
            inode.mtime = now if mtime[1] == UTIME_NOW else mtime[0] * NANOSECONDS + mtime[1]
        inode.ctime = now

    @staticmethod
    def truncate(inode: Inode, size: int) -> None:
        """truncate(2)."""
        if isinstance(inode, Directory):
            raise OSError(errno.EISDIR, "")
        if not isinstance(inode, Regular) or not 0 <= size <= LARGEST:
            raise OSError(errno.EINVAL, "")
        if size != inode.size or inode.blocks:      # as tmpfs does
            inode.resize(size)
            inode.modified()

    def statfs(self, inode: Inode | None = None) -> StatFs:
        """statfs(2), of where a file is."""
        if inode is not None and is_made(inode):
            return StatFs(_PROC, PAGE, 0, 0, 0, 0, 0, 255)
        free = self.store.frames.free
        return StatFs(_TMPFS, PAGE, self._blocks, free, free, self._blocks,
                      max(0, self._blocks - len(self.store.inodes)), 255)

    def take_cut(self) -> list[Cut]:
        """What mapped files have lost, whose mappings must lose it too; and forget it."""
        cut, self.store.cut = self.store.cut, []
        return cut

    # --- a tree of the host ----------------------------------------------------------------------------------------

    def attach(self, name: str, source: Source) -> None:
        """A source of this name: of what has been imported, or will be."""
        self.store.sources[name] = source

    def import_tree(self, directory: Directory, name: str, path: bytes = b"") -> None:
        """What is beneath a path of a source appears in a directory, which is empty."""
        if not directory.empty():
            raise OSError(errno.ENOTEMPTY, "")
        directory.attach((name, path))

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Without the contents of the frames, open files (``OpenFile.save``), and what ``random`` goes on with."""
        store = self.store
        return {"root": self.root.number, "device": store.device, "blocks": self._blocks,
                "next_inode": store.next_inode, "next_file": store.next_file,
                "imported": [[name, identity, number] for (name, identity), number in store.imported.items()
                             if number in store.inodes],
                "places": self._places(),
                "cut": [[each.inode.number, each.first, each.end, None if each.frames is None else sorted(each.frames)]
                        for each in store.cut if each.inode.number in store.inodes],
                "inodes": [inode.save() for inode in store.inodes.values()]}

    def _places(self) -> list[list[Any]]:
        """[inode, directory, name], where that is not what the entries say: of files that have several names, or none
        any more. A directory may be gone itself; then it is here too, for the names."""
        found: dict[int, list[Any]] = {}
        left = [each for each in self.store.inodes.values() if not _is_at_place(each)]
        while left:
            inode = left.pop()
            if inode.place is None or inode.number in found:
                continue
            directory, name = inode.place
            found[inode.number] = [inode.number, directory.number, name]
            if directory.number not in self.store.inodes:
                left.append(directory)
        return sorted(found.values())

    def _load_places(self, places: list[list[Any]]) -> None:
        inodes = self.store.inodes
        gone = {number: Directory(self.store, stat.S_IFDIR, number=number)
                for number in {each for place in places for each in place[:2]} - inodes.keys()}
        for number, each in gone.items():
            each.nlink = 0
            del inodes[number]
        for number, directory, name in places:
            inode = inodes.get(number) or gone[number]
            inode.place = inodes.get(directory) or gone[directory], name

    @classmethod
    def load(cls, saved: dict[str, Any], memory: Memory, frames: Frames, *, clock: Callable[[], int],
             random: Callable[[int], bytes]) -> FileSystem:
        """``frames``: as they were, those of the file system used. Sources must be attached again."""
        found = cls.__new__(cls)
        found._blocks = saved["blocks"]
        found.store = store = Store(memory, frames, clock, random, saved["device"])
        for each in saved["inodes"]:
            new_inode(store, each["mode"], each["uid"], each["gid"], each["rdev"], number=each["number"]).load(each)
        for each in saved["inodes"]:
            inode = store.inodes[each["number"]]
            if isinstance(inode, Directory):
                inode.connect(each)
        root = store.inodes[saved["root"]]
        assert isinstance(root, Directory)
        found.root, found._paths = root, Paths(root)
        found._load_places(saved["places"])
        store.next_inode, store.next_file = saved["next_inode"], saved["next_file"]
        store.imported = {(name, identity): number for name, identity, number in saved["imported"]}
        store.cut = [Cut(store.inodes[number], first, end, None if frames is None else frozenset(frames))
                     for number, first, end, frames in saved["cut"]]
        return found


def _is_at_place(inode: Inode) -> bool:
    """It has one name, and that is its place."""
    if inode.place is None:
        return True         # the root, and what never had a name
    directory, name = inode.place
    return (inode.nlink == 1 or inode.kind == stat.S_IFDIR) and (
        isinstance(directory, Directory) and directory.there(name) is inode)

