"""How far a snapshot is that is being taken, for whoever looks at the machine meanwhile: a file in its runtime
directory, of the process that takes the snapshot. It is believed while that process has a lease for it
(``Report.holders``)."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from ipc.messages import UNREADABLE

from ...errors import VmmError
from ...machine.runtime import machine_dir

__all__ = ["Underway", "UnderwayReport", "snapshot_underway"]

_TELL_EVERY = 0.1       # seconds


class UnderwayReport(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of which the numbers are known so far: each round of a live snapshot adds those dirtied meanwhile."""

    directory: str
    rounds: int             # the one that is being copied among them
    done_pages: int
    total_pages: int


class Underway:
    """Kept by the process that takes the snapshot. A file that cannot be written is no reason to fail."""

    def __init__(self, machine: str, directory: Path) -> None:
        self._file = _file(machine, os.getpid())
        self._directory = str(directory)
        self._rounds = 0
        self._told_at = 0.0

    def begin_round(self) -> None:
        """Another round of copying."""
        self._rounds += 1
        self._told_at = 0.0

    def tell(self, done: int, total: int) -> None:
        """So many pages of those known are copied."""
        now = time.monotonic()
        if now - self._told_at < _TELL_EVERY:
            return
        self._told_at = now
        report = UnderwayReport(directory=self._directory, rounds=self._rounds, done_pages=done, total_pages=total)
        with contextlib.suppress(OSError):      # the machine may have gone, and its directory with it
            aside = self._file.with_suffix(".new")
            aside.write_bytes(msgspec.json.encode(report))
            aside.rename(self._file)

    def close(self) -> None:
        """It is over."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)


def snapshot_underway(machine: str, pid: int) -> UnderwayReport | None:
    """That which process ``pid`` takes; None: it has said nothing yet."""
    try:
        return msgspec.json.decode(_file(machine, pid).read_bytes(), type=UnderwayReport)
    except (OSError, VmmError, *UNREADABLE):
        return None


def _file(machine: str, pid: int) -> Path:
    return machine_dir(machine) / f"snapshot-{pid}.json"
