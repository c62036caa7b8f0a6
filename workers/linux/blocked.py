"""What a call that has to wait, or does not come back, raises."""

from __future__ import annotations

import errno
from collections.abc import Hashable

__all__ = ["LONGEST", "Again", "Blocked", "Ended", "nanoseconds"]

#: Of any time that is waited for, nanoseconds (KTIME_MAX).
LONGEST = (1 << 63) - 1
_SECOND = 10**9


def nanoseconds(seconds: int, rest: int, unit: int = 1) -> int:
    """Of a struct timespec, or with ``unit`` a thousand of a struct timeval. Raises OSError."""
    if seconds < 0 or not 0 <= rest * unit < _SECOND:
        raise OSError(errno.EINVAL, "")
    return min(seconds * _SECOND + rest * unit, LONGEST)


class Blocked(Exception):
    """It cannot be served now: the thread makes it again when one of ``on`` has been notified (``System.notify``), at
    the latest at ``deadline`` (CLOCK_MONOTONIC, in nanoseconds; None: no matter how long that takes). ``again``: it
    waits for the signal that it has to take, and if that does not end it, it is made `Again`."""

    def __init__(self, deadline: int | None = None, on: tuple[Hashable, ...] = (), *, again: bool = False) -> None:
        super().__init__()
        self.deadline, self.on, self.again = deadline, on, again


class Again(Exception):
    """The thread makes the call once more, at once: its worker can serve it now."""


class Ended(Exception):
    """The thread does not come back from this call."""
