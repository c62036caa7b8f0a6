"""The slots of one worker: its mappings, its accelerator and its write log change together, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ipc.messages import SlotSpec

from .accel.base import Accelerator
from .memory import GuestMemory

if TYPE_CHECKING:
    from .tracking.uffd import SlotWrites

__all__ = ["Slots"]


class Slots:
    """By the service thread, with the vCPU paused. ``writes``: with tracking ``uffd``. Methods raise AccelError,
    SegmentError, UserfaultError and OSError; the slot is as it was then."""

    def __init__(self, memory: GuestMemory, accel: Accelerator, writes: SlotWrites | None, system_id: int) -> None:
        self._memory = memory
        self._accel = accel
        self._writes = writes
        self._system_id = system_id

    def set(self, slot: SlotSpec) -> None:
        """Have it, logged as it says. A slot has the segment that it was added with: one of this id that has
        another is an earlier one, and goes."""
        known = self._memory.slots.get(slot.id)
        if known is not None and known.spec.segment != slot.segment:
            self.remove(slot.id)
            known = None
        if known is None:
            self._add(slot)
        elif known.spec != slot:
            if slot.log_segment:
                known.set_log_segment(slot.log_segment)
            self._accel.set_memslot(slot)
            known.spec = slot
            if self._writes is not None:
                self._writes.follow(slot)

    def _add(self, slot: SlotSpec) -> None:
        self._memory.add(slot)
        try:
            self._accel.set_memslot(slot)
            try:
                if self._writes is not None:
                    self._writes.follow(slot)
            except BaseException:
                self._accel.remove_memslot(slot.id)
                raise
        except BaseException:
            self._memory.remove(slot.id)
            raise

    def remove(self, slot_id: int) -> None:
        """Idempotent."""
        if slot_id not in self._memory.slots:
            return
        if self._writes is not None:
            self._writes.drop(slot_id)
        self._accel.remove_memslot(slot_id)
        self._memory.remove(slot_id)

    def set_all(self, slots: Iterable[SlotSpec]) -> None:
        """Have these and no others."""
        wanted = {slot.id: slot for slot in slots}
        for slot_id in [i for i in self._memory.slots if i not in wanted and i != self._system_id]:
            self.remove(slot_id)
        for slot in wanted.values():
            self.set(slot)
