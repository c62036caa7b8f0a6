"""System calls, by what they are about. Each is a function of the thread that makes it and of its arguments; it gives
the result, or raises OSError with the errno, `Blocked`, or what touching memory raises (``-EFAULT`` then).

    memory.py       mmap and its like
    files.py        files, directories, descriptors
    identity.py     who and where a process is, limits, names
    clocks.py       time
    life.py         threads and processes that begin and end
    signalling.py   signals
    futexes.py      futexes, where the worker cannot serve them alone
    pipes.py        pipes
    lesser.py       those that have nearly the same answer for everybody
    waiting.py      poll and select
    events.py       eventfd, timerfd, epoll
    sockets.py      sockets
    timers.py       timers that a process has made

A call is served by all of them that are imported here: ``SERVED``.
"""

from __future__ import annotations

from . import (
    clocks,
    events,
    files,
    futexes,
    identity,
    lesser,
    life,
    memory,
    owners,
    pipes,
    scheduling,
    signalling,
    sockets,
    timers,
    waiting,
)
from .registry import SERVED, Blocked, Ended

__all__ = ["SERVED", "Blocked", "Ended", "clocks", "events", "files", "futexes", "identity", "lesser", "life", "memory",
           "owners", "pipes", "scheduling", "signalling", "sockets", "timers", "waiting"]
