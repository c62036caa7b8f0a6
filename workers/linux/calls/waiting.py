"""Waiting for files: poll(2), select(2)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..blocked import nanoseconds
from ..channels import ERR, HUP, IN, OUT, PRI, RDNORM, WRNORM, Channel
from .registry import Blocked, served, signed32
from .signalling import mask_for_call

if TYPE_CHECKING:
    from ..openfiles import OpenFile
    from ..processes import Thread
    from ..system import System

_NVAL = 32                      # uapi/asm-generic/poll.h
_SECOND, _MILLISECOND, _MICROSECOND = 10**9, 10**6, 10**3
_SETS_MAX = 1024        # descriptors in an fd_set
_POLL = struct.Struct("<ihh")


def ready(system: System, file: OpenFile) -> int:
    """What can be done without waiting, as poll(2) says it."""
    return file.ready(system) if isinstance(file, Channel) else IN | RDNORM | OUT | WRNORM


def wait(system: System, thread: Thread, timeout: int | None, found: int, on: Iterable[Channel], mask: int = 0) -> int:
    """``found``: descriptors that are ready; none, and the time (nanoseconds; None: for ever) has not passed: blocked
    ``on`` all of them, with a signal ``mask`` of its own where that has an address. The end is kept in the thread, and
    holds for the call that is made again."""
    if found or timeout == 0:
        return found
    if timeout is not None and thread.deadline is None:
        thread.deadline = system.monotonic() + timeout
    if thread.deadline is not None and system.monotonic() >= thread.deadline:
        return 0
    mask_for_call(system, thread, mask)
    times = [each.due(system) for each in on if each.timed]
    times.append(thread.deadline)
    raise Blocked(min((each for each in times if each is not None), default=None), tuple(each.source for each in on))


def check_mask(thread: Thread, address: int, size: int) -> None:
    """Of a signal mask. Raises OSError, and SegmentationFault."""
    if address and size != 8:
        raise OSError(errno.EINVAL, "")
    if address:
        thread.process.space.read(address, size)


def timespec(thread: Thread, address: int, unit: int) -> int | None:
    """A struct timespec, or with ``unit`` a thousand a struct timeval. Raises OSError."""
    if not address:
        return None
    seconds, rest = struct.unpack("<qq", thread.process.space.read(address, 16))
    return nanoseconds(seconds, rest, unit)


def itimerspec(interval: int, left: int) -> bytes:
    """Of nanoseconds."""
    return struct.pack("<4q", *divmod(interval, _SECOND), *divmod(left, _SECOND))


# --- poll --------------------------------------------------------------------------------------------------------


@served("poll")
def poll(system: System, thread: Thread, address: int, count: int, timeout: int, *_: int) -> int:
    milliseconds = signed32(timeout)
    return _poll(system, thread, address, count, None if milliseconds < 0 else milliseconds * _MILLISECOND)


@served("ppoll")
def ppoll(system: System, thread: Thread, address: int, count: int, timeout: int, mask: int, size: int, *_: int) -> int:
    check_mask(thread, mask, size)
    return _poll(system, thread, address, count, timespec(thread, timeout, 1), mask)


def _poll(system: System, thread: Thread, address: int, count: int, timeout: int | None, mask: int = 0) -> int:
    files, space = thread.process.files, thread.process.space
    if count > files.limit:
        raise OSError(errno.EINVAL, "")
    found, on = 0, set[Channel]()
    data = bytearray(space.read(address, _POLL.size * count))
    for at in range(0, len(data), _POLL.size):
        number, wanted, _ = _POLL.unpack_from(data, at)
        given = 0
        if number >= 0:
            try:
                file = files.get(number)
                if isinstance(file, Channel):
                    on.add(file)
                given = ready(system, file) & (wanted | ERR | HUP)
            except OSError:
                given = _NVAL
        _POLL.pack_into(data, at, number, wanted, given)
        found += bool(given)
    result = wait(system, thread, timeout, found, on, mask)
    space.write(address, bytes(data))
    return result


# --- select ------------------------------------------------------------------------------------------------------


@served("select")
def select(system: System, thread: Thread, count: int, reads: int, writes: int, others: int, timeout: int,
           *_: int) -> int:
    return _select(system, thread, count, (reads, writes, others), timespec(thread, timeout, _MICROSECOND))


@served("pselect6")
def pselect6(system: System, thread: Thread, count: int, reads: int, writes: int, others: int, timeout: int,
             mask: int) -> int:
    address, size = struct.unpack("<QQ", thread.process.space.read(mask, 16)) if mask else (0, 8)
    check_mask(thread, address, size)
    return _select(system, thread, count, (reads, writes, others), timespec(thread, timeout, 1), address)


def _select(system: System, thread: Thread, count: int, sets: Iterable[int], timeout: int | None,
            mask: int = 0) -> int:
    files, space = thread.process.files, thread.process.space
    count = signed32(count)
    if count < 0:
        raise OSError(errno.EINVAL, "")
    size = (min(count, _SETS_MAX) + 63) // 64 * 8
    found, answers, on = 0, [], set[Channel]()
    for address, event in zip(sets, (IN | HUP | ERR, OUT | ERR, PRI), strict=True):
        if not address:
            continue
        wanted = int.from_bytes(space.read(address, size), "little") & (1 << count) - 1
        given = 0
        for number in range(count):
            if not wanted >> number & 1:
                continue
            file = files.get(number)
            if isinstance(file, Channel):
                on.add(file)
            if ready(system, file) & event:
                given |= 1 << number
        found += given.bit_count()
        answers.append((address, given))
    result = wait(system, thread, timeout, found, on, mask)
    for address, given in answers:
        space.write(address, given.to_bytes(size, "little"))
    return result
