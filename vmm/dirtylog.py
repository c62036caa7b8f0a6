"""The dirty log: from staging to the slot bitmaps, and from there to each client's own.

The order is design invariant 2: a page's bit leaves staging only after its re-protection has been
acknowledged. The reaper calls :meth:`DirtyLog.publish` then; :meth:`DirtyLog.sync` is the seed's
``kvm_log_sync_global`` without its walk over slots not in use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

from ipc.bitmap import slot_table
from ipc.layout import MAX_SLOTS

from .errors import VmmError
from .names import check_client_name
from .ram import ClientBitmaps, MemorySlot

__all__ = ["DirtyLog"]


class DirtyLog:
    """All bitmaps of a machine. Single-threaded: the coordinator's loop is its lock."""

    def __init__(self, machine: str, reapers: int = 1) -> None:
        self.machine = machine
        self.slots: dict[int, MemorySlot] = {}
        #: One for each reaper: where its harvests go.
        self.tables = [slot_table(MAX_SLOTS) for _ in range(reapers)]
        self.table_addresses = [table.ctypes.data for table in self.tables]
        self._clients: dict[str, dict[int, ClientBitmaps]] = {}
        #: Is told of pages that are marked without the guest having written them: (slot id, first page, pages).
        self.on_mark: Callable[[int, int, int], None] = lambda slot_id, first, count: None
        #: Removed slots that a client still holds bitmaps of: its next take reports them once more
        #: (False), the one after that drops them (True).
        self._retired: dict[tuple[str, int], bool] = {}

    @functools.cached_property
    def _kernels(self) -> ModuleType:
        from ipc import kernels

        return kernels

    def load_kernels(self) -> None:
        """Import the compiled loops now rather than at their first use (30 ms)."""
        _ = self._kernels

    # --- slots ------------------------------------------------------------------------------

    def add_slot(self, slot: MemorySlot) -> None:
        slot_id = slot.spec.id
        for client in self._clients:
            if (client, slot_id) in self._retired:
                self._drop(client, slot_id)
        self.slots[slot_id] = slot
        for table, staging in zip(self.tables, slot.staging, strict=True):
            table[slot_id] = (staging.words_address, staging.summary_address, slot.pages)
        for name, bitmaps in self._clients.items():
            bitmaps[slot_id] = ClientBitmaps.make(self.machine, name, slot_id, slot.pages)

    def remove_slot(self, slot_id: int) -> MemorySlot:
        """Fold what is known of the slot into every client, then forget it. The guest is stopped and
        the rings are empty (invariant 6). Each client sees the slot once more, at its next sync."""
        self._fold(self.slots[slot_id])
        for table in self.tables:
            table[slot_id] = 0
        for name in self._clients:
            self._retired[name, slot_id] = False
        return self.slots.pop(slot_id)

    # --- producer's side ---------------------------------------------------------------------

    def publish(self) -> int:
        """Staging to slot bitmaps, after the reset was acknowledged; bits that were new."""
        fresh = 0
        for slot in self.slots.values():
            for staging in slot.staging:
                fresh += self._kernels.publish(staging, slot.bitmap)
        return fresh

    def mark_logged_slots(self) -> int:
        """All pages of all logged slots dirty (invariant 3); the number of pages."""
        pages = 0
        for slot in self.slots.values():
            if slot.logged:
                self.mark(slot.spec.id, 0, slot.pages)
                pages += slot.pages
        return pages

    def mark(self, slot_id: int, first: int, count: int) -> None:
        """These pages may have been written, by the host (invariant 7, after it was made) or nobody knows by whom.
        Raises VmmError outside the slot."""
        if slot_id not in self.slots:
            raise VmmError(f"there is no memory slot {slot_id}")
        try:
            self.slots[slot_id].bitmap.mark_range(first, count)
        except IndexError as exc:
            raise VmmError(f"slot {slot_id}: {exc}") from None
        self.on_mark(slot_id, first, count)

    # --- clients -------------------------------------------------------------------------------

    def register(self, client: str) -> None:
        """Begin to gather for ``client``; idempotent. Raises VmmError for a bad name."""
        if client in self._clients:
            return
        check_client_name(client)
        # What the slot bitmaps hold by now was dirtied before this client was there.
        self._fold_all()
        made: dict[int, ClientBitmaps] = {}
        try:
            for slot_id, slot in self.slots.items():
                made[slot_id] = ClientBitmaps.make(self.machine, client, slot_id, slot.pages)
        except BaseException:
            for bitmaps in made.values():
                bitmaps.close()
            raise
        self._clients[client] = made

    def copy_client(self, client: str, other: str) -> None:
        """Add to ``client`` what ``other`` has gathered. Raises VmmError when there is no such client."""
        if other not in self._clients:
            raise VmmError(f"there is no client '{other}' of the dirty log")
        self._fold_all()
        for slot_id, maps in self._clients[other].items():
            if slot_id in self._clients[client]:
                self._kernels.fold(maps.gathering, self._clients[client][slot_id].gathering)

    def adopt_client(self, client: str) -> None:
        """Open the bitmaps of a client of a coordinator that died."""
        self._clients[client] = {
            slot_id: ClientBitmaps.make(self.machine, client, slot_id, slot.pages, create=False)
            for slot_id, slot in self.slots.items()}

    def unregister(self, client: str) -> None:
        for slot_id in list(self._clients.get(client, {})):
            self._drop(client, slot_id)
        self._clients.pop(client, None)

    @property
    def clients(self) -> list[str]:
        return sorted(self._clients)

    def take(self, client: str) -> dict[int, int]:
        """Fold the slot bitmaps into every client's, then give ``client`` its own: its front bitmaps
        hold what was dirtied since its last take. {slot id: dirty pages}. The caller has flushed."""
        alone = len(self._clients) == 1
        if not alone:
            self._fold_all()
        taken: dict[int, int] = {}
        for slot_id, maps in list(self._clients[client].items()):
            if self._retired.get((client, slot_id)):
                self._drop(client, slot_id)
                continue
            if (client, slot_id) in self._retired:
                self._retired[client, slot_id] = True
            if alone and slot_id in self.slots and (client, slot_id) not in self._retired:
                taken[slot_id] = self._kernels.take(self.slots[slot_id].bitmap, maps.gathering, maps.front)
                continue
            self._kernels.clear(maps.front)
            taken[slot_id] = self._kernels.publish(maps.gathering, maps.front)
        return taken

    def give_back(self, client: str) -> None:
        """What the client's last take gave is given again by its next one (the answer was lost)."""
        for maps in self._clients[client].values():
            maps.gathering.merge(maps.front.words)

    def front(self, client: str, slot_id: int) -> ClientBitmaps:
        return self._clients[client][slot_id]

    def _fold_all(self) -> None:
        for slot in self.slots.values():
            self._fold(slot)

    def _fold(self, slot: MemorySlot) -> None:
        for bitmaps in self._clients.values():
            self._kernels.fold(slot.bitmap, bitmaps[slot.spec.id].gathering)
        self._kernels.clear(slot.bitmap)

    def _drop(self, client: str, slot_id: int) -> None:
        self._retired.pop((client, slot_id), None)
        self._clients[client].pop(slot_id).close()

    # --- counts ----------------------------------------------------------------------------------

    def dirty_pages(self, slot_id: int) -> int:
        """Pages dirty and not yet folded to the clients."""
        return self.slots[slot_id].bitmap.count()

    def close(self) -> None:
        for client in list(self._clients):
            self.unregister(client)
        for slot in self.slots.values():
            slot.close()
        self.slots.clear()
