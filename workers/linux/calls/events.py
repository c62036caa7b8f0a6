"""Counters, timers, and waiting for many files: eventfd(2), timerfd_create(2), epoll(7)."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from ..channels import Channel, nameless
from ..epoll import EXCLUSIVE, Epoll
from ..events import EventFile, TimerFile
from .registry import served, signed32
from .waiting import check_mask, itimerspec, timespec, wait

if TYPE_CHECKING:
    from ..openfiles import OpenFile
    from ..processes import Thread
    from ..system import System

_MODE = 0o600
_MILLISECOND = 10**6


def _check_flags(flags: int, allowed: int) -> int:
    """Raises OSError."""
    if flags & 0xFFFF_FFFF & ~allowed:
        raise OSError(errno.EINVAL, "")
    return flags & os.O_NONBLOCK


# --- eventfd -----------------------------------------------------------------------------------------------------

_SEMAPHORE = 1


@served("eventfd")
def eventfd(system: System, thread: Thread, count: int, *_: int) -> int:
    return eventfd2(system, thread, count, 0)


@served("eventfd2")
def eventfd2(system: System, thread: Thread, count: int, flags: int, *_: int) -> int:
    kept = _check_flags(flags, os.O_CLOEXEC | os.O_NONBLOCK | _SEMAPHORE)
    file = EventFile(nameless(system.files.store, _MODE), os.O_RDWR | kept, count=count & 0xFFFF_FFFF,
                     one_by_one=bool(flags & _SEMAPHORE))
    return thread.process.files.add(file, close_on_exec=bool(flags & os.O_CLOEXEC))


# --- timerfd -----------------------------------------------------------------------------------------------------

_REALTIME, _CLOCKS = (0, 8), (0, 1, 7, 8, 9)        # and its alarm; monotonic, since boot, and its alarm
_ABSOLUTE, _CANCEL = 1, 2


@served("timerfd_create")
def timerfd_create(system: System, thread: Thread, clock: int, flags: int, *_: int) -> int:
    kept = _check_flags(flags, os.O_CLOEXEC | os.O_NONBLOCK)
    if signed32(clock) not in _CLOCKS:
        raise OSError(errno.EINVAL, "")
    file = TimerFile(nameless(system.files.store, _MODE), os.O_RDWR | kept, realtime=signed32(clock) in _REALTIME)
    return thread.process.files.add(file, close_on_exec=bool(flags & os.O_CLOEXEC))


def _timer(thread: Thread, fd: int) -> TimerFile:
    file = thread.process.files.get(signed32(fd))
    if not isinstance(file, TimerFile):
        raise OSError(errno.EINVAL, "")
    return file


def _current(timer: TimerFile, now: int) -> bytes:
    return itimerspec(timer.interval, timer.left(now))


@served("timerfd_settime")
def timerfd_settime(system: System, thread: Thread, fd: int, flags: int, new: int, old: int, *_: int) -> int:
    interval, value = timespec(thread, new, 1), timespec(thread, new + 16, 1)
    if flags & 0xFFFF_FFFF & ~(_ABSOLUTE | _CANCEL) or interval is None or value is None:
        raise OSError(errno.EINVAL, "")
    timer, now = _timer(thread, fd), system.monotonic()
    before = _current(timer, now)
    if flags & _ABSOLUTE and value:
        value -= (system.realtime() - now) if timer.realtime else 0
        timer.set(system, max(value, 0), interval)
    else:
        timer.set(system, now + value if value else None, interval)
    if old:
        thread.process.space.write(old, before)
    return 0


@served("timerfd_gettime")
def timerfd_gettime(system: System, thread: Thread, fd: int, address: int, *_: int) -> int:
    thread.process.space.write(address, _current(_timer(thread, fd), system.monotonic()))
    return 0


# --- epoll -------------------------------------------------------------------------------------------------------

_ADD, _REMOVE, _MODIFY = 1, 2, 3
_EVENT = struct.Struct("<IQ")
_EVENTS_MAX = 0x7FFF_FFFF // 12
_WITH_EXCLUSIVE = 0x1 | 0x4 | 0x8 | 0x10 | 1 << 29 | 1 << 31 | EXCLUSIVE     # what goes together with it


@served("epoll_create")
def epoll_create(system: System, thread: Thread, size: int, *_: int) -> int:
    if signed32(size) <= 0:
        raise OSError(errno.EINVAL, "")
    return epoll_create1(system, thread, 0)


@served("epoll_create1")
def epoll_create1(system: System, thread: Thread, flags: int, *_: int) -> int:
    _check_flags(flags, os.O_CLOEXEC)
    file = Epoll(nameless(system.files.store, _MODE), os.O_RDWR, everywhere=system.interests)
    return thread.process.files.add(file, close_on_exec=bool(flags & os.O_CLOEXEC))


def _epoll(file: OpenFile) -> Epoll:
    if not isinstance(file, Epoll):
        raise OSError(errno.EINVAL, "")
    return file


@served("epoll_ctl")
def epoll_ctl(system: System, thread: Thread, at: int, operation: int, fd: int, event: int, *_: int) -> int:
    operation, number = signed32(operation), signed32(fd)
    events, data = (0, 0) if operation == _REMOVE else _EVENT.unpack(thread.process.space.read(event, _EVENT.size))
    files = thread.process.files
    epoll, file = files.get(signed32(at)), files.get(number)
    if not isinstance(file, Channel):
        raise OSError(errno.EPERM, "")
    if file is epoll:
        raise OSError(errno.EINVAL, "")
    found = _epoll(epoll)
    if events & EXCLUSIVE and (operation == _MODIFY or (operation == _ADD and (
            isinstance(file, Epoll) or events & ~_WITH_EXCLUSIVE))):
        raise OSError(errno.EINVAL, "")
    if operation == _ADD:
        found.add(system, number, file, events, data)
    elif operation == _MODIFY:
        found.modify(system, number, file, events, data)
    elif operation == _REMOVE:
        found.remove(number, file)
    else:
        raise OSError(errno.EINVAL, "")
    return 0


def _milliseconds(timeout: int) -> int | None:
    found = signed32(timeout)
    return None if found < 0 else found * _MILLISECOND


@served("epoll_wait")
def epoll_wait(system: System, thread: Thread, at: int, address: int, most: int, timeout: int, *_: int) -> int:
    return _wait(system, thread, at, address, most, _milliseconds(timeout), 0, 8)


@served("epoll_pwait")
def epoll_pwait(system: System, thread: Thread, at: int, address: int, most: int, timeout: int, mask: int,
                size: int) -> int:
    return _wait(system, thread, at, address, most, _milliseconds(timeout), mask, size)


@served("epoll_pwait2")
def epoll_pwait2(system: System, thread: Thread, at: int, address: int, most: int, timeout: int, mask: int,
                 size: int) -> int:
    return _wait(system, thread, at, address, most, timespec(thread, timeout, 1), mask, size)


def _wait(system: System, thread: Thread, at: int, address: int, most: int, timeout: int | None, mask: int,
          size: int) -> int:
    check_mask(thread, mask, size)
    most = signed32(most)
    if not 0 < most <= _EVENTS_MAX:
        raise OSError(errno.EINVAL, "")
    epoll = _epoll(thread.process.files.get(signed32(at)))
    found = epoll.collect(system, most)
    result = wait(system, thread, timeout, len(found), (epoll,), mask)
    thread.process.space.write(address, b"".join(_EVENT.pack(*each) for each in found))
    return result
