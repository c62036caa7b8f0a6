"""Which thread of a process makes the call, and why not another.

One that waits in a call which goes on as if nothing had been (futex, poll, a sleep) comes first, then one that
computes, then other calls, and last those that end with EINTR whenever the thread is stopped (epoll_wait).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ipc.linux.foreign import Mapping, call_of, status, threads
from ipc.linux.ptrace import Registers

__all__ = ["INSTEAD", "Candidate", "candidates", "stack_unfit", "why_none"]

#: For a process that cannot be watched; whichever verb it was.
INSTEAD = "(vmm watch --sample works without it)"

#: Calls that go on after a stop, by number (x86-64).
_GOES_ON = {7: "poll", 23: "select", 35: "nanosleep", 61: "wait4", 202: "futex", 230: "clock_nanosleep", 247: "waitid",
            270: "pselect6", 271: "ppoll", 449: "futex_waitv"}
#: And those that end with EINTR.
_ENDS = {65: "semop", 70: "msgrcv", 128: "rt_sigtimedwait", 208: "io_getevents", 220: "semtimedop", 232: "epoll_wait",
         281: "epoll_pwait", 441: "epoll_pwait2"}
_USER_CODE = 0x33       # the code segment of 64-bit programs
_STACK_ROOM = 32 << 10  # bytes below the stack pointer, of a stack that does not grow
_GUARD_MAX = 1 << 20


class Candidate(NamedTuple):
    """A thread that may be asked; the lower ``order``, the sooner."""

    order: int
    tid: int
    doing: str      # for a person: "futex", "running", "call 16"

    @property
    def interrupted(self) -> bool:
        """Its call ends with EINTR when it is stopped."""
        return self.order == 3


def candidates(pid: int, refused: Counter[str]) -> list[Candidate]:
    """In the order in which they are tried; the reasons why others are not are counted. Raises OSError when the
    process has ended, or may not be looked into."""
    found = []
    for tid in threads(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):    # it has ended
            reason = _unfit(status(pid, tid))
            if reason:
                refused[reason] += 1
                continue
            found.append(_candidate(tid, call_of(pid, tid)))
    return sorted(found)


def _candidate(tid: int, call: int | None) -> Candidate:
    if call is None:
        return Candidate(1, tid, "running")
    if call in _GOES_ON:
        return Candidate(0, tid, _GOES_ON[call])
    return Candidate(3, tid, _ENDS[call]) if call in _ENDS else Candidate(2, tid, f"call {call}")


def _unfit(told: dict[str, str]) -> str:
    """Why a thread is not even stopped, by its status."""
    state = told.get("State", "?")[:1]
    if told.get("TracerPid", "0") != "0":
        return f"traced by process {told['TracerPid']} (a debugger, strace)"
    if state == "T":
        return "stopped by a signal (SIGCONT lets it go on)"
    if state in "ZX":
        return "ended"
    if state == "D":
        return "in a wait that cannot be interrupted"
    if told.get("Seccomp", "0") != "0":
        return f"under a seccomp filter, which might end the process for the call {INSTEAD}"
    if "shstk" in told.get("x86_Thread_features", ""):
        return "on a shadow stack"
    return ""


def stack_unfit(registers: Registers, there: Iterable[Mapping], main: bool, needed: int) -> str:
    """Why what is below its stack pointer is not known to be unused stack, ``needed`` bytes of it; "" when it is.
    ``main``: the process's first thread."""
    if registers.cs != _USER_CODE:
        return "in 32-bit code"
    before: Mapping | None = None
    for mapping in there:
        if mapping.start <= registers.rsp < mapping.end:
            break
        before = mapping
    else:
        return "without a stack"
    room = registers.rsp - mapping.start
    if mapping.name == "[stack]":
        if not main:
            return "on the stack of another thread"
        return "" if room >= needed else "at the end of its stack as it is now"
    if not (mapping.private and mapping.anonymous and mapping.mode[:2] == "rw"):
        return "on a stack of its program's own"
    if before is None or before.end != mapping.start or before.mode[:3] != "---" or before.size > _GUARD_MAX:
        return "on a stack of its program's own, without a guard below it"
    if not registers.rsp < registers.fs_base < mapping.end:
        return "on a stack of its program's own, not that of its thread"
    return "" if room >= max(needed, _STACK_ROOM) else "near the end of its stack"


def why_none(refused: Counter[str]) -> str:
    """For a person."""
    if len(refused) == 1:
        reason, count = next(iter(refused.items()))
        return f"its thread is {reason}" if count == 1 else f"each of its {count} threads is {reason}"
    return "its threads are " + "; ".join(f"{reason} ({count})" for reason, count in refused.most_common())
