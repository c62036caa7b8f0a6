"""What Linux has for files and Python does not, or not with an end to the wait."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .libc import LIBC, check

__all__ = ["exchange", "lock_within", "open_locked", "write_at", "write_back"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_LOOK = 0.01        # seconds between two tries


def exchange(a: Path, b: Path) -> None:
    """Swap two names in one step (renameat2(2)). Raises OSError."""
    check(LIBC.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE), str(a), str(b))


def write_at(fd: int, data: memoryview, at: int) -> None:
    """All of these bytes into the file, from its byte ``at`` on: pwrite(2) may write less. Raises OSError."""
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


def write_back(fd: int, start: int, size: int) -> None:
    """Begin to write these bytes of the page cache to the disk (sync_file_range(2)): who syncs later waits less. What
    goes wrong, the sync says."""
    LIBC.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def open_locked(path: Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A descriptor of the file, close-on-exec, with its exclusive flock(2). Raises BlockingIOError when another
    process has that, and OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def lock_within(fd: int, seconds: float) -> None:
    """The exclusive flock(2) of the open file, which another may have for so long. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(_LOOK)
