"""state.json in the runtime directory: what a replacement coordinator must know beyond the shared memory."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ipc.messages import Exited
from ipc.processid import ProcessId

from ..spec import RamSlot
from ..verify import Verification
from .leases import Lease
from .limits import Limit
from .owners import Hold
from .pauses import HandedOver

__all__ = ["Holds", "Journal", "Saved"]


class Holds(msgspec.Struct):
    """Who has what of the machine: the user, and processes."""

    user_paused: bool
    pauses: list[Hold]
    handed_over: HandedOver | None
    leases: list[Lease]
    user_limits: list[int]      # of each vCPU, pages a second
    limits: list[Limit]
    clients: list[Hold]
    incoming: ProcessId | None  # fills in the memory


class Saved(msgspec.Struct):
    slots: list[RamSlot]
    clients: list[str]
    elapsed: float
    started: bool
    verification: Verification | None
    exits: dict[int, Exited]
    restarts: int
    holds: Holds
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
