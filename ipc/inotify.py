"""Being told that a directory has gone, without looking again and again (inotify(7))."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["watch_removal"]

# Linux uapi/linux/inotify.h
_IN_UNMOUNT = 0x2000
_IN_MOVE_SELF = 0x800
_IN_DELETE_SELF = 0x400
_IN_ONLYDIR = 0x0100_0000

_libc = ctypes.CDLL(None, use_errno=True)


def watch_removal(directory: Path) -> int:
    """A descriptor (close-on-exec, non-blocking) that is readable once ``directory`` has been removed, moved or
    unmounted. Raises OSError: where there are no watches left (fs.inotify.max_user_watches), say."""
    fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd >= 0:
        mask = _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT | _IN_ONLYDIR
        if _libc.inotify_add_watch(fd, os.fsencode(directory), ctypes.c_uint32(mask)) >= 0:
            return int(fd)
    error = ctypes.get_errno()
    if fd >= 0:
        os.close(fd)
    raise OSError(error, os.strerror(error), str(directory))
