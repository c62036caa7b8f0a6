"""Process plumbing: prctl, and clearing up after a machine that nobody owns any more."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import select
import shutil
import threading
from pathlib import Path

import msgspec

from .shm import list_segments, machine_prefix, unlink_segment

__all__ = ["SERVICE_SLICE", "ProcessId", "die_with_parent", "open_process", "remove_machine_files", "set_name",
           "set_subreaper", "set_time_slice"]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine(), 314)

_NEVER = -1         # when no process was started

#: Seconds of a thread that has little to do, and that at once.
SERVICE_SLICE = 0.0001

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int | bytes) -> None:
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def set_name(name: str) -> None:
    """Name shown by ps and top (15 bytes)."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def set_subreaper() -> None:
    """Orphaned descendants become this process's children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signum: int, parent: int) -> None:
    """Be sent ``signum`` when the parent ends; at once if it is not ``parent`` any more."""
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


class ProcessId(msgspec.Struct, frozen=True):
    """A process, and no later one that is given its pid: its start time goes with it (proc_pid_stat(5), field 22,
    in clock ticks since boot). To be written down, where a pidfd cannot be kept."""

    pid: int
    started: int


def open_process(who: int | ProcessId) -> tuple[int, ProcessId]:
    """(pidfd, who it is). A process that has just ended, and that nobody has waited for, counts as there: its pidfd
    says so. Raises ProcessLookupError where there is none, where the pid is another's by now, or where it is no
    process's; OSError where no descriptor can be had (EMFILE)."""
    pid = who.pid if isinstance(who, ProcessId) else who
    gone = ProcessLookupError(errno.ESRCH, f"there is no process {pid}")
    try:
        fd = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):
        raise gone from None
    except OSError as exc:
        if exc.errno == errno.EINVAL:   # not a positive number, or a thread's
            raise gone from None
        raise
    found = ProcessId(pid, _start_time(pid))
    if isinstance(who, ProcessId):
        if who != found:
            os.close(fd)
            raise gone
    elif select.select([fd], [], [], 0)[0]:
        # It has ended: what was read may be another's, to whom the pid has been given since.
        found = ProcessId(pid, _NEVER)
    return fd, found


def _start_time(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return _NEVER
    return int(stat.rpartition(b")")[2].split()[19])    # the name before may hold blanks and brackets


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
    _libc.syscall(_SYS_SCHED_SETATTR, 0, ctypes.byref(attributes), 0)


def remove_machine_files(machine: str, runtime_dir: Path) -> list[str]:
    """Unlink every segment of ``machine`` and its runtime directory; what was removed. Idempotent,
    safe to be done by several processes at once."""
    removed = [name for name in list_segments(machine_prefix(machine)) if unlink_segment(name)]
    if runtime_dir.is_dir():
        with contextlib.suppress(OSError):
            shutil.rmtree(runtime_dir)
            removed.append(str(runtime_dir))
    return removed
