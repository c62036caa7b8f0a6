"""futex(2) on shared memory: the wait and wake hypercalls across vCPU processes, and the reset of rings."""

from __future__ import annotations

import ctypes
import errno
import os
import time

from .libc import LIBC, SYS_FUTEX, check

__all__ = ["operate", "read", "wait", "wait_as", "wake", "wake_as", "word"]

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_FUTEX_WAIT_BITSET = 9
_FUTEX_WAKE_BITSET = 10

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


def wait_as(mask: int, address: int, expected: int, seconds: float | None = None) -> None:
    """``wait``, as one of several kinds of waiters: until woken as one of ``mask``, the value differs, a signal comes,
    or the time is over."""
    deadline = None if seconds is None else time.monotonic_ns() + int(seconds * 1e9)
    operate(address, _FUTEX_WAIT_BITSET, expected, third=mask, deadline=deadline)


def wake_as(mask: int, address: int, count: int) -> int:
    """``wake`` those that wait as one of ``mask``."""
    return operate(address, _FUTEX_WAKE_BITSET, count, third=mask)


def operate(address: int, operation: int, value: int, number: int = 0, second: int = 0, third: int = 0, *,
            deadline: int | None = None) -> int:
    """futex(2) as it is: the result, or -errno. ``number`` is in the place of a timeout; ``deadline`` (nanoseconds, of
    the clock that the operation says) is one."""
    limit = number or None if deadline is None else ctypes.byref(_Timespec(*divmod(deadline, 10**9)))
    result = int(_futex(SYS_FUTEX, address, operation, value & 0xFFFF_FFFF, limit, second or None, third))
    return result if result >= 0 else -ctypes.get_errno()


def word(address: int) -> memoryview:
    """The u32 there, which is mapped as long as this is used."""
    return memoryview((ctypes.c_uint32 * 1).from_address(address)).cast("B").cast("I")


def read(address: int, count: int) -> bytes:
    """Memory of this process, which is mapped."""
    return ctypes.string_at(address, count)
