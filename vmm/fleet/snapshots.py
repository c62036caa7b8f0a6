"""Snapshots of one machine by and by, into its chain: what it is restored from when its host is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from ..client.machine import Machine
from ..consumers.snapshot import Manifest, chain, create, merge, survey
from ..consumers.snapshot.folder import SnapshotError
from ..errors import VmmError
from .config import Snapshots

__all__ = ["Keeping", "has_snapshots"]


def has_snapshots(directory: Path) -> bool:
    """Raises SnapshotError for what is no directory."""
    return directory.exists() and bool(survey(directory))


class Keeping:
    """Takes them, by a thread of its own, the first one at once; the guest runs meanwhile. ``busy`` is held while one
    is taken: others that need the machine for themselves hold it too."""

    def __init__(self, machine: str, wanted: Snapshots, busy: threading.Lock) -> None:
        self._machine, self._wanted, self._busy = machine, wanted, busy
        self._over = threading.Event()
        self._last: dict[str, Any] = {"id": None, "created": None, "error": ""}
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    @property
    def last(self) -> dict[str, Any]:
        """``id`` and ``created`` (ISO 8601, UTC) of the last one; ``error``: why there is none since, or empty."""
        return self._last

    def end(self) -> None:
        """No other is begun; the one that is being taken is waited for. Not while ``busy`` is held."""
        self._over.set()
        self._thread.join()

    def give_up(self) -> None:
        """No other is begun; for the holder of ``busy``, so that none is being taken."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.is_set():
            due = time.monotonic() + self._wanted.every
            with self._busy:
                if not self._over.is_set():
                    self._take()
            self._over.wait(max(0.0, due - time.monotonic()))

    def _take(self) -> None:
        directory = self._wanted.directory
        try:
            with Machine.attach(self._machine) as machine:
                taken = _create(machine, directory)
            self._last = {"id": taken.id, "created": taken.created, "error": ""}
            if len(chain(directory)) > self._wanted.keep:
                merge(directory)
        except (VmmError, OSError) as exc:
            self._last = {**self._last, "error": str(exc)}


def _create(machine: Machine, directory: Path) -> Manifest:
    """On top of the last one, where the machine knows what it has dirtied since. Raises VmmError."""
    if has_snapshots(directory):
        try:
            return create(machine, directory, incremental=True, live=True)
        except SnapshotError:
            pass        # it does not, or what is there is damaged
    return create(machine, directory, live=True)
