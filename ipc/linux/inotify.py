"""Being told that a directory or file has gone, without looking again and again (inotify(7))."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

from .libc import LIBC, check

__all__ = ["RemovalWatch"]

# Linux uapi/linux/inotify.h
_IN_ATTRIB = 0x4
_IN_MOVED_FROM = 0x40
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800

_READ = 64 << 10


class RemovalWatch:
    """Of paths that are there now. Whenever ``fd`` (close-on-exec, non-blocking) is readable, ask ``gone``.

    A directory that is removed while somebody has it open, or a socket in it, is not said to be deleted until it is
    closed: so its parent is watched too. A file that is removed while it is open has one link less: its attributes
    have changed.
    """

    def __init__(self, *paths: Path) -> None:
        """Raises OSError: where a path is not there, or there are no watches left (fs.inotify.max_user_instances,
        max_user_watches)."""
        self._there = [(path, os.lstat(path)) for path in paths]
        self.fd = check(LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), str(paths[0]))
        try:
            for path, status in self._there:
                self._watch(path, _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ATTRIB)
                if stat.S_ISDIR(status.st_mode):
                    self._watch(path.parent, _IN_DELETE | _IN_MOVED_FROM | _IN_DELETE_SELF | _IN_MOVE_SELF)
        except OSError:
            self.close()
            raise

    def _watch(self, path: Path, mask: int) -> None:
        check(LIBC.inotify_add_watch(self.fd, os.fsencode(path), ctypes.c_uint32(mask)), str(path))

    def gone(self) -> Path | None:
        """The first of the paths that is not there any more, or is another one by now."""
        try:
            while os.read(self.fd, _READ):
                pass
        except BlockingIOError:
            pass
        return next((path for path, status in self._there if not _same(path, status)), None)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _same(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), status)
    except OSError:
        return False
