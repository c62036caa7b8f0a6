"""Time."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from ..blocked import nanoseconds
from .registry import Blocked, served, signed32

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_SECOND = 10**9
_REALTIME = 0, 5                            # and CLOCK_REALTIME_COARSE; all others count from the start of the machine
_CLOCKS = frozenset(range(12)) - {10}
_TO_SLEEP_BY = frozenset({0, 1, 7, 8, 9, 11})
_PROCESS, _THREAD = 2, 3                    # CLOCK_PROCESS_CPUTIME_ID, CLOCK_THREAD_CPUTIME_ID
_TIMER_ABSTIME = 1


def _now(system: System, thread: Thread, clock: int) -> int:
    if clock < 0:       # of a process or a thread (asm-generic/posix_types.h, posix-timers.h)
        number = ~(clock >> 3)
        if clock & 3 == 3:
            raise OSError(errno.EINVAL, "")
        try:
            if clock & 4:
                return (system.thread(number) if number else thread).cpu_ns
            return (system.process(number) if number else thread.process).cpu_ns
        except ProcessLookupError:
            raise OSError(errno.EINVAL, "") from None
    if clock not in _CLOCKS:
        raise OSError(errno.EINVAL, "")
    if clock in (_PROCESS, _THREAD):
        return thread.process.cpu_ns if clock == _PROCESS else thread.cpu_ns
    return system.realtime() if clock in _REALTIME else system.monotonic()


@served("clock_gettime")
def clock_gettime(system: System, thread: Thread, clock: int, address: int, *_: int) -> int:
    thread.process.space.write(address, struct.pack("<qq", *divmod(_now(system, thread, signed32(clock)), _SECOND)))
    return 0


@served("clock_getres")
def clock_getres(system: System, thread: Thread, clock: int, address: int, *_: int) -> int:
    _now(system, thread, signed32(clock))
    if address:
        thread.process.space.write(address, struct.pack("<qq", 0, 1))
    return 0


@served("gettimeofday")
def gettimeofday(system: System, thread: Thread, address: int, zone: int, *_: int) -> int:
    seconds, rest = divmod(system.realtime(), _SECOND)
    if address:
        thread.process.space.write(address, struct.pack("<qq", seconds, rest // 1000))
    if zone:
        thread.process.space.write(zone, bytes(8))
    return 0


@served("time")
def time(system: System, thread: Thread, address: int, *_: int) -> int:
    seconds = system.realtime() // _SECOND
    if address:
        thread.process.space.write(address, struct.pack("<q", seconds))
    return seconds


@served("nanosleep")
def nanosleep(system: System, thread: Thread, address: int, *_: int) -> int:
    return _sleep(system, thread, 1, address, absolute=False)


@served("clock_nanosleep")
def clock_nanosleep(system: System, thread: Thread, clock: int, flags: int, address: int, *_: int) -> int:
    clock = signed32(clock)
    if clock not in _TO_SLEEP_BY:
        _now(system, thread, clock)
        raise OSError(errno.EOPNOTSUPP, "")
    return _sleep(system, thread, clock, address, absolute=bool(flags & _TIMER_ABSTIME))


def _sleep(system: System, thread: Thread, clock: int, address: int, *, absolute: bool) -> int:
    """The end is kept in the thread: the call is made again until it has come."""
    if thread.deadline is None:
        length = nanoseconds(*struct.unpack("<qq", thread.process.space.read(address, 16)))
        length -= _now(system, thread, clock) if absolute else 0
        thread.deadline = system.monotonic() + max(0, length)
    if system.monotonic() < thread.deadline:
        raise Blocked(thread.deadline)
    return 0
