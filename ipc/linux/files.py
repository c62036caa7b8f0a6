"""What Linux has for files and Python does not."""

from __future__ import annotations

import os
from pathlib import Path

from .libc import LIBC, check

__all__ = ["exchange"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(a: Path, b: Path) -> None:
    """Swap two names in one step (renameat2(2)). Raises OSError."""
    check(LIBC.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE), str(a), str(b))
