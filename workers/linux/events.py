"""Open files that are a counter, or a timer: eventfd(2), timerfd_create(2)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

from .blocked import Blocked
from .channels import ERR, IN, OUT, Channel
from .inodes import Inode

if TYPE_CHECKING:
    from .processes import Thread
    from .system import System

__all__ = ["EventFile", "TimerFile"]

_MOST = (1 << 64) - 1


class EventFile(Channel):
    """``one_by_one``: a read takes one away (EFD_SEMAPHORE), not all. See ``Channel`` for the contract."""

    __slots__ = ("count", "one_by_one")

    whole = True
    least = 8
    label = b"anon_inode:[eventfd]"

    def __init__(self, inode: Inode, flags: int, number: int = 0, *, count: int, one_by_one: bool) -> None:
        super().__init__(inode, flags, number)
        self.count, self.one_by_one = count, one_by_one

    @property
    def source(self) -> object:
        return self

    def take(self, system: System, thread: Thread, count: int) -> bytes:
        if not self.count:
            raise Blocked(on=(self,))
        found = 1 if self.one_by_one else self.count
        self.count -= found
        system.notify(self, OUT)
        return struct.pack("<Q", found)

    def put(self, system: System, thread: Thread, data: bytes) -> int:
        value = int.from_bytes(data[:8], "little")
        if len(data) != 8 or value == _MOST:
            raise OSError(errno.EINVAL, "")
        if self.count + value >= _MOST:
            raise Blocked(on=(self,))
        self.count += value
        system.notify(self, IN)
        return 8

    def save(self) -> dict[str, Any]:
        return super().save() | {"count": self.count, "one_by_one": self.one_by_one}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self.count, self.one_by_one = saved["count"], saved["one_by_one"]

    def ready(self, system: System) -> int:
        return (IN if self.count else 0) | (OUT if self.count < _MOST - 1 else 0) | (ERR if self.count == _MOST else 0)


class TimerFile(Channel):
    """``expiry``: the first that nobody has read of (``System.monotonic``); None: it does not run. See
    ``Channel`` for the contract."""

    __slots__ = ("_noticed", "expiry", "interval", "realtime")

    least = 8
    timed = True
    label = b"anon_inode:[timerfd]"

    def __init__(self, inode: Inode, flags: int, number: int = 0, *, realtime: bool) -> None:
        """It does not run."""
        super().__init__(inode, flags, number)
        self.realtime, self.interval, self._noticed = realtime, 0, False
        self.expiry: int | None = None

    @property
    def source(self) -> object:
        return self

    def expired(self, now: int) -> int:
        """How often, since somebody has read of it."""
        if self.expiry is None or now < self.expiry:
            return 0
        return 1 + (now - self.expiry) // self.interval if self.interval else 1

    def left(self, now: int) -> int:
        """Until it expires next."""
        if self.expiry is None:
            return 0
        return max(0, self.expiry + (self.expired(now) * self.interval) - now)

    def set(self, system: System, expiry: int | None, interval: int) -> None:
        self.expiry, self.interval, self._noticed = expiry, interval, False
        system.notify(self)         # whoever waits knows another time

    def due(self, system: System) -> int | None:
        return None if self._noticed else self.expiry

    def tick(self, system: System) -> None:
        if not self._noticed and self.expired(system.monotonic()):
            self._noticed = True
            system.notify(self, IN)

    def take(self, system: System, thread: Thread, count: int) -> bytes:
        found = self.expired(system.monotonic())
        if not found:
            raise Blocked(self.expiry, (self,))
        assert self.expiry is not None
        self.expiry = self.expiry + found * self.interval if self.interval else None
        self._noticed = False
        return struct.pack("<Q", found)

    def save(self) -> dict[str, Any]:
        return super().save() | {"realtime": self.realtime, "interval": self.interval, "noticed": self._noticed,
                                 "expiry": self.expiry}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self.realtime, self.interval, self._noticed = saved["realtime"], saved["interval"], saved["noticed"]
        self.expiry = saved["expiry"]

    def ready(self, system: System) -> int:
        return IN if self.expired(system.monotonic()) else 0
