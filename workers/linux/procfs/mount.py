"""Where they are mounted."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from . import machine
from .entries import Entries, Entry, folder, link, top
from .processes import process_entries

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

__all__ = ["mount"]


def mount(system: System) -> None:
    """On /proc and /sys, which are there, whatever is in them."""
    root = system.files.root
    static = {**machine.proc(system), **_of_caller(system)}

    def entries() -> Entries:
        return {**static, **{b"%d" % pid: _process(system, pid) for pid in sorted(system.processes)}}

    def find(name: bytes) -> Entry | None:
        if not name.isdigit() or name != b"%d" % int(name):
            return static.get(name)
        number = int(name)
        if number in system.processes:
            return _process(system, number)
        thread = system.threads.get(number)         # is not listed, but found
        return None if thread is None else folder(lambda: process_entries(system, thread.process, thread),
                                                  is_there=lambda: system.threads.get(number) is thread)

    root.cover(b"proc", top(root, b"/proc", entries, find))
    sys = machine.sys(system)
    root.cover(b"sys", top(root, b"/sys", lambda: sys, sys.get, refusal=errno.EPERM))


def _process(system: System, pid: int) -> Entry:
    process = system.processes[pid]
    return folder(lambda: process_entries(system, process), is_there=lambda: system.processes.get(pid) is process)


def _of_caller(system: System) -> Entries:
    """Links to what belongs to the thread that looks."""
    def caller() -> Thread:
        if system.caller is None:
            raise OSError(errno.ENOENT, "")
        return system.caller

    return {
        b"self": link(lambda: b"%d" % caller().process.pid),
        b"thread-self": link(lambda: b"%d/task/%d" % (caller().process.pid, caller().tid)),
        b"mounts": link(b"self/mounts"),
        b"net": link(b"self/net"),
    }


