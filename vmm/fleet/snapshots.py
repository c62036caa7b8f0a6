"""Snapshots of one machine by and by, into its chain: what it is restored from when its host is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..client.machine import Machine
from ..consumers.snapshot import Manifest, NoParent, chain, create, delete, merge, survey
from ..errors import VmmError, one_line
from .config import Snapshots

__all__ = ["Keeping", "NoSnapshot", "has_snapshots"]

_HELD_LOOK = 0.5            # seconds between two looks whether snapshots are held off still


class NoSnapshot(VmmError):
    """There is none to go on from."""


def has_snapshots(directory: Path) -> bool:
    """Raises SnapshotError for what is no directory."""
    return directory.exists() and bool(survey(directory))


class Keeping:
    """Takes them, by a thread of its own, the first one at once; the guest runs meanwhile. ``busy`` is held while one
    is taken: others that need the machine for themselves hold it too."""

    def __init__(self, machine: str, wanted: Snapshots, busy: threading.Lock) -> None:
        self._machine, self._wanted, self._busy = machine, wanted, busy
        self._over = threading.Event()
        self._held = 0.0        # time.monotonic until which none is begun
        self._last: dict[str, Any] = {"id": None, "created": None, "error": ""}
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    @property
    def last(self) -> dict[str, Any]:
        """``id`` and ``created`` (ISO 8601, UTC) of the last one; ``error``: why there is none since, or empty."""
        return self._last

    def hold(self, seconds: float) -> None:
        """None is being taken when this returns, nor is one begun for so long."""
        self._held = time.monotonic() + seconds
        with self._busy:
            pass

    def go_on(self) -> None:
        """They are held off no longer."""
        self._held = 0.0

    def end(self) -> None:
        """No other is begun; the one that is being taken is waited for. Not while ``busy`` is held."""
        self._over.set()
        self._thread.join()

    def give_up(self) -> None:
        """No other is begun; for the holder of ``busy``, so that none is being taken."""
        self._over.set()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            with self._busy:
                now = time.monotonic()
                if now < self._held or self._over.is_set():
                    due = now + _HELD_LOOK
                    continue
                due = now + self._wanted.every
                self._try(self._take)
            self._try(self._merge)      # needs the chain alone

    def _try(self, work: Callable[[], None]) -> None:
        """Whatever goes wrong is said, and tried again the next time."""
        try:
            work()
        except Exception as exc:
            self._last = {**self._last, "error": str(exc) if isinstance(exc, (VmmError, OSError))
                          else f"{type(exc).__name__}: {one_line(str(exc))}"}

    def _take(self) -> None:
        with Machine.attach(self._machine) as machine:
            taken = _create(machine, self._wanted.directory)
        self._last = {"id": taken.id, "created": taken.created, "error": ""}

    def _merge(self) -> None:
        if self._last["id"] and len(chain(self._wanted.directory)) > self._wanted.keep:
            merge(self._wanted.directory)


def _create(machine: Machine, directory: Path) -> Manifest:
    """On top of the last one; where that is damaged, or the machine does not know what it has dirtied since, a whole
    one, which takes the place of all that there are. Raises VmmError."""
    there = survey(directory) if directory.exists() else []
    if there:
        with contextlib.suppress(NoParent):
            return create(machine, directory, incremental=True, live=True)
    taken = create(machine, directory, live=True)
    for each in reversed(there):        # none is needed by one before it
        with contextlib.suppress(VmmError):
            delete(directory, each.id)
    return taken
