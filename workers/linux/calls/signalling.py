"""Signals: what is done at them, who blocks them, who sends them, who waits for them."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from .. import signals
from ..blocked import Blocked, nanoseconds
from ..population import SI_TKILL, SI_USER
from ..signals import ALL, UNBLOCKABLE, Action, SignalInfo
from .registry import served, signed32

if TYPE_CHECKING:
    from ..processes import Process, Thread
    from ..system import System

_BLOCK, _UNBLOCK, _SETMASK = 0, 1, 2
_STACK = struct.Struct("<Qi4xQ")
_ON_STACK, _DISABLE, _AUTODISARM, _MINSIGSTKSZ = 1, 2, 1 << 31, 2048
_RSP = 6
_SECOND, _MICROSECOND = 10**9, 10**3


@served("rt_sigaction")
def rt_sigaction(system: System, thread: Thread, number: int, new: int, old: int, size: int, *_: int) -> int:
    number = signed32(number)
    if size != 8 or not 1 <= number <= signals.LAST or (new and signals.bit(number) & UNBLOCKABLE):
        raise OSError(errno.EINVAL, "")
    process = thread.process
    wanted = Action.asked(process.space.read(new, signals.ACTION.size)) if new else None
    if old:
        process.space.write(old, process.action(number).pack())
    if wanted is not None:
        process.actions[number] = wanted
        if wanted.ignores or (wanted.is_default and signals.default_of(number) is signals.Default.IGNORE):
            system.discard_signals(process, {number})
    return 0


@served("rt_sigprocmask")
def rt_sigprocmask(system: System, thread: Thread, how: int, new: int, old: int, size: int, *_: int) -> int:
    if size != 8:
        raise OSError(errno.EINVAL, "")
    before = thread.blocked
    if new:
        wanted = _mask(thread, new)
        how = signed32(how)
        if how not in (_BLOCK, _UNBLOCK, _SETMASK):
            raise OSError(errno.EINVAL, "")
        now = before | wanted if how == _BLOCK else before & ~wanted if how == _UNBLOCK else wanted
        thread.blocked = now & ~UNBLOCKABLE
    if old:
        thread.process.space.write(old, struct.pack("<Q", before))
    return 0


def _mask(thread: Thread, address: int) -> int:
    found, = struct.unpack("<Q", thread.process.space.read(address, 8))
    return int(found)


@served("rt_sigpending")
def rt_sigpending(system: System, thread: Thread, address: int, size: int, *_: int) -> int:
    found = 0
    for each in (*thread.pending, *thread.process.pending):
        found |= signals.bit(each.number)
    thread.process.space.write(address, struct.pack("<Q", found & thread.blocked)[:size])
    return 0


@served("sigaltstack")
def sigaltstack(system: System, thread: Thread, new: int, old: int, *_: int) -> int:
    base, flags, size = _STACK.unpack(thread.alternate) if thread.alternate else (0, _DISABLE, 0)
    on = bool(size) and base < thread.registers[_RSP] <= base + size
    wanted = thread.process.space.read(new, _STACK.size) if new else None
    if old:
        thread.process.space.write(old, _STACK.pack(base, _ON_STACK if on else flags, size))
    if wanted is not None:
        if on:
            raise OSError(errno.EPERM, "")
        _, flags, size = _STACK.unpack(wanted)
        if flags & 0x7FFF_FFFF not in (0, _ON_STACK, _DISABLE):
            raise OSError(errno.EINVAL, "")
        if flags & _DISABLE:
            thread.alternate = b""
            return 0
        if size < _MINSIGSTKSZ:
            raise OSError(errno.ENOMEM, "")
        thread.alternate = wanted
    return 0


@served("rt_sigreturn")
def rt_sigreturn(system: System, thread: Thread, *_: int) -> int:
    """Back to what a handler has interrupted."""
    frame = signals.parse_frame(thread.process.space, thread.registers[_RSP])
    for at, value in enumerate(frame.registers):
        thread.registers[at] = value
    thread.blocked = frame.mask & ~UNBLOCKABLE
    thread.xsave = frame.xsave
    thread.jumps = True
    return 0


# --- sending --------------------------------------------------------------------------------------------------------


@served("kill")
def kill(system: System, thread: Thread, pid: int, number: int, *_: int) -> int:
    pid, number = signed32(pid), _number(number)
    if pid > 0:
        process = system.processes.get(pid) or (system.threads[pid].process if pid in system.threads else None)
        targets = [process] if process is not None else []
    elif pid == -1:
        targets = [each for each in system.processes.values() if each is not thread.process and each.pid != 1]
    else:
        group = -pid or thread.process.group
        targets = [each for each in system.processes.values() if each.group == group]
    if not targets:
        raise OSError(errno.ESRCH, "")
    allowed = [each for each in targets if _may_signal(thread.process, each, number)]
    if not allowed:
        raise OSError(errno.EPERM, "")
    for each in allowed:
        if number:
            system.signal_process(each, _from(thread, number, SI_USER))
    return 0


def _from(thread: Thread, number: int, code: int) -> SignalInfo:
    return SignalInfo(number, code, thread.process.pid, thread.process.users.real)


def _may_signal(process: Process, target: Process, number: int) -> bool:
    """As kill(2) has it."""
    mine, theirs = process.users, target.users
    return (process.is_privileged or bool({mine.real, mine.effective} & {theirs.real, theirs.saved})
            or (number == signals.CONT and process.session == target.session))


@served("tkill")
def tkill(system: System, thread: Thread, tid: int, number: int, *_: int) -> int:
    return _to_thread(system, thread, tid, None, _from(thread, _number(number), SI_TKILL))


@served("tgkill")
def tgkill(system: System, thread: Thread, pid: int, tid: int, number: int, *_: int) -> int:
    return _to_thread(system, thread, tid, pid, _from(thread, _number(number), SI_TKILL))


@served("rt_sigqueueinfo")
def rt_sigqueueinfo(system: System, thread: Thread, pid: int, number: int, address: int, *_: int) -> int:
    info = _queued(thread, number, address, signed32(pid))
    target = system.threads.get(signed32(pid))      # also by the number of another thread than the first
    process = system.process(signed32(pid)) if target is None else target.process
    if not _may_signal(thread.process, process, info.number):
        raise OSError(errno.EPERM, "")
    if info.number:
        system.signal_process(process, info)
    return 0


@served("rt_tgsigqueueinfo")
def rt_tgsigqueueinfo(system: System, thread: Thread, pid: int, tid: int, number: int, address: int, *_: int) -> int:
    return _to_thread(system, thread, tid, pid, _queued(thread, number, address, signed32(pid)))


def _queued(thread: Thread, number: int, address: int, to: int) -> SignalInfo:
    """Nobody can say to another process that the kernel or tkill(2) has sent it. Raises OSError."""
    raw = thread.process.space.read(address, 128)
    code, = struct.unpack_from("<i", raw, 8)
    if (code >= 0 or code == SI_TKILL) and to != thread.process.pid:
        raise OSError(errno.EPERM, "")
    return SignalInfo(_number(number), code, raw=struct.pack("<i", _number(number)) + raw[4:])


def _to_thread(system: System, thread: Thread, tid: int, pid: int | None, info: SignalInfo) -> int:
    """``pid``: of its process. Raises OSError."""
    if signed32(tid) <= 0 or (pid is not None and signed32(pid) <= 0):
        raise OSError(errno.EINVAL, "")
    target = system.thread(signed32(tid))
    if pid is not None and target.process.pid != signed32(pid):
        raise OSError(errno.ESRCH, "")
    if not _may_signal(thread.process, target.process, info.number):
        raise OSError(errno.EPERM, "")
    if info.number:
        system.signal_thread(target, info)
    return 0


def _number(number: int) -> int:
    number = signed32(number)
    if not 0 <= number <= signals.LAST:
        raise OSError(errno.EINVAL, "")
    return number


# --- waiting for them -----------------------------------------------------------------------------------------------


@served("pause")
def pause(system: System, thread: Thread, *_: int) -> int:
    raise Blocked


@served("rt_sigsuspend")
def rt_sigsuspend(system: System, thread: Thread, address: int, size: int, *_: int) -> int:
    if size != 8:
        raise OSError(errno.EINVAL, "")
    mask_for_call(system, thread, address)
    raise Blocked


def mask_for_call(system: System, thread: Thread, address: int) -> None:
    """While this call waits, the thread blocks these signals instead (address 0: nothing changes)."""
    if address and thread.saved_mask is None:
        thread.saved_mask, thread.blocked = thread.blocked, _mask(thread, address) & ~UNBLOCKABLE
        if system.deliverable(thread):
            raise OSError(errno.EINTR, "")


@served("rt_sigtimedwait")
def rt_sigtimedwait(system: System, thread: Thread, wanted: int, info: int, timeout: int, size: int, *_: int) -> int:
    if size != 8:
        raise OSError(errno.EINVAL, "")
    mask = _mask(thread, wanted) & ~UNBLOCKABLE & ALL
    thread.awaited = 0
    found = system.take_signal(thread, mask)
    if found is not None:
        if info:
            thread.process.space.write(info, found.pack())
        return found.number
    if timeout and thread.deadline is None:
        length = nanoseconds(*struct.unpack("<qq", thread.process.space.read(timeout, 16)))
        thread.deadline = system.monotonic() + length
    if thread.deadline is not None and system.monotonic() >= thread.deadline:
        raise OSError(errno.EAGAIN, "")
    thread.awaited = mask
    raise Blocked(thread.deadline, on=(("signals", thread.tid),))


# --- the timer of a process -----------------------------------------------------------------------------------------


@served("alarm")
def alarm(system: System, thread: Thread, seconds: int, *_: int) -> int:
    left = _set_alarm(system, thread, (seconds & 0xFFFF_FFFF) * _SECOND, 0)[0]
    return -(-left // _SECOND)


@served("setitimer")
def setitimer(system: System, thread: Thread, which: int, new: int, old: int, *_: int) -> int:
    if signed32(which):
        raise OSError(errno.EINVAL, "")     # of processor time there is none
    four = struct.unpack("<4q", thread.process.space.read(new, 32)) if new else (0, 0, 0, 0)
    interval, value = (nanoseconds(four[at], four[at + 1], _MICROSECOND) for at in (0, 2))
    _write_timer(thread, old, *_set_alarm(system, thread, value, interval))
    return 0


@served("getitimer")
def getitimer(system: System, thread: Thread, which: int, address: int, *_: int) -> int:
    if signed32(which):
        raise OSError(errno.EINVAL, "")
    at, interval = thread.process.alarm
    _write_timer(thread, address, max(0, at - system.monotonic()) if at else 0, interval)
    return 0


def _set_alarm(system: System, thread: Thread, value: int, interval: int) -> tuple[int, int]:
    """(time left, interval) of the one before, in nanoseconds."""
    process, now = thread.process, system.monotonic()
    at, before = process.alarm
    process.alarm = (now + value if value else 0, interval)
    return max(1, at - now) if at else 0, before


def _write_timer(thread: Thread, address: int, value: int, interval: int) -> None:
    if address:
        parts = [part for each in (interval, value) for part in (each // _SECOND, each % _SECOND // _MICROSECOND)]
        thread.process.space.write(address, struct.pack("<4q", *parts))
