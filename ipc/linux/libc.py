"""The C library, and the numbers of system calls that it has no name for."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

__all__ = ["LIBC", "SYS_FUTEX", "SYS_PIDFD_GETFD", "SYS_PROCESS_MADVISE", "SYS_SCHED_SETATTR", "SYS_USERFAULTFD",
           "check"]

LIBC = ctypes.CDLL(None, use_errno=True)
# (x86-64, arm64), of Linux asm/unistd_64.h and asm-generic/unistd.h
SYS_FUTEX, SYS_SCHED_SETATTR, SYS_USERFAULTFD = (
    numbers[platform.machine() == "aarch64"] for numbers in ((202, 98), (314, 274), (323, 282)))
SYS_PIDFD_GETFD, SYS_PROCESS_MADVISE = 438, 440     # of either


def check(result: Any, *names: str) -> int:
    """The result of a call; ``names``: of the file, or the two files, that it was about. Raises OSError where it
    says that it has failed."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), *(names if len(names) < 2 else (names[0], None, names[1])))
    return int(result)
