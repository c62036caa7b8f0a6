"""Timers of a process that are not its alarm (timer_create(2)). Of processor time there are none."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from .. import signals
from ..blocked import nanoseconds
from ..timers import Timer
from .registry import served, signed32
from .waiting import itimerspec

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_REALTIME, _CLOCKS = (0, 8, 11), (0, 1, 7, 8, 9, 11)    # and its alarm, and TAI; monotonic, since boot, and its alarm
_SIGNAL, _NONE, _THREAD, _THREAD_ID = 0, 1, 2, 4        # SIGEV_*, uapi/asm-generic/siginfo.h
_ABSOLUTE = 1                                           # TIMER_ABSTIME
_EVENT = struct.Struct("<Qiii44x")


def _timer(thread: Thread, number: int) -> Timer:
    """Raises OSError."""
    found = thread.process.timers.get(signed32(number))
    if found is None:
        raise OSError(errno.EINVAL, "")
    return found


@served("timer_create")
def timer_create(system: System, thread: Thread, clock: int, event: int, address: int, *_: int) -> int:
    process, clock = thread.process, signed32(clock)
    if clock not in _CLOCKS:
        raise OSError(errno.EINVAL, "")
    given = _EVENT.unpack(process.space.read(event, _EVENT.size)) if event else None
    number = process.next_timer
    process.next_timer += 1         # in Linux too, whatever comes of it
    value, signal, notify, tid = given or (number, signals.ALRM, _SIGNAL, 0)
    if notify not in (_SIGNAL, _NONE, _THREAD, _SIGNAL | _THREAD_ID):
        raise OSError(errno.EINVAL, "")
    if notify & _THREAD_ID:
        found = system.threads.get(tid)
        if found is None or found.process is not process:
            raise OSError(errno.EINVAL, "")
    if notify != _NONE and not 0 < signal <= signals.LAST:
        raise OSError(errno.EINVAL, "")
    process.space.write(address, struct.pack("<i", number))
    process.timers[number] = Timer(clock, 0 if notify == _NONE else signal, value, tid if notify & _THREAD_ID else 0)
    return 0


@served("timer_settime")
def timer_settime(system: System, thread: Thread, number: int, flags: int, new: int, old: int, *_: int) -> int:
    if not new:
        raise OSError(errno.EINVAL, "")
    four = struct.unpack("<4q", thread.process.space.read(new, 32))
    interval, value = (nanoseconds(four[at], four[at + 1]) for at in (0, 2))
    timer, now = _timer(thread, number), system.monotonic()
    before = _left(timer, now)
    at = now + value
    if signed32(flags) & _ABSOLUTE:     # perhaps long ago: then it has been over often
        at -= system.realtime() if timer.clock in _REALTIME else now
    timer.at, timer.interval = (max(1, at), interval) if value else (0, 0)
    timer.overrun = timer.missed = 0
    if old:
        thread.process.space.write(old, before)
    return 0


@served("timer_gettime")
def timer_gettime(system: System, thread: Thread, number: int, address: int, *_: int) -> int:
    thread.process.space.write(address, _left(_timer(thread, number), system.monotonic()))
    return 0


def _left(timer: Timer, now: int) -> bytes:
    """struct itimerspec. One that sends nothing, or not now, goes on only when it is looked at."""
    if not timer.due:
        timer.missed += timer.expire(now)
    left = max(1, timer.at - now) if timer.at else 0
    return itimerspec(timer.interval, left)


@served("timer_getoverrun")
def timer_getoverrun(system: System, thread: Thread, number: int, *_: int) -> int:
    return _timer(thread, number).overrun


@served("timer_delete")
def timer_delete(system: System, thread: Thread, number: int, *_: int) -> int:
    _timer(thread, number)
    del thread.process.timers[signed32(number)]
    return 0
