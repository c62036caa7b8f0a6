"""Where a process is; names, limits, what the machine has."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from ..population import CHILD_SUBREAPER, PDEATHSIG
from ..program import STACK_LIMIT
from ..space import PAGE
from .registry import served, signed32

if TYPE_CHECKING:
    from ..processes import Process, Thread
    from ..system import System

_UNLIMITED = (1 << 64) - 1
_STACK, _NOFILE, _LIMITS = 3, 7, 16                 # RLIMIT_*
_SET_NAME, _GET_NAME = 15, 16                       # PR_*
_READ_BOUND, _DROP_BOUND, _LAST_CAPABILITY = 23, 24, 40     # PR_CAPBSET_*
_DUMPABLE, _KEEP_CAPABILITIES, _TIMER_SLACK, _NO_NEW_PRIVILEGES = 4, 8, 29, 38
#: By PR_SET_*: what there is at first, and what there may be.
_SETTINGS: dict[int, tuple[int, range]] = {
    PDEATHSIG: (0, range(65)), _DUMPABLE: (1, range(2)), _KEEP_CAPABILITIES: (0, range(2)),
    _TIMER_SLACK: (50_000, range(1 << 63)), CHILD_SUBREAPER: (0, range(1 << 63)), _NO_NEW_PRIVILEGES: (0, range(1, 2))}
#: PR_GET_*, by what they ask for.
_ASKED = {2: PDEATHSIG, 3: _DUMPABLE, 7: _KEEP_CAPABILITIES, 30: _TIMER_SLACK, 37: CHILD_SUBREAPER,
          39: _NO_NEW_PRIVILEGES}
#: What is as at first again in another program.
AT_EXEC = _DUMPABLE, _KEEP_CAPABILITIES
_SET_FS, _GET_FS = 0x1002, 0x1003                   # ARCH_*, asm/prctl.h
_TICKS = 100
_SELF, _CHILDREN, _THREAD = 0, -1, 1                # RUSAGE_*


@served("getpid")
def getpid(system: System, thread: Thread, *_: int) -> int:
    return thread.process.pid


@served("getppid")
def getppid(system: System, thread: Thread, *_: int) -> int:
    return thread.process.parent


@served("gettid")
def gettid(system: System, thread: Thread, *_: int) -> int:
    return thread.tid


@served("getpgrp")
def getpgrp(system: System, thread: Thread, *_: int) -> int:
    return thread.process.group


@served("getpgid")
def getpgid(system: System, thread: Thread, pid: int, *_: int) -> int:
    return _there(system, thread, pid).group


@served("getsid")
def getsid(system: System, thread: Thread, pid: int, *_: int) -> int:
    return _there(system, thread, pid).session


def _there(system: System, thread: Thread, pid: int) -> Process:
    """Perhaps a zombie; 0: the caller. Raises OSError."""
    found = system.processes.get(signed32(pid) or thread.process.pid)
    if found is None:
        raise OSError(errno.ESRCH, "")
    return found


@served("uname")
def uname(system: System, thread: Thread, address: int, *_: int) -> int:
    fields = (b"Linux", system.host, b"6.1.0", b"#1 SMP", b"x86_64", b"(none)")
    thread.process.space.write(address, b"".join(each.ljust(65, b"\0") for each in fields))
    return 0


@served("sysinfo")
def sysinfo(system: System, thread: Thread, address: int, *_: int) -> int:
    processes = len(system.processes)
    thread.process.space.write(address, struct.pack(
        "<qQQQQQQQQQHxxxxxxQQI4x", system.monotonic() // 10**9, 0, 0, 0, system.memory_pages * PAGE,
        system.frames.free * PAGE, 0, 0, 0, 0, processes, 0, 0, 1))
    return 0


@served("prlimit64")
def prlimit64(system: System, thread: Thread, pid: int, which: int, new: int, old: int, *_: int) -> int:
    process = system.process(signed32(pid) or thread.process.pid)
    if signed32(which) not in range(_LIMITS):
        raise OSError(errno.EINVAL, "")
    wanted = struct.unpack("<QQ", thread.process.space.read(new, 16)) if new else None
    if wanted and wanted[0] > wanted[1]:
        raise OSError(errno.EINVAL, "")
    if old:
        thread.process.space.write(old, struct.pack("<QQ", *process.limits.get(which, usual_limit(which))))
    if wanted:
        process.limits[which] = wanted
        if which == _NOFILE:
            process.files.limit = min(wanted[0], 1 << 20)
    return 0


@served("getrlimit")
def getrlimit(system: System, thread: Thread, which: int, address: int, *_: int) -> int:
    return prlimit64(system, thread, 0, which, 0, address)


@served("setrlimit")
def setrlimit(system: System, thread: Thread, which: int, address: int, *_: int) -> int:
    return prlimit64(system, thread, 0, which, address, 0)


def usual_limit(which: int) -> tuple[int, int]:
    """RLIMIT_*: soft, hard."""
    return {_STACK: (STACK_LIMIT, _UNLIMITED), _NOFILE: (1024, 1 << 20)}.get(which, (_UNLIMITED, _UNLIMITED))


@served("getrusage")
def getrusage(system: System, thread: Thread, who: int, address: int, *_: int) -> int:
    """All of it is time of the program: how much of it a call took is not known here."""
    who, process = signed32(who), thread.process
    if who not in (_SELF, _CHILDREN, _THREAD):
        raise OSError(errno.EINVAL, "")
    used = process.cpu_ns if who == _SELF else process.cpu_children if who == _CHILDREN else thread.cpu_ns
    process.space.write(address, packed_usage(used))
    return 0


def packed_usage(nanoseconds: int) -> bytes:
    """struct rusage."""
    return struct.pack("<qq", *divmod(nanoseconds // 1000, 10**6)) + bytes(128)


@served("times")
def times(system: System, thread: Thread, address: int, *_: int) -> int:
    process = thread.process
    if address:
        own, children = (each * _TICKS // 10**9 for each in (process.cpu_ns, process.cpu_children))
        process.space.write(address, struct.pack("<4q", own, 0, children, 0))
    return system.monotonic() * _TICKS // 10**9


@served("getcpu")
def getcpu(system: System, thread: Thread, cpu: int, node: int, *_: int) -> int:
    for address in (cpu, node):
        if address:
            thread.process.space.write(address, bytes(4))
    return 0


@served("getrandom")
def getrandom(system: System, thread: Thread, address: int, count: int, flags: int, *_: int) -> int:
    if flags & ~7 or flags & 6 == 6:
        raise OSError(errno.EINVAL, "")
    count = min(count, 1 << 20)
    thread.process.space.write(address, system.files.store.random(count))
    return count


@served("prctl")
def prctl(system: System, thread: Thread, option: int, argument: int, *rest: int) -> int:
    if option == _SET_NAME:
        thread.name = thread.process.space.read(argument, 16).partition(b"\0")[0][:15]
        return 0
    if option == _GET_NAME:
        thread.process.space.write(argument, thread.name.ljust(16, b"\0"))
        return 0
    if option in (_READ_BOUND, _DROP_BOUND):
        if argument > _LAST_CAPABILITY:
            raise OSError(errno.EINVAL, "")
        return int(option == _READ_BOUND)
    return _setting(thread.process, option, argument, rest)


def _setting(process: Process, option: int, argument: int, rest: tuple[int, ...]) -> int:
    """One that is kept: set, or asked for."""
    if option in _SETTINGS:
        usual, allowed = _SETTINGS[option]
        if argument not in allowed or (option == _NO_NEW_PRIVILEGES and any(rest[:3])):
            raise OSError(errno.EINVAL, "")
        process.settings[option] = (argument or usual) if option == _TIMER_SLACK else argument
        return 0
    which = _ASKED.get(option)
    if which is None or (which == _NO_NEW_PRIVILEGES and (argument or any(rest[:3]))):
        raise OSError(errno.EINVAL, "")
    value = process.settings.get(which, _SETTINGS[which][0])
    if which in (PDEATHSIG, CHILD_SUBREAPER):
        process.space.write(argument, struct.pack("<I", value))
        return 0
    return value


@served("arch_prctl")
def arch_prctl(system: System, thread: Thread, code: int, address: int, *_: int) -> int:
    if code == _SET_FS:
        if address >> 47:
            raise OSError(errno.EPERM, "")
        thread.fs_base = address
        return 0
    if code == _GET_FS:
        thread.process.space.write(address, struct.pack("<Q", thread.fs_now))
        return 0
    raise OSError(errno.EINVAL, "")


@served("set_tid_address")
def set_tid_address(system: System, thread: Thread, address: int, *_: int) -> int:
    thread.clear_tid = address
    return thread.tid


@served("set_robust_list")
def set_robust_list(system: System, thread: Thread, head: int, size: int, *_: int) -> int:
    if size != 24:
        raise OSError(errno.EINVAL, "")
    thread.robust = (head, size)
    return 0


@served("get_robust_list")
def get_robust_list(system: System, thread: Thread, pid: int, head: int, size: int, *_: int) -> int:
    found = system.thread(signed32(pid)) if pid else thread
    if not (thread.process.is_privileged or found.process is thread.process):
        raise OSError(errno.EPERM, "")
    thread.process.space.write(head, struct.pack("<Q", found.robust[0]))
    thread.process.space.write(size, struct.pack("<Q", 24))
    return 0


