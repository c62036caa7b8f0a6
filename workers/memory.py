"""The worker's view of guest memory: the slots' segments, mapped."""

from __future__ import annotations

import ctypes

from ipc.messages import SlotSpec
from ipc.shm import Segment

__all__ = ["GuestMemory", "Slot"]


class Slot:
    """A memory slot mapped into this process."""

    __slots__ = ("log_segment", "segment", "spec")

    def __init__(self, spec: SlotSpec) -> None:
        self.spec = spec
        self.segment = Segment.open(spec.segment)
        self.log_segment = Segment.open(spec.log_segment) if spec.log_segment else None

    def set_log_segment(self, name: str) -> None:
        """Always opened anew: one of the same name may have been made since. Raises SegmentError."""
        fresh = Segment.open(name)
        if self.log_segment is not None:
            self.log_segment.close()
        self.log_segment = fresh

    @property
    def host_address(self) -> int:
        return self.segment.address

    @property
    def log_address(self) -> int:
        """Bitmap mode: first byte of this vCPU's log buffer (one bit per page, 64-bit words). Raises
        KeyError in any other mode."""
        if self.log_segment is None:
            raise KeyError(f"slot {self.spec.id} has no log buffer")
        return self.log_segment.address

    def close(self) -> None:
        self.segment.close()
        if self.log_segment is not None:
            self.log_segment.close()


class GuestMemory:
    """All slots of one vCPU process by id, the system slot among them."""

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}
        #: Post-copy: what is a hole gets what another host has there.
        self.is_arriving = False

    def add(self, spec: SlotSpec) -> Slot:
        slot = Slot(spec)
        self.slots[spec.id] = slot
        return slot

    def remove(self, slot_id: int) -> None:
        self.slots.pop(slot_id).close()

    def host_address(self, gpa: int, length: int = 1) -> int:
        """Host address of ``length`` guest bytes within one slot. Raises KeyError outside RAM."""
        for slot in self.slots.values():
            if slot.spec.gpa <= gpa and gpa + length <= slot.spec.gpa + slot.spec.size:
                return slot.host_address + gpa - slot.spec.gpa
        raise KeyError(f"guest address {gpa:#x} is outside RAM")

    def read(self, gpa: int, length: int) -> bytes:
        """Raises KeyError outside RAM."""
        return ctypes.string_at(self.host_address(gpa, length), length)

    def close(self) -> None:
        for slot in self.slots.values():
            slot.close()
        self.slots.clear()
