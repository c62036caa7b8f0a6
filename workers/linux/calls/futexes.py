"""futex(2), as far as it comes here: workers serve it themselves, with the host's futexes (workers/futexes.py), where
the pages are there and their own; else they are made so here, and the call is made again. FUTEX_WAKE_OP is served here:
it stores into memory."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from ipc.linux import futex as host_futex

from ..blocked import Again, Blocked
from ..space import SegmentationFault
from .registry import served

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_COMMAND = 127
_WAIT, _REQUEUE, _CMP_REQUEUE, _WAKE_OP, _WAIT_BITSET = 0, 3, 4, 5, 9
_SERVED = (0, 1, 3, 4, 5, 9, 10)


@served("futex")
def futex(system: System, thread: Thread, address: int, operation: int, value: int, timeout: int, second: int,
          third: int) -> int:
    command = operation & _COMMAND
    if command not in _SERVED:
        raise OSError(errno.ENOSYS, "")
    if address % 4 or (command in (_REQUEUE, _CMP_REQUEUE, _WAKE_OP) and second % 4):
        raise OSError(errno.EINVAL, "")
    space = thread.process.space
    pages = [address, *([second] if command in (_REQUEUE, _CMP_REQUEUE, _WAKE_OP) else [])]
    for each in pages:
        try:
            space.own(each)
        except SegmentationFault:
            raise OSError(errno.EFAULT, "") from None
    if command == _WAKE_OP:
        (one, offset), (frame, other) = space.place_of(address), space.place_of(second)
        place = system.launcher.host_address
        result = host_futex.operate(place(one, offset), command, value, timeout, place(frame, other), third)
        system.launcher.wrote(frame)
        return result
    if command in (_WAIT, _WAIT_BITSET):
        if timeout:
            seconds, rest = struct.unpack("<qq", space.read(timeout, 16))
            if seconds < 0 or not 0 <= rest < 10**9:
                raise OSError(errno.EINVAL, "")
            for each in (timeout, timeout + 15):
                space.own(each)
        if system.deliverable(thread):
            raise Blocked(again=True)
    raise Again
