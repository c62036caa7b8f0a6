"""Doorbells: FIFOs in a machine's directory, each in the poll of the one who hears it.

A doorbell says only that somebody should look. What there is to see lies in shared memory: full rings in the control
blocks (ipc/ring.py), for the coordinator; a program's calls in mailboxes (ipc/programs.py), for its system. It is there
as long as the machine: what was rung while there was no coordinator, its successor hears.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PROGRAM_CALL", "RING_FULL", "Doorbell"]

#: Rung by vCPU workers at a full ring; and by those of a program's threads, when its system sleeps and they have asked.
RING_FULL, PROGRAM_CALL = "ring-full", "bell"

_READ = 4096            # bytes; if there are more, it is heard again


class Doorbell:
    """One end; all are alike. All keep it open for reading and writing, so that nobody ever finds the other end
    closed. A worker gone wild can silence it: who must not miss anything looks around from time to time, too."""

    def __init__(self, directory: Path, name: str = RING_FULL) -> None:
        """Of a machine's directory, where it was made (vmm/coordinator/segments.py). Raises OSError."""
        self.fd = os.open(directory / name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    @staticmethod
    def make(directory: Path, name: str = RING_FULL) -> None:
        """Of a new machine. Raises OSError."""
        os.mkfifo(directory / name, 0o600)

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
        self.fd = -1
