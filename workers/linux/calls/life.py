"""Threads and processes that end; signals, as far as they are written down."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from .registry import Ended, served, signed32

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_SIGNALS = 64
_KILL, _STOP = 9, 19
_BLOCK, _UNBLOCK, _SETMASK = 0, 1, 2
_ACTION_SIZE, _STACK_SIZE = 32, 24


@served("exit")
def exit_(system: System, thread: Thread, code: int, *_: int) -> int:
    system.end_thread(thread, code & 255)
    raise Ended


@served("exit_group")
def exit_group(system: System, thread: Thread, code: int, *_: int) -> int:
    system.end_process(thread.process, (code & 255) << 8)
    raise Ended


@served("rt_sigaction")
def rt_sigaction(system: System, thread: Thread, number: int, new: int, old: int, size: int, *_: int) -> int:
    number = signed32(number)
    if size != 8 or not 1 <= number <= _SIGNALS or (new and number in (_KILL, _STOP)):
        raise OSError(errno.EINVAL, "")
    space, actions = thread.process.space, thread.process.actions
    wanted = space.read(new, _ACTION_SIZE) if new else None
    if old:
        space.write(old, actions.get(number, bytes(_ACTION_SIZE)))
    if wanted is not None:
        actions[number] = wanted
    return 0


@served("rt_sigprocmask")
def rt_sigprocmask(system: System, thread: Thread, how: int, new: int, old: int, size: int, *_: int) -> int:
    if size != 8:
        raise OSError(errno.EINVAL, "")
    before = thread.blocked
    if new:
        wanted, = struct.unpack("<Q", thread.process.space.read(new, 8))
        how = signed32(how)
        if how not in (_BLOCK, _UNBLOCK, _SETMASK):
            raise OSError(errno.EINVAL, "")
        now = before | wanted if how == _BLOCK else before & ~wanted if how == _UNBLOCK else wanted
        thread.blocked = now & ~(1 << _KILL - 1 | 1 << _STOP - 1)
    if old:
        thread.process.space.write(old, struct.pack("<Q", before))
    return 0


@served("sigaltstack")
def sigaltstack(system: System, thread: Thread, new: int, old: int, *_: int) -> int:
    wanted = thread.process.space.read(new, _STACK_SIZE) if new else None
    if old:
        thread.process.space.write(old, thread.alternate or struct.pack("<Qi4xQ", 0, 2, 0))     # SS_DISABLE
    if wanted is not None:
        thread.alternate = wanted
    return 0
