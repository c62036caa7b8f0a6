"""futex(2) on shared memory: the wait and wake hypercalls across vCPU processes, and the reset of rings."""

from __future__ import annotations

import ctypes
import errno
import os

from .libc import LIBC, SYS_FUTEX, check

__all__ = ["wait", "wake"]

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1

_futex = LIBC["syscall"]    # an object of its own, with its own types
_futex.restype = ctypes.c_long
_futex.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p,
                   ctypes.c_uint32]


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def wait(address: int, expected: int, seconds: float | None = None) -> bool:
    """Sleep while the u32 at ``address`` is ``expected``, for so many seconds at most (None: without end).

    True when woken or when the value differs; False when a signal, or the time, ended the wait. Raises OSError
    for an address that is not mapped.
    """
    limit = None if seconds is None else ctypes.byref(_Timespec(int(seconds), int(seconds % 1 * 1e9)))
    if _futex(SYS_FUTEX, address, _FUTEX_WAIT, expected & 0xFFFF_FFFF, limit, None, 0) == 0:
        return True
    error = ctypes.get_errno()
    if error == errno.EAGAIN:
        return True
    if error in (errno.EINTR, errno.ETIMEDOUT):
        return False
    raise OSError(error, os.strerror(error))


def wake(address: int, count: int) -> int:
    """Wake at most ``count`` waiters; how many were."""
    return check(_futex(SYS_FUTEX, address, _FUTEX_WAKE, min(count, 0x7FFF_FFFF), None, None, 0))
