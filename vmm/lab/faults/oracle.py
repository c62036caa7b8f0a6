"""What one client of the dirty log got, held against the memory that it sees.

The oracle keeps a copy of every slot. A page that differs from the copy must be in the client's bitmaps, whatever was
killed, switched, plugged or taken over in between:

* ``check`` pauses the machine, syncs, and compares: what changed since the last look must be in what this sync gave.
* ``look`` compares while the guest runs. Memory is read first and synced after, so whatever the reading saw had been
  written before the flush. It is compared with a copy that was read *before* the sync ahead: a page that changed
  since may have been in that sync already, so both count.

A slot without logging is not compared until it is logged again: all of it must be dirty then. A slot that has been
removed is told for the last time, and is compared as the guest left it. Nothing is said about surplus pages: a client
may always be told too much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE

from ...client.machine import Machine
from ...errors import VmmError

__all__ = ["Lost", "Oracle"]

_Pages = NDArray[np.uint8]      # [pages, PAGE_SIZE]


class Lost(VmmError):
    """A page that changed is in no sync of the client's."""


@dataclass(slots=True)
class _Slot:
    born: int
    memory: _Pages              # the guest's own; of a removed slot, what it left
    copy: _Pages
    before: NDArray[np.bool_]   # pages of the sync before, where the copy is older than that


class Oracle:
    """A client of its own on a connection of its own. Registered from its making."""

    def __init__(self, machine: str, client: str) -> None:
        """Raises VmmError."""
        self._machine = Machine.attach(machine)
        self._client = client
        self._slots: dict[int, _Slot] = {}
        self._gone: dict[int, _Slot] = {}       # removed, and not told of yet
        #: Pages that were compared, and that were in a sync.
        self.compared = self.dirty = 0
        self.come()

    def come(self) -> None:
        """Registered from now on. Raises VmmError."""
        self._slots.clear()
        self._gone.clear()
        self._machine.register(self._client)
        self._follow(known=False)

    def leave(self) -> None:
        """Raises VmmError."""
        self._machine.unregister(self._client)

    def look(self) -> None:
        """While the guest runs, if it does. Raises Lost, VmmError."""
        self._follow()
        read = {slot: each.memory.copy() for slot, each in self._slots.items()}
        self._compare(read, still=False)

    def check(self) -> None:
        """With every vCPU paused. Raises Lost, VmmError."""
        with self._machine.paused("fault campaign"):
            self._follow()
            self._compare({slot: each.memory.copy() for slot, each in self._slots.items()}, still=True)

    def _follow(self, *, known: bool = True) -> None:
        """The slots as they are now. ``known``: the client was there before them, so that whatever is not zero in a
        new one is dirty."""
        now = {each["id"]: each for each in self._machine.status()["slots"]}
        for slot_id, each in list(self._slots.items()):
            if slot_id not in now or now[slot_id]["born"] != each.born:
                self._gone[slot_id] = self._slots.pop(slot_id)
        for slot_id, report in now.items():
            if slot_id not in self._slots:
                memory = self._machine.ram(slot_id).reshape(-1, PAGE_SIZE)
                copy = np.zeros_like(memory) if known else memory.copy()
                self._slots[slot_id] = _Slot(report["born"], memory, copy, np.zeros(len(memory), bool))

    def _compare(self, read: dict[int, _Pages], *, still: bool) -> None:
        found = self._machine.sync(self._client)
        for slot_id, each in list(self._gone.items()):
            if slot_id in found.retired and slot_id not in found.unlogged:
                self._hold(slot_id, each, each.memory, self._bits(slot_id), "the slot was removed")
            del self._gone[slot_id]
        for slot_id, now in read.items():
            each = self._slots[slot_id]
            if slot_id in found.unlogged or slot_id in found.retired:
                continue        # what it has is compared when it is logged again
            dirty = self._bits(slot_id)
            self._hold(slot_id, each, now, dirty | each.before, "paused" if still else "running")
            self.compared += len(now)
            self.dirty += int(dirty.sum())
            each.copy[:] = now
            each.before = np.zeros(len(now), bool) if still else dirty

    def _bits(self, slot_id: int) -> NDArray[np.bool_]:
        return self._machine.bitmap(slot_id, self._client).bools()

    def _hold(self, slot_id: int, each: _Slot, now: _Pages, dirty: NDArray[np.bool_], how: str) -> None:
        lost = np.flatnonzero((now != each.copy).any(axis=1) & ~dirty)
        if len(lost):
            shown = ", ".join(f"{page:#x}" for page in lost[:8])
            raise Lost(f"client {self._client}: {len(lost)} pages of slot {slot_id} changed and are in no sync "
                       f"({how}): {shown}{', …' if len(lost) > 8 else ''}")

    def close(self) -> None:
        """Idempotent. The client stays registered."""
        self._slots.clear()
        self._gone.clear()
        self._machine.detach()
