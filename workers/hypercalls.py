"""The hypercall port: yield, wait on a word of memory, wake, sleep (workers/ports.py has the contract).

Whatever a guest asks for ends in a result, or in :class:`BadHypercall`, which is the end of that vCPU alone.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from ipc.layout import VcpuControl, VcpuState
from ipc.linux import futex

from .accel.base import Accelerator
from .memory import GuestMemory

__all__ = ["BadHypercall", "Thread", "carry_out"]

_YIELD, _WAIT, _WAKE, _SLEEP = range(4)
_UNKNOWN = 0xFFFF_FFFF      # the result of a hypercall that there is not
_WORD = 4                   # bytes
_MISSING_STEP = 0.01        # seconds between two tries on a page that is missing
_SLEEP_STEP = 3600.0        # seconds: a guest may ask for more than select takes

_Result = TypeVar("_Result")


class BadHypercall(Exception):
    """The guest asked for what cannot be; the text says what."""


class Thread(Protocol):
    """What a hypercall that takes its time needs of the vCPU thread."""

    def ends_in_hypercall(self) -> bool:
        """Serve kicks and pauses; True when the vCPU is to end."""
        ...

    def sleep(self, seconds: float | None = None) -> None:
        """Until somebody wants something, or the time is over."""


def carry_out(thread: Thread, accel: Accelerator, memory: GuestMemory, control: VcpuControl) -> None:
    """The hypercall that ``accel.run`` has just returned for. Raises BadHypercall."""
    number, rdi, rsi = accel.hypercall_args()
    # At once, so that a state taken during a long wait is that of a wait which ended: a guest has to
    # look again after waking anyway.
    accel.set_hypercall_result(0)
    result = 0
    if number == _YIELD:
        os.sched_yield()
    elif number == _WAIT:
        _wait(thread, memory, control, rdi, rsi & 0xFFFF_FFFF)
    elif number == _WAKE:
        result = _wake(thread, memory, rdi, rsi & 0xFFFF_FFFF)
    elif number == _SLEEP:
        _sleep(thread, control, time.monotonic() + rdi / 1e6)
    else:
        result = _UNKNOWN
    if result:
        accel.set_hypercall_result(result)


def _word(memory: GuestMemory, gpa: int) -> int:
    """Host address of a u32. Raises BadHypercall."""
    if gpa % _WORD:
        raise BadHypercall(f"guest address {gpa:#x} is not a multiple of {_WORD}")
    try:
        return memory.host_address(gpa, _WORD)
    except KeyError as exc:
        raise BadHypercall(str(exc.args[0])) from None


def _wait(thread: Thread, memory: GuestMemory, control: VcpuControl, gpa: int, expected: int) -> None:
    """Guest futex wait. What the coordinator wants is served in between: it may even take the slot away, so the
    word is looked up again each time."""
    while not thread.ends_in_hypercall():
        control.state = VcpuState.WAITING
        if _present(thread, lambda: futex.wait(_word(memory, gpa), expected)):
            return


def _wake(thread: Thread, memory: GuestMemory, gpa: int, count: int) -> int:
    _word(memory, gpa)
    woken = None if count else 0        # the kernel takes 0 for 1
    while woken is None and not thread.ends_in_hypercall():
        woken = _present(thread, lambda: futex.wake(_word(memory, gpa), count))
    return woken or 0


def _present(thread: Thread, call: Callable[[], _Result]) -> _Result | None:
    """The call's result; None when a kick came while it waited for a page that is missing (post-copy): to the
    kernel that is a bad address."""
    try:
        return call()
    except OSError as exc:
        if exc.errno != errno.EFAULT:
            raise
    thread.sleep(_MISSING_STEP)
    return None


def _sleep(thread: Thread, control: VcpuControl, deadline: float) -> None:
    while not thread.ends_in_hypercall():
        control.state = VcpuState.WAITING
        left = deadline - time.monotonic()
        if left <= 0:
            return
        thread.sleep(min(left, _SLEEP_STEP))
