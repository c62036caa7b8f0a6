"""What the software CPU logs: its memory slots with a byte of flags for each page, and its ring.

The hooks (workers/accel/unicorn/hooks.py) read and set the flags at guest speed, through the table of slots that is
written here into their context. Everything here is done with the guest standing still, but ``dirty_log``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.layout import RING_RESERVE, Tracking
from ipc.messages import SlotSpec, WorkerSpec
from ipc.shm import PAGE_SIZE, Segment

from ...memory import GuestMemory
from .context import PAGE_CODE, PAGE_LOGGED, SLOT

__all__ = ["LoggedPages"]


class _Slot:
    """A RAM slot here: where its memory is, and its page flags."""

    def __init__(self, spec: SlotSpec, host: int, logged: bool) -> None:
        self.spec = spec
        self.host = host
        self.flags: NDArray[np.uint8] = np.zeros(spec.size // PAGE_SIZE, np.uint8)
        self.log(logged)

    def log(self, on: bool) -> None:
        """Off is as if every page had its entry already."""
        if on:
            self.flags &= 0xFF ^ PAGE_LOGGED
        else:
            self.flags |= PAGE_LOGGED


class LoggedPages:
    """``context``: the hooks' (workers/accel/unicorn/context.py), of which the ring's and the slots' fields are
    filled in here."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, context: Any) -> None:
        """Raises SegmentError."""
        self._spec = spec
        self._memory = memory
        self._c = context
        self._slots: dict[int, _Slot] = {}
        self._ring: Segment | None = None
        self._table: NDArray[Any] = np.zeros(0, SLOT)
        for slot in memory.slots.values():
            if slot.spec.id != spec.system_slot.id:
                self._slots[slot.spec.id] = _Slot(slot.spec, slot.host_address, self._logs(slot.spec))
        self._write_table()
        if spec.ring_entries:
            self._use_ring(Segment.open(spec.ring_segment))

    def _logs(self, slot: SlotSpec) -> bool:
        """The hooks log this slot: with a ring or in bitmap mode. (Otherwise it is as if every page had its entry
        already; the hooks stay, for the code that the guest may write.)"""
        return slot.log and self._spec.mode in (Tracking.RING, Tracking.BITMAP)

    def _write_table(self) -> None:
        """Tell the hooks of the slots."""
        rows = [(s.spec.gpa, s.spec.gpa + s.spec.size, s.host, s.flags.ctypes.data, s.spec.id)
                for s in self._slots.values()]
        self._table = np.array(rows, SLOT)
        self._c.slots, self._c.slot_count, self._c.last_slot = self._table.ctypes.data, len(rows), 0

    def _use_ring(self, ring: Segment | None) -> None:
        if self._ring is not None:
            self._ring.close()
        self._ring = ring
        entries = 0 if ring is None else self._spec.ring_entries
        self._c.ring, self._c.entries = 0 if ring is None else ring.address, entries
        self._c.soft_limit = max(0, entries - RING_RESERVE)

    # --- the log --------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Nothing is in the log, every page that is logged is logged at its next write."""
        if self._ring is not None:
            ctypes.memset(self._ring.address, 0, self._spec.ring_entries * 16)
        self._c.pushed = self._c.reset = self._c.overflowed = 0
        for slot in self._slots.values():
            slot.log(self._logs(slot.spec))

    def track(self, spec: WorkerSpec, ring: Segment | None) -> None:
        """As ``spec`` says from now on, with nothing in the log. The ring is closed here."""
        self._spec = spec
        self._use_ring(ring)
        self.restart()

    def dirty_log(self, slot_id: int) -> int:
        """Bitmap mode: the slot's dirty pages into its log buffer; how many. The guest may run: what it dirties
        behind this is in the next log."""
        dirty = (self._slots[slot_id].flags & PAGE_LOGGED).astype(bool)
        self._log_buffer(slot_id)[:] = np.packbits(dirty, bitorder="little")
        return int(dirty.sum())

    def clear(self, slot_id: int) -> None:
        """The next write to the pages set in the log buffer is logged again."""
        slot = self._slots[slot_id]
        bits = np.unpackbits(self._log_buffer(slot_id), bitorder="little", count=len(slot.flags))
        slot.flags[bits.astype(bool)] &= 0xFF ^ PAGE_LOGGED

    def _log_buffer(self, slot_id: int) -> NDArray[np.uint8]:
        size = -(-len(self._slots[slot_id].flags) // 8)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._memory.slots[slot_id].log_address))

    # --- slots and code -------------------------------------------------------------------------------

    def knows(self, slot: SlotSpec) -> bool:
        """The slot is here already, and is as ``slot`` says from now on."""
        known = self._slots.get(slot.id)
        if known is None:
            return False
        if known.spec.log != slot.log:
            known.log(self._logs(slot))
        known.spec = slot
        return True

    def add(self, slot: SlotSpec) -> None:
        self._slots[slot.id] = _Slot(slot, self._memory.slots[slot.id].host_address, self._logs(slot))
        self._write_table()

    def remove(self, slot_id: int) -> SlotSpec:
        spec = self._slots.pop(slot_id).spec
        self._write_table()
        return spec

    def mark_code(self, address: int, size: int) -> bool:
        """Code that has been looked at lies there: a write to it must be seen. Whether a page had none before."""
        fresh = False
        for slot in self._slots.values():
            first, last = address - slot.spec.gpa, address + size - 1 - slot.spec.gpa
            if first < slot.spec.size and last >= 0:
                flags = slot.flags[max(first, 0) // PAGE_SIZE:last // PAGE_SIZE + 1]
                fresh = fresh or not (flags & PAGE_CODE).all()
                flags |= PAGE_CODE
        return fresh

    def has_code(self, gpa: int, size: int) -> bool:
        """Some of it does."""
        return any(bool((slot.flags[max(gpa - slot.spec.gpa, 0) // PAGE_SIZE:
                                    max(gpa + size - slot.spec.gpa, 0) // PAGE_SIZE] & PAGE_CODE).any())
                   for slot in self._slots.values())

    def forget_code(self) -> None:
        """None does."""
        for slot in self._slots.values():
            slot.flags &= 0xFF ^ PAGE_CODE

    def close(self) -> None:
        """Idempotent."""
        self._c = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None
