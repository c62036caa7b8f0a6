"""The bell that vCPU workers ring at a full ring: a FIFO in the machine's directory, in the coordinator's poll.

It says only that somebody should look; what there is to see lies in the control blocks (ipc/ring.py). It is there as
long as the machine: what was rung while there was no coordinator, its successor hears.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Bell"]

_NAME = "ring-full"
_READ = 256          # bytes: one of each vCPU; if there are more, it is heard again


class Bell:
    """One end; all are alike. Both keep it open for reading and writing, so that nobody ever finds the other end
    closed. A worker gone wild can silence it: then there are still the messages."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        self.fd = os.open(directory / _NAME, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    @staticmethod
    def make(directory: Path) -> None:
        """Of a new machine. Raises OSError."""
        os.mkfifo(directory / _NAME, 0o600)

    def ring(self) -> None:
        """Never waits."""
        try:
            os.write(self.fd, b"\0")
        except BlockingIOError:
            pass    # it is full: it is heard all the same

    def silence(self) -> None:
        """Before one looks."""
        try:
            os.read(self.fd, _READ)
        except BlockingIOError:
            pass    # another end has taken it

    def close(self) -> None:
        os.close(self.fd)
