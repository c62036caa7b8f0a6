"""The seven trace events of QEMU's dirty-ring support, as one structured line each.

Names and arguments are those of accel/kvm/trace-events in the seed; ``kvm_dirty_ring_page`` calls
its second argument ``slot`` there but passes the fetch index, and so it is named here. A line is
``<seconds since start> <event> key=value …``. Events are switched on by shell patterns
(``kvm_dirty_ring_*``); one that is off is a ``None`` attribute, and its call site a test of it.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import select
import stat
import time
from collections.abc import Callable, Sequence

from ..errors import VmmError, one_line
from ..outputs import open_append

__all__ = ["EVENTS", "Tracer", "check_pattern"]

EVENTS: dict[str, tuple[str, ...]] = {
    "kvm_dirty_ring_full": ("id",),
    "kvm_dirty_ring_reap_vcpu": ("id",),
    "kvm_dirty_ring_page": ("vcpu", "fetch", "offset"),
    "kvm_dirty_ring_reaper": ("s",),
    "kvm_dirty_ring_reap": ("count", "t"),
    "kvm_dirty_ring_reaper_kick": ("reason",),
    "kvm_dirty_ring_flush": ("finished",),
}

_PREFIX = "kvm_dirty_ring_"

Emit = Callable[..., None]


def check_pattern(pattern: str) -> None:
    """Raises VmmError for one that matches no event."""
    if not fnmatch.filter(EVENTS, pattern):
        raise VmmError(f"{one_line(pattern, 80)}: no such event; choose from {', '.join(EVENTS)}")


class Tracer:
    """One attribute per event: a callable when it is on, None when it is off.

    ``path``: where the lines go; empty: to the descriptor ``terminal`` (-1: nowhere). What is not a regular file is
    never waited for: lines that its reader is too slow for are counted. A trace that cannot be written ends, and
    ``warn`` is told once.
    """

    full: Emit | None
    reap_vcpu: Emit | None
    page: Emit | None
    reaper: Emit | None
    reap: Emit | None
    reaper_kick: Emit | None
    flush: Emit | None

    def __init__(self, patterns: Sequence[str], path: str = "", terminal: int = -1,
                 warn: Callable[[str], None] = lambda text: None) -> None:
        """Raises OutputError when the file cannot be opened."""
        self._start = time.monotonic()
        self._warn = warn
        self._where = path or "standard error"
        self._dropped = 0
        wanted = {event for event in EVENTS for p in patterns if fnmatch.fnmatch(event, p)}
        self._owner = bool(wanted and path)
        self._fd = open_append(path) if self._owner else terminal if wanted else -1
        self._waits = self._fd >= 0 and not stat.S_ISREG(os.fstat(self._fd).st_mode)
        for event in EVENTS:
            on = self._fd >= 0 and event in wanted
            setattr(self, event.removeprefix(_PREFIX), self._emitter(event) if on else None)

    def _emitter(self, event: str) -> Emit:
        names = EVENTS[event]

        def emit(*values: object) -> None:
            fields = " ".join(f"{n}={v:#x}" if n == "offset" else f"{n}={v}"
                              for n, v in zip(names, values, strict=True))
            self._write(f"{time.monotonic() - self._start:.6f} {event} {fields}\n")

        return emit

    def _write(self, line: str) -> None:
        if self._fd < 0:
            return      # it has just ended, in the middle of a reap
        try:
            if self._waits:
                if not _room(self._fd):
                    self._dropped += 1
                    return
                if self._dropped:
                    line = f"{self._dropped} trace lines were dropped: they were not read fast enough\n{line}"
                    self._dropped = 0
            data = line.encode()
            if os.write(self._fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as exc:
            self.close()
            self._warn(f"tracing has ended: {self._where} cannot be written: {exc.strerror}")

    def close(self) -> None:
        """Every event is off. Idempotent."""
        for event in EVENTS:
            setattr(self, event.removeprefix(_PREFIX), None)
        if self._fd >= 0 and self._owner:
            os.close(self._fd)
        self._fd = -1


def _room(fd: int) -> bool:
    """A line can be written without waiting. (A pipe is writable when it has room for PIPE_BUF bytes, 4096; the
    descriptor is somebody else's too, so it is not made non-blocking.)"""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(happened & (select.POLLOUT | select.POLLERR) for _, happened in poll.poll(0))
