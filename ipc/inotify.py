"""Being told that a directory has gone, without looking again and again (inotify(7))."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

__all__ = ["RemovalWatch"]

# Linux uapi/linux/inotify.h
_IN_MOVED_FROM = 0x40
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_UNMOUNT = 0x2000
_IN_ONLYDIR = 0x0100_0000

_libc = ctypes.CDLL(None, use_errno=True)


class RemovalWatch:
    """``fd`` is readable when ``directory`` may have been removed, moved or unmounted; ``gone`` then says whether.

    It is its parent that is watched: a directory in which a socket is bound stays in the kernel after its removal,
    as long as the socket does, and says nothing of it."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError: where there are no watches left (fs.inotify.max_user_watches), say."""
        self._directory = directory
        self._status = os.stat(directory)
        self.fd = int(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        mask = ctypes.c_uint32(_IN_DELETE | _IN_MOVED_FROM | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT
                               | _IN_ONLYDIR)
        if self.fd < 0 or _libc.inotify_add_watch(self.fd, os.fsencode(directory.parent), mask) < 0:
            error = ctypes.get_errno()
            self.close()
            raise OSError(error, os.strerror(error), str(directory))

    def gone(self) -> bool:
        """It is not there any more, or another one is."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 65536):
                pass
        try:
            return not os.path.samestat(os.stat(self._directory), self._status)
        except OSError:
            return True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
