"""Futexes of Linux programs, served by the worker itself: the words lie in shared memory, so the host's own futexes
work between vCPU processes (the key is the page of the segment). Whether a program says that a futex is private to it
makes no difference then.

Only pages that are there, and the program's own to write to, are looked at: another may get a frame of its own at any
time, and whoever waits on the old one would not be woken. The system makes such pages so (workers/linux/calls/
futexes.py) and has the call made again.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ipc.gates import Waits
from ipc.linux import futex
from ipc.messages import SlotSpec
from ipc.shm import PAGE_SIZE
from ipc.spin import Spin

from .memory import Slot

__all__ = ["FutexCall", "Futexes"]

# uapi/linux/futex.h
_WAIT, _WAKE, _REQUEUE, _CMP_REQUEUE, _WAIT_BITSET, _WAKE_BITSET = 0, 1, 3, 4, 9, 10
_COMMAND, _CLOCK_REALTIME = 127, 256
_ANY = 0xFFFF_FFFF
_SECOND = 10**9

_PRESENT, _WRITE = 1, 2
_FRAME = 0x000F_FFFF_FFFF_F000


@dataclass(slots=True)
class FutexCall:
    """A wait that can be left and taken up again. ``deadline``: nanoseconds of its clock."""

    address: int
    expected: int
    mask: int
    deadline: int | None
    realtime: bool


class Futexes:
    """``root``: of the page tables in the system slot, whose memory is ``system``. ``waits``: where it says on what it
    waits."""

    def __init__(self, slots: Sequence[Slot], slot: SlotSpec, system: memoryview, waits: Waits) -> None:
        self._slots = [(each.spec.gpa, each.spec.gpa + each.spec.size, each.host_address) for each in slots]
        self._base = slot.gpa
        self._spin = Spin()
        self._waits = waits
        self._words = system.cast("Q")
        self.root = 0

    def host_address(self, address: int) -> int | None:
        """Of a place of the program that it may write to; None where that is not certain."""
        words, base, table = self._words, self._base, self.root
        for shift in (39, 30, 21):
            entry = words[(table - base >> 3) + (address >> shift & 511)]
            if not entry & _PRESENT:
                return None
            table = entry & _FRAME
        entry = words[(table - base >> 3) + (address >> 12 & 511)]
        if entry & (_PRESENT | _WRITE) != _PRESENT | _WRITE:
            return None
        gpa = (entry & _FRAME) + address % PAGE_SIZE
        for start, end, host in self._slots:
            if start <= gpa < end:
                return host + gpa - start
        return None

    def call(self, address: int, operation: int, value: int, timeout: int, second: int,
             third: int) -> int | FutexCall | None:
        """The result; or a wait; None where it is not for here."""
        command = operation & _COMMAND
        value &= 0xFFFF_FFFF
        if operation & _CLOCK_REALTIME and command != _WAIT_BITSET:
            return -errno.ENOSYS
        if address % 4 or address >> 47:
            return None
        if command in (_WAIT, _WAIT_BITSET):
            return self._wait(command, operation, address, value, timeout, third)
        host = self.host_address(address)
        if host is None:
            return None
        if command == _WAKE:
            return futex.wake(host, value)
        if command == _WAKE_BITSET:
            return futex.operate(host, command, value, third=third & _ANY)
        if command not in (_REQUEUE, _CMP_REQUEUE) or second % 4 or second >> 47:
            return None         # FUTEX_WAKE_OP stores into memory, which is the system's to log
        other = self.host_address(second)
        if other is None:
            return None
        self._waits.move()
        return futex.operate(host, command, value, timeout, other, third & _ANY)     # ``timeout`` is a number here

    def _wait(self, command: int, operation: int, address: int, value: int, timeout: int,
              third: int) -> FutexCall | None:
        realtime = bool(operation & _CLOCK_REALTIME)
        deadline = None
        if timeout:
            place = self.host_address(timeout)
            if place is None or timeout % PAGE_SIZE > PAGE_SIZE - 16:
                return None
            seconds, rest = struct.unpack("<qq", futex.read(place, 16))
            if seconds < 0 or not 0 <= rest < _SECOND:
                return None
            deadline = seconds * _SECOND + rest
            if command == _WAIT:
                deadline += time.monotonic_ns()
        mask = third & _ANY if command == _WAIT_BITSET else _ANY
        return FutexCall(address, value, mask, deadline, realtime) if mask else None

    def spin(self, call: FutexCall) -> bool:
        """The word has changed, within a moment, before anything waits for it: as if the call came only now."""
        host = self.host_address(call.address)
        return host is not None and self._spin.until_not(futex.word(host), call.expected)

    def wait(self, call: FutexCall) -> int | None:
        """The result; None where the word is not certain any more. -EINTR: a signal came. Until it is ``over``, whoever
        wakes must look."""
        self._waits.begin(call.address)
        host = self.host_address(call.address)
        if host is None:
            return None
        result = futex.operate(host, _WAIT_BITSET | (_CLOCK_REALTIME if call.realtime else 0), call.expected,
                               deadline=call.deadline, third=call.mask)
        return None if result == -errno.EFAULT else result

    def over(self) -> None:
        """The wait is, and is not taken up again."""
        self._waits.end()
