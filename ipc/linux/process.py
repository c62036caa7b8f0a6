"""Process plumbing: what Linux has for it and Python does not. (ipc/run.py has how a process of ours begins.)"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

from .libc import LIBC, SYS_SCHED_SETATTR, check

__all__ = ["PR_GET_NAME", "PR_SET_NAME", "SERVICE_SLICE", "die_with_parent", "no_new_privileges", "not_nice",
           "raise_descriptor_limit", "set_command_line", "set_group_nice", "set_name", "set_nice", "set_subreaper",
           "set_time_slice"]

_PR_SET_PDEATHSIG = 1
PR_SET_NAME, PR_GET_NAME = 15, 16
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_ARGUMENTS = (48, 49)     # proc(5), stat: arg_start, arg_end
_DESCRIPTORS = 1 << 20   # more are of no use to anybody

#: Seconds of a thread that has little to do, and that at once.
SERVICE_SLICE = 0.0001


def raise_descriptor_limit() -> None:
    """Of this process and those that it starts: as far as it may go. The soft limit is low by custom, for programs
    that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prctl(option: int, value: int | bytes) -> None:
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    check(LIBC.prctl(option, argument, 0, 0, 0))


def set_name(name: str) -> None:
    """Name shown by ps and top (15 bytes)."""
    _prctl(PR_SET_NAME, name.encode()[:15])


def set_command_line(words: Sequence[str]) -> None:
    """What ps and others show of this process, which is a fork: as much as that of the first one has room for."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(fields[at - 3]) for at in _ARGUMENTS)
    text = b"".join(word.encode(errors="replace") + b"\0" for word in words)[:max(0, end - start - 1)]
    if start:
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def set_nice(nice: int) -> None:
    """The calling thread's, as nice(1) has it."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def not_nice() -> None:
    """Some programs start their processes nice (Ray does), and with them all that those start; root may change that for
    this process."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, 0)))


def set_group_nice(nice: int) -> None:
    """That of this process's session, where the kernel groups by them (sched(7), autogroup: between groups a thread's
    own value counts for nothing)."""
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write(str(nice))


def set_subreaper() -> None:
    """Orphaned descendants become this process's children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def no_new_privileges() -> None:
    """Neither this process nor one that it starts gets any by a program that it runs (set-user-ID, capabilities)."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(signum: int, parent: int) -> None:
    """Be sent ``signum`` when the parent ends; at once if it is not ``parent`` any more."""
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


class _SchedAttr(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64),
                ("nice", ctypes.c_int32), ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64),
                ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64)]


def set_time_slice(seconds: float) -> None:
    """The calling thread's slice under SCHED_OTHER; threads made by it inherit that. 0 is the kernel's own.

    A thread with a short slice gets no more time than others, but gets it sooner after waking: where vCPUs keep
    every core busy, a reap need not wait for the end of theirs. Linux 6.12 (sched_attr.sched_runtime for fair
    tasks); earlier ones ignore it.
    """
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    attributes = _SchedAttr(size=ctypes.sizeof(_SchedAttr), nice=nice, runtime=int(seconds * 1e9))
    LIBC.syscall(SYS_SCHED_SETATTR, 0, ctypes.byref(attributes), 0)
