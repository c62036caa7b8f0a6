"""A fault hits: a signal to a process, at its moment."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import belongings
from .plan import Fault

__all__ = ["Hit", "find_pid", "pid_in"]

_LOOK_EVERY = 0.002     # seconds


def pid_in(status: dict[str, Any], who: str) -> int:
    """Of a machine's coordinator or ``vcpuN``, by what the machine says of itself."""
    return int(status["coordinator"]["pid"] if who == "coordinator" else
               status["vcpus"][int(who.removeprefix("vcpu"))]["pid"])


def find_pid(name: str, who: str) -> int | None:
    """Of machine ``name``'s keeper, or as ``pid_in``; None: it is not there yet, or no longer."""
    if who == "keeper":
        return belongings(name).owner_pid()
    try:
        with Machine.attach_pinned(name) as machine:
            return pid_in(machine.status(), who)
    except VmmError:
        return None


class Hit(threading.Thread):
    """Within the ``with``: ``find`` is asked for the victim's pid until it says one, and it is hit so long after that.
    ``late``: though the ``with`` be over by then. ``done``: it has hit somebody."""

    def __init__(self, fault: Fault, find: Callable[[], int | None], *, late: bool) -> None:
        super().__init__(daemon=True)
        self.done = False
        self._fault = fault
        self._find = find
        self._late = late
        self._over = threading.Event()

    def run(self) -> None:
        while (pid := self._find()) is None:
            if self._over.wait(_LOOK_EVERY):
                return
        try:
            victim = os.pidfd_open(pid)
        except OSError:
            return      # it was killed before
        try:
            after = self._fault.after_ms / 1000
            if self._late:
                time.sleep(after)
            elif self._over.wait(after):
                return
            with contextlib.suppress(ProcessLookupError):
                self._signal(victim)
        finally:
            os.close(victim)

    def _signal(self, victim: int) -> None:
        """Raises ProcessLookupError."""
        if not self._fault.stop_ms:
            signal.pidfd_send_signal(victim, signal.SIGKILL)
            self.done = True
            return
        signal.pidfd_send_signal(victim, signal.SIGSTOP)
        self.done = True
        try:
            time.sleep(self._fault.stop_ms / 1000)
        finally:
            signal.pidfd_send_signal(victim, signal.SIGCONT)

    def __enter__(self) -> Hit:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()
