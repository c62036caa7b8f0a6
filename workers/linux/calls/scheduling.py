"""Policies, priorities and processors of threads: the first two are kept, and the host does as it likes."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from ..abi import number_of
from ..processes import RESET_ON_FORK
from .registry import served, signed32

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_FIFO, _ROUND_ROBIN = 1, 2                                                  # SCHED_*
_PRIORITIES = {0: (0, 0), _FIFO: (1, 99), _ROUND_ROBIN: (1, 99), 3: (0, 0), 5: (0, 0), 6: (0, 0)}
_DEADLINE = 6               # asked for in another way
_PRIORITY_MAX = number_of("sched_get_priority_max")


@served("sched_get_priority_max", "sched_get_priority_min")
def priority(system: System, thread: Thread, policy: int, *_: int) -> int:
    number = thread.registers[0]            # RAX: which of the two it is
    low, high = _PRIORITIES.get(signed32(policy), (-1, -1))
    if low < 0:
        raise OSError(errno.EINVAL, "")
    return high if number == _PRIORITY_MAX else low


def _meant(system: System, thread: Thread, pid: int) -> Thread:
    """Raises OSError."""
    number = signed32(pid)
    if number < 0:
        raise OSError(errno.EINVAL, "")
    return system.thread(number) if number else thread


@served("sched_getscheduler")
def sched_getscheduler(system: System, thread: Thread, pid: int, *_: int) -> int:
    return _meant(system, thread, pid).policy


@served("sched_getparam")
def sched_getparam(system: System, thread: Thread, pid: int, address: int, *_: int) -> int:
    if not address:
        raise OSError(errno.EINVAL, "")
    found = _meant(system, thread, pid)
    thread.process.space.write(address, struct.pack("<i", found.priority))
    return 0


@served("sched_setscheduler")
def sched_setscheduler(system: System, thread: Thread, pid: int, policy: int, address: int, *_: int) -> int:
    if signed32(policy) < 0:
        raise OSError(errno.EINVAL, "")
    return _set(system, thread, pid, signed32(policy), address)


@served("sched_setparam")
def sched_setparam(system: System, thread: Thread, pid: int, address: int, *_: int) -> int:
    return _set(system, thread, pid, None, address)


def _set(system: System, thread: Thread, pid: int, policy: int | None, address: int) -> int:
    """``policy``: None: as it is."""
    if not address or signed32(pid) < 0:
        raise OSError(errno.EINVAL, "")
    wanted, = struct.unpack("<i", thread.process.space.read(address, 4))
    found = _meant(system, thread, pid)
    policy = found.policy if policy is None else policy
    kind = policy & ~RESET_ON_FORK
    low, high = _PRIORITIES.get(kind, (1, 0))
    if kind == _DEADLINE or not low <= wanted <= high:
        raise OSError(errno.EINVAL, "")
    caller = thread.process
    if not caller.may_schedule(found.process) or (kind in (_FIFO, _ROUND_ROBIN) and not caller.is_privileged):
        raise OSError(errno.EPERM, "")
    found.policy, found.priority = policy, wanted
    return 0


# --- processors ------------------------------------------------------------------------------------------------------


@served("sched_getaffinity")
def sched_getaffinity(system: System, thread: Thread, pid: int, size: int, address: int, *_: int) -> int:
    """All that there are."""
    if size < 8 or size % 8:
        raise OSError(errno.EINVAL, "")
    if signed32(pid):
        system.thread(signed32(pid))
    thread.process.space.write(address, struct.pack("<Q", _processors(system)))
    return 8


@served("sched_setaffinity")
def sched_setaffinity(system: System, thread: Thread, pid: int, size: int, address: int, *_: int) -> int:
    """The host has them run where it likes."""
    mask = int.from_bytes(thread.process.space.read(address, min(size & 0xFFFF_FFFF, 8)), "little")
    found = system.thread(signed32(pid)) if signed32(pid) else thread
    if not thread.process.may_schedule(found.process):
        raise OSError(errno.EPERM, "")
    if not mask & _processors(system):
        raise OSError(errno.EINVAL, "")
    return 0


def _processors(system: System) -> int:
    return (1 << min(system.processors, 63)) - 1


@served("sched_yield")
def sched_yield(system: System, thread: Thread, *_: int) -> int:
    return 0
