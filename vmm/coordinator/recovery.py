"""A migration whose process was killed after the machine had been handed over is finished by another.

The machine stands still here, and the target may never have been told to run it: unless something tells it, the
machine runs nowhere. A client's process does so, like the one that died (vmm/consumers/migration/recoverer.py), so the
coordinator does no more than start it; it takes the lease that the dead one had, or leaves that to a user who was
quicker.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

from ipc.linux.processid import identity
from ipc.run import own_process

from ..errors import VmmError
from .owners import Owners

__all__ = ["Recovery"]

_TRIES = 5                  # within
_SECONDS = 60.0


class Recovery:
    """``begin`` it as often as its process is killed; not endlessly, should something kill it every time. Until it
    has its lease it is watched here (``needed``: it does not have that, and no other process finished it)."""

    def __init__(self, machine: str, owners: Owners, needed: Callable[[], bool]) -> None:
        self._machine = machine
        self._owners = owners
        self._needed = needed
        self._begun: deque[float] = deque(maxlen=_TRIES)
        self._processes: list[subprocess.Popen[bytes]] = []     # kept: they are waited for by the next

    def begin(self) -> None:
        now = time.monotonic()
        if len(self._begun) == _TRIES and now - self._begun[0] < _SECONDS:
            self._say(f"{_TRIES} processes that were to finish its migration were killed within {_SECONDS:.0f} s; to "
                      f"start another one, run vmm migrate {self._machine} ADDRESS --recover")
            return
        self._begun.append(now)
        self._processes = [p for p in self._processes if p.poll() is None]
        try:
            process = subprocess.Popen(
                own_process("vmm.consumers.migration.recoverer", self._machine), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as exc:
            self._say(f"its migration cannot be finished: {exc.strerror}")
            return
        self._processes.append(process)
        try:
            self._owners.watch(identity(process.pid), lambda: self._ended(process))
        except (ProcessLookupError, VmmError):
            self._ended(process)

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        """Killed, and not by its own decision: another, unless there is one already."""
        if (process.poll() or 0) < 0 and process is self._processes[-1] and self._needed():
            self.begin()

    def _say(self, text: str) -> None:
        print(f"vmm: warning: machine '{self._machine}': {text}", file=sys.stderr)
