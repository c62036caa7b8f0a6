"""What the system writes into the machine's memory, logged as a vCPU's writes are: in a ring of its own, or a bitmap.

A page makes an entry when it is written for the first time since its last entry was reset, as with write protection.
The order is that of a processor that faults too late: first the store, then the look whether there is an entry. If
there is one, its reset is still to come, and whoever reads the page because of that entry reads it after the reset.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable

from ipc.layout import DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET, RING_RESERVE, Tracking, VcpuControl
from ipc.messages import SlotSpec, WorkerSpec
from ipc.shm import PAGE_SIZE, Segment

from ..memory import GuestMemory

__all__ = ["WriteLog"]

_KEPT_FREE = 64         # entries; a call that writes more waits in between


class WriteLog:
    """``make_room`` is called in the middle of a call, and returns when entries have been freed (or raises, and the
    call is given up). Nothing is logged before ``active`` is set. Methods are the vCPU thread's, but for ``reset``,
    ``get`` and ``clear``."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl,
                 make_room: Callable[[], None]) -> None:
        """Raises SegmentError."""
        self._memory, self._control, self._make_room = memory, control, make_room
        self.active = False
        self._slots: list[tuple[int, int, int]] = []    # (first frame, end, id) of those that are logged
        self._segment: Segment | None = None
        self._lock = threading.Lock()
        self._marked: dict[int, set[int]] = {}          # bitmap: {slot id: pages}
        self._specs = {slot.id: slot for slot in spec.slots}
        self.follow(spec)

    def follow(self, spec: WorkerSpec) -> None:
        """Log as this specification says; the log is empty. Raises SegmentError."""
        segment = Segment.open(spec.ring_segment) if spec.mode is Tracking.RING else None
        self.close()
        self._segment, self._mode, self._entries = segment, spec.mode, spec.ring_entries
        self._soft_limit = spec.ring_entries - RING_RESERVE
        if segment is not None:
            view = memoryview(segment.buf)
            self._narrow, self._wide = view.cast("I"), view.cast("Q")
        self.rebuild()
        self._list_slots()

    def rebuild(self) -> None:
        """The ring is empty, its entries are free."""
        if self._segment is not None:
            ctypes.memset(self._segment.address, 0, self._segment.size)
        self._open: set[int] = set()            # pages that have an entry which is not reset
        self._order: deque[int] = deque()       # the same, in the order of the entries
        self.pushed = self._freed = 0
        self._marked = {slot_id: set() for slot_id in self._specs}

    def close(self) -> None:
        """Idempotent."""
        if self._segment is not None:
            self._narrow.release()
            self._wide.release()
            self._segment.close()
            self._segment = None

    # --- slots ------------------------------------------------------------------------------------------------------

    def set_slot(self, slot: SlotSpec) -> None:
        self._specs[slot.id] = slot
        self._marked.setdefault(slot.id, set())
        self._list_slots()

    def remove_slot(self, slot_id: int) -> None:
        self._specs.pop(slot_id, None)
        self._list_slots()

    def _list_slots(self) -> None:
        self._slots = [(slot.gpa // PAGE_SIZE, (slot.gpa + slot.size) // PAGE_SIZE, slot.id)
                       for slot in self._specs.values()
                       if slot.log and self._mode in (Tracking.RING, Tracking.BITMAP)]

    # --- the system writes ------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Soft-full."""
        return self._segment is not None and self.pushed - self._freed >= self._soft_limit

    def need(self, count: int = 1) -> None:
        """Before so many pages are written."""
        while self._segment is not None and self.pushed - self._freed + count > self._entries - _KEPT_FREE:
            self._make_room()

    def wrote(self, frame: int) -> None:
        """After that."""
        if not self.active:
            return
        for first, end, slot_id in self._slots:
            if first <= frame < end:
                if self._segment is None:
                    with self._lock:
                        self._marked[slot_id].add(frame - first)
                elif frame not in self._open:
                    self._push(frame, slot_id, frame - first)
                return

    def _push(self, frame: int, slot_id: int, page: int) -> None:
        self._open.add(frame)
        self._order.append(frame)
        at = self.pushed % self._entries
        self._narrow[4 * at + 1] = slot_id
        self._wide[2 * at + 1] = page
        self._narrow[4 * at] = DIRTY_GFN_F_DIRTY        # last: stores are seen in their order
        self.pushed += 1
        self._control.pushed_total = self.pushed

    # --- the ring is reset, the bitmap read -------------------------------------------------------------------------

    def reset(self, expected: int) -> int:
        """Free what was harvested; how many. By the reset thread."""
        count = 0
        while count < expected:
            at = self._freed % self._entries
            if self._narrow[4 * at] != DIRTY_GFN_F_RESET:
                break
            self._open.discard(self._order.popleft())   # first: what is written from now on makes an entry
            self._narrow[4 * at] = 0
            self._freed += 1
            count += 1
        return count

    def get(self, slot_id: int) -> int:
        """Put the slot's bits into its log buffer; how many pages. Raises KeyError."""
        slot = self._memory.slots[slot_id]
        with self._lock:
            pages = list(self._marked[slot_id])
        found = bytearray(-(-slot.spec.size // PAGE_SIZE // 64) * 8)
        for page in pages:
            found[page >> 3] |= 1 << (page & 7)
        ctypes.memmove(slot.log_address, bytes(found), len(found))
        return len(pages)

    def clear(self, slot_id: int) -> None:
        """What its log buffer says is forgotten. Raises KeyError."""
        slot = self._memory.slots[slot_id]
        bits = ctypes.string_at(slot.log_address, -(-slot.spec.size // PAGE_SIZE // 64) * 8)
        with self._lock:
            self._marked[slot_id] = {page for page in self._marked[slot_id] if not bits[page >> 3] >> (page & 7) & 1}
