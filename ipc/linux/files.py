"""What Linux has for files and Python does not, or not with an end to the wait."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from .libc import LIBC, check

__all__ = ["exchange", "lock_within"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LOOK = 0.01        # seconds between two tries


def exchange(a: Path, b: Path) -> None:
    """Swap two names in one step (renameat2(2)). Raises OSError."""
    check(LIBC.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE), str(a), str(b))


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
