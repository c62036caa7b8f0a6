"""Tracking ``uffd``: the pages of the slots that this worker has written, its vCPU above all."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ipc.bitmap import word_count
from ipc.messages import SlotSpec
from ipc.shm import PAGE_SIZE
from ipc.writelog import WriteLog

from ..memory import GuestMemory

__all__ = ["SlotWrites"]


class SlotWrites:
    """One log of the process's writes over all logged slots. ``memory`` has them mapped."""

    def __init__(self, memory: GuestMemory, slots: Iterable[SlotSpec]) -> None:
        """Raises UserfaultError, with nothing watched."""
        self._memory = memory
        self._watched: set[int] = set()
        self._log = WriteLog()
        try:
            for slot in slots:
                self.follow(slot)
        except BaseException:
            self.close()
            raise

    def follow(self, slot: SlotSpec) -> None:
        """Log the slot from now on, or no more, as it says. Raises UserfaultError."""
        if not slot.log:
            self.drop(slot.id)
        elif slot.id not in self._watched:
            self._log.watch(self._memory.slots[slot.id].host_address, slot.size)
            self._watched.add(slot.id)

    def drop(self, slot_id: int) -> None:
        if slot_id in self._watched:
            self._watched.remove(slot_id)
            slot = self._memory.slots[slot_id]
            self._log.forget(slot.host_address, slot.spec.size)

    def get(self, slot_id: int) -> int:
        """Add what was written since the last call to the slot's log segment; pages that are set in it."""
        slot = self._memory.slots[slot_id]
        pages = slot.spec.size // PAGE_SIZE
        assert slot.log_segment is not None
        words = np.frombuffer(slot.log_segment.buf, np.uint64, word_count(pages))
        self._log.collect(slot.host_address, pages, words)
        return int(np.bitwise_count(words).sum())

    def close(self) -> None:
        """Idempotent."""
        self._log.close()
