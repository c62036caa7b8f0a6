"""Which process: its pid and when it started.

A pid alone is used again. The start time is field 22 of ``/proc/PID/stat`` (proc_pid_stat(5)), in clock ticks since
the host booted: the same number for a process itself, for its siblings, and from another PID namespace. (Not from
another *time* namespace: there it counts from another moment, and nothing matches.)
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import msgspec

__all__ = ["ProcessId", "identity", "open_process"]

_STARTED = 19           # field 22, counted from the state (field 3), which follows the name in parentheses


class ProcessId(msgspec.Struct, frozen=True):
    """``pid`` in the PID namespace of whoever looks; ``start`` in clock ticks since the host booted."""

    pid: int
    start: int


def identity(pid: int | None = None) -> ProcessId:
    """Of the process ``pid``, or of the calling one. Raises ProcessLookupError when there is none that can be seen
    (a zombie can: it is gone only when its parent has taken its status)."""
    if pid is not None and not 0 < pid < 1 << 31:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    try:
        text = Path(f"/proc/{'self' if pid is None else pid}/stat").read_text(errors="replace")
        # Its name may hold spaces and parentheses.
        start = int(text.rpartition(")")[2].split()[_STARTED])
    except (OSError, IndexError, ValueError):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    return ProcessId(os.getpid() if pid is None else pid, start)


def open_process(process: ProcessId) -> int:
    """A pidfd (pidfd_open(2)) of exactly this process. Raises ProcessLookupError when it has gone, whoever has its
    pid by now, and for what cannot be a process (a thread's id, a number out of range); OSError without a
    descriptor left."""
    try:
        fd = os.pidfd_open(process.pid)
    except OverflowError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOENT):   # no number of a process; that of a thread
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        raise
    try:
        # The descriptor is of one process for good; if the pid is still that one's, so is what /proc says of it.
        if identity(process.pid) != process or not _exists(fd):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _exists(pidfd: int) -> bool:
    """It has not been reaped: its pid cannot be another's."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
