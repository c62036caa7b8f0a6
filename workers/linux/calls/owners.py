"""Whose a process is, and how nice: users, groups, priorities."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..owners import AS_IT_IS, Ids
from .registry import served, signed32

if TYPE_CHECKING:
    from ..processes import Process, Thread
    from ..system import System

_GROUPS_MAX = 65536                                 # NGROUPS_MAX
_PROCESS, _GROUP, _USER = 0, 1, 2                   # PRIO_*
_NICEST, _LEAST_NICE = 19, -20


@served("getuid")
def getuid(system: System, thread: Thread, *_: int) -> int:
    return thread.process.users.real


@served("geteuid")
def geteuid(system: System, thread: Thread, *_: int) -> int:
    return thread.process.users.effective


@served("getgid")
def getgid(system: System, thread: Thread, *_: int) -> int:
    return thread.process.groups.real


@served("getegid")
def getegid(system: System, thread: Thread, *_: int) -> int:
    return thread.process.groups.effective


@served("getresuid")
def getresuid(system: System, thread: Thread, real: int, effective: int, saved: int, *_: int) -> int:
    return _write(thread, thread.process.users, (real, effective, saved))


@served("getresgid")
def getresgid(system: System, thread: Thread, real: int, effective: int, saved: int, *_: int) -> int:
    return _write(thread, thread.process.groups, (real, effective, saved))


def _write(thread: Thread, ids: Ids, addresses: Iterable[int]) -> int:
    for address, each in zip(addresses, (ids.real, ids.effective, ids.saved), strict=True):
        thread.process.space.write(address, struct.pack("<I", each))
    return 0


@served("setuid")
def setuid(system: System, thread: Thread, wanted: int, *_: int) -> int:
    process = thread.process
    process.users = process.users.one(_id(wanted), free=process.is_privileged)
    return 0


@served("setgid")
def setgid(system: System, thread: Thread, wanted: int, *_: int) -> int:
    process = thread.process
    process.groups = process.groups.one(_id(wanted), free=process.is_privileged)
    return 0


@served("setreuid")
def setreuid(system: System, thread: Thread, real: int, effective: int, *_: int) -> int:
    process = thread.process
    process.users = process.users.two(_id(real), _id(effective), free=process.is_privileged)
    return 0


@served("setregid")
def setregid(system: System, thread: Thread, real: int, effective: int, *_: int) -> int:
    process = thread.process
    process.groups = process.groups.two(_id(real), _id(effective), free=process.is_privileged)
    return 0


@served("setresuid")
def setresuid(system: System, thread: Thread, real: int, effective: int, saved: int, *_: int) -> int:
    process = thread.process
    process.users = process.users.three(_id(real), _id(effective), _id(saved), free=process.is_privileged)
    return 0


@served("setresgid")
def setresgid(system: System, thread: Thread, real: int, effective: int, saved: int, *_: int) -> int:
    process = thread.process
    process.groups = process.groups.three(_id(real), _id(effective), _id(saved), free=process.is_privileged)
    return 0


@served("setfsuid")
def setfsuid(system: System, thread: Thread, wanted: int, *_: int) -> int:
    process, before = thread.process, thread.process.users.files
    process.users = process.users.with_files(_id(wanted), free=process.is_privileged)
    return before


@served("setfsgid")
def setfsgid(system: System, thread: Thread, wanted: int, *_: int) -> int:
    process, before = thread.process, thread.process.groups.files
    process.groups = process.groups.with_files(_id(wanted), free=process.is_privileged)
    return before


def _id(number: int) -> int:
    return number & AS_IT_IS


@served("getgroups")
def getgroups(system: System, thread: Thread, room: int, address: int, *_: int) -> int:
    groups, room = thread.process.more_groups, signed32(room)
    if room < 0 or 0 < room < len(groups):
        raise OSError(errno.EINVAL, "")
    if room:
        thread.process.space.write(address, struct.pack(f"<{len(groups)}I", *groups))
    return len(groups)


@served("setgroups")
def setgroups(system: System, thread: Thread, count: int, address: int, *_: int) -> int:
    process, count = thread.process, count & 0xFFFF_FFFF
    if not process.is_privileged:
        raise OSError(errno.EPERM, "")
    if count > _GROUPS_MAX:
        raise OSError(errno.EINVAL, "")
    found = list(struct.unpack(f"<{count}I", process.space.read(address, 4 * count)))
    if AS_IT_IS in found:
        raise OSError(errno.EINVAL, "")
    process.more_groups = sorted(found)
    return 0


# --- priorities: they are kept, and the host does as it likes --------------------------------------------------------


@served("getpriority")
def getpriority(system: System, thread: Thread, which: int, who: int, *_: int) -> int:
    """20 - niceness, of the least nice, as the call itself gives it."""
    return 20 - min(each.niceness for each in _meant(system, thread, which, who))


@served("setpriority")
def setpriority(system: System, thread: Thread, which: int, who: int, value: int, *_: int) -> int:
    caller, wanted = thread.process, min(max(signed32(value), _LEAST_NICE), _NICEST)
    refused = 0
    for each in _meant(system, thread, which, who):
        if not caller.may_schedule(each):
            refused = errno.EPERM
        elif not caller.is_privileged and wanted < each.niceness:
            refused = errno.EACCES
        else:
            each.niceness = wanted
    if refused:
        raise OSError(refused, "")
    return 0


def _meant(system: System, thread: Thread, which: int, who: int) -> list[Process]:
    """Raises OSError."""
    which, who, caller = signed32(which), signed32(who), thread.process
    if which not in (_PROCESS, _GROUP, _USER):
        raise OSError(errno.EINVAL, "")
    if which == _PROCESS and who in system.threads:
        return [system.threads[who].process]
    found = [each for each in system.processes.values() if (
        each.pid == (who or caller.pid) if which == _PROCESS else
        each.group == (who or caller.group) if which == _GROUP else
        each.users.real == (who or caller.users.real))]
    if not found:
        raise OSError(errno.ESRCH, "")
    return found
