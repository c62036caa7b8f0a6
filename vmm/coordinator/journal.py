"""state.json in the runtime directory: what a replacement coordinator must know beyond the shared memory."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ipc.messages import Exited

from ..spec import RamSlot
from ..verify import Verification

__all__ = ["Journal", "Saved"]


class Saved(msgspec.Struct):
    slots: list[RamSlot]
    clients: list[str]
    elapsed: float
    started: bool
    user_paused: bool
    verification: Verification | None
    exits: dict[int, Exited]
    restarts: int
    owners: dict[str, int]
    pause_owner: int
    incoming: int
    tracking: str               # one of vmm.tracking.MODES
    asked_tracking: str         # one of vmm.tracking.CHOICES


class Journal:
    def __init__(self, directory: Path) -> None:
        self._path = directory / "state.json"

    def write(self, saved: Saved) -> None:
        """Aside, and renamed over. Raises OSError."""
        aside = self._path.with_suffix(".json.new")
        aside.write_bytes(msgspec.json.encode(saved))
        aside.rename(self._path)

    def read(self) -> Saved | None:
        """None: there is none yet (the keeper does not ask for a replacement then)."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Saved)
        except FileNotFoundError:
            return None
