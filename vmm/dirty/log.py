"""The dirty log: from staging to the slot bitmaps, and from there to each client's own.

The order is invariant 2 (docs/protocol.md): a page's bit leaves staging only after its re-protection has been
acknowledged. The reaper calls :meth:`DirtyLog.publish` then; :meth:`DirtyLog.sync` is QEMU's
``kvm_log_sync_global`` without its walk over slots not in use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import msgspec
import numpy as np

from ipc.bitmap import slot_table
from ipc.layout import MAX_SLOTS
from ipc.messages import SlotSpec
from ipc.steps import step

from ..errors import VmmError
from ..machine.memory import ClientBitmaps, MemorySlot
from ..machine.names import check_client_name
from ..machine.spec import RamSlot

__all__ = ["DirtyLog", "LogClient", "Retired", "Taken"]


class Retired(msgspec.Struct):
    """A removed slot, whose last pages a client has not been told yet. ``delivered``: its last sync told them; the
    next one that does not ask for the same again drops them."""

    slot: RamSlot
    delivered: bool = False


class LogClient(msgspec.Struct):
    """What a successor must know of a client."""

    name: str
    generation: int                 # tells it from an earlier client of that name
    retired: list[Retired] = []


class LogMaps:
    """Of the dirty log: its bitmaps of each slot, and of those that it is still to be told of."""

    def __init__(self, name: str, generation: int) -> None:
        self.name = name
        self.generation = generation
        self.maps: dict[int, ClientBitmaps] = {}
        self.retired: dict[int, tuple[Retired, ClientBitmaps]] = {}

    def close(self) -> None:
        """Its segments are unlinked."""
        for maps in self.maps.values():
            maps.close()
            step("client-unlink")
        for _, maps in self.retired.values():
            maps.close()
        self.maps.clear()
        self.retired.clear()


class Taken(msgspec.Struct):
    """One slot in a client's sync. ``retired``: it is gone, and these are its last pages."""

    slot: RamSlot
    dirty: int
    segment: str
    retired: bool = False


class DirtyLog:
    """All bitmaps of a machine. Single-threaded: the coordinator's loop is its lock.

    What is done here is done in an order that a successor can continue from wherever it was torn: bitmaps are in
    shared memory, and a bit is set where it is to go before it is cleared where it was. What the journal is to say
    of it (``clients``, ``slots``) changes in one place of each method, and the caller commits it.
    """

    def __init__(self, machine: str, reapers: int = 1) -> None:
        self.machine = machine
        #: The vCPUs log what they write to the logged slots. Off: nobody needs it (docs/decisions/0020).
        self.on = True
        self.slots: dict[int, MemorySlot] = {}
        #: Ids that had another slot before: a client that has looked at that one must be told all of the next.
        self.reused: set[int] = set()
        #: One for each reaper: where its harvests go.
        self.tables = [slot_table(MAX_SLOTS) for _ in range(reapers)]
        self.table_addresses = [table.ctypes.data for table in self.tables]
        self._clients: dict[str, LogMaps] = {}
        #: Host writes under way, (slot id, its born, first page, pages): dirty in each take until they are over.
        self.open_writes: list[tuple[int, int, int, int]] = []
        #: What the journal says of ``clients`` is out of date.
        self.changed = False
        #: What is not needed once the journal does not name it.
        self._gone: list[ClientBitmaps | LogMaps] = []
        #: Is told of pages that are marked without the guest having written them: (slot id, first page, pages).
        self.on_mark: Callable[[int, int, int], None] = lambda slot_id, first, count: None

    @functools.cached_property
    def _loops(self) -> ModuleType:
        from ipc.compiled import calls

        return calls

    def load_loops(self) -> None:
        """Import the compiled loops now rather than at their first use (30 ms)."""
        _ = self._loops

    # --- slots ------------------------------------------------------------------------------

    def add_slot(self, slot: MemorySlot) -> None:
        """Each client gathers its pages from now on. Under an id that had another slot before, all of it is dirty:
        what a client knows of that id is of the other. Raises SegmentError, with everything as it was."""
        slot_id = slot.spec.id
        made: dict[str, ClientBitmaps] = {}
        try:
            for client in self._clients.values():
                made[client.name] = ClientBitmaps.make(self.machine, client.name, client.generation, slot.spec)
                step("memory-add-client")
        except BaseException:
            for maps in made.values():
                maps.close()
            raise
        for name, maps in made.items():
            self._clients[name].maps[slot_id] = maps
        self._insert(slot)
        if slot_id in self.reused:
            self.mark_all(slot_id)

    def slot_spec(self, slot: MemorySlot, vcpu: int) -> SlotSpec:
        """What the vCPU's worker is told of the slot: also whether to log it now."""
        return slot.worker_spec(vcpu, log=self.logs(slot))

    def logs(self, slot: MemorySlot) -> bool:
        """The vCPUs log what they write to it now, if the mode of tracking does."""
        return self.on and slot.logged

    def _insert(self, slot: MemorySlot) -> None:
        self.slots[slot.spec.id] = slot
        for table, staging in zip(self.tables, slot.staging, strict=True):
            table[slot.spec.id] = (staging.words_address, staging.summary_address, slot.pages)

    def discard_slot(self, slot_id: int) -> None:
        """Take ``add_slot`` back; the slot itself is the caller's to close."""
        for table in self.tables:
            table[slot_id] = 0
        del self.slots[slot_id]
        for client in self._clients.values():
            client.maps.pop(slot_id).close()

    def retire_slot(self, slot_id: int) -> MemorySlot:
        """Fold what is known of the slot into every client, then forget it. The guest is stopped and the rings are
        empty (invariant 6). Each client sees the slot once more, at its next sync. Closing the slot is the
        caller's, when this has been committed."""
        slot = self.slots[slot_id]
        self._fold(slot)
        for table in self.tables:
            table[slot_id] = 0
        for client in self._clients.values():
            self._drop_retired(client, slot_id)     # of an earlier one: this client never asked
            client.retired[slot_id] = (Retired(slot.now), client.maps.pop(slot_id))
        self.reused.add(slot_id)
        return self.slots.pop(slot_id)

    def unretire_slot(self, slot: MemorySlot) -> None:
        """Take ``retire_slot`` back."""
        slot_id = slot.spec.id
        for client in self._clients.values():
            client.maps[slot_id] = client.retired.pop(slot_id)[1]
        self._insert(slot)

    # --- producer's side ---------------------------------------------------------------------

    def publish(self) -> int:
        """Staging to slot bitmaps, after the reset was acknowledged; bits that were new."""
        fresh = 0
        for slot in self.slots.values():
            for staging in slot.staging:
                fresh += self._loops.publish(staging, slot.bitmap)
        return fresh

    def mark_logged_slots(self) -> int:
        """All pages of all logged slots dirty (invariant 3); the number of pages."""
        pages = 0
        for slot in self.slots.values():
            if slot.logged:
                self.mark_all(slot.spec.id)
                pages += slot.pages
        return pages

    def mark_all(self, slot_id: int) -> None:
        """It is unknown which pages of the slot were written."""
        self.mark(slot_id, 0, self.slots[slot_id].pages)

    def mark(self, slot_id: int, first: int, count: int, born: int | None = None) -> None:
        """These pages may have been written, by the host (invariant 7) or by something unknown. ``born``: of the
        slot that is meant. Raises VmmError outside the slot, and where that slot is no longer there."""
        if slot_id not in self.slots:
            raise VmmError(f"there is no memory slot {slot_id} (existing slots: {', '.join(map(str, self.slots))})")
        slot = self.slots[slot_id]
        if born is not None and slot.spec.born != born:
            raise VmmError(f"slot {slot_id}: it was removed, and another slot was added under its id since")
        try:
            slot.bitmap.mark_range(first, count)
        except IndexError as exc:
            raise VmmError(f"slot {slot_id}: {exc}") from None
        self.on_mark(slot_id, first, count)

    # --- clients -------------------------------------------------------------------------------

    def register(self, client: str, generation: int, like: str = "") -> None:
        """Begin to gather for ``client``, with what ``like`` has gathered; idempotent. ``generation``: not that of
        an earlier client of this name. Raises VmmError for a bad name, or when there is no ``like``, and
        SegmentError; everything is as it was then."""
        if client in self._clients:
            return
        check_client_name(client)
        if like and like not in self._clients:
            raise VmmError(f"there is no dirty-log client '{like}'")
        # What the slot bitmaps hold by now was dirtied before this client was there.
        self._fold_all()
        made = LogMaps(client, generation)
        try:
            for slot_id, slot in self.slots.items():
                made.maps[slot_id] = ClientBitmaps.make(self.machine, client, generation, slot.spec)
                step("register-bitmap")
                if like:
                    self._loops.fold(self._clients[like].maps[slot_id].pending, made.maps[slot_id].pending)
        except BaseException:
            made.close()
            raise
        self._clients[client] = made

    def adopt_client(self, saved: LogClient) -> None:
        """Take over the bitmaps of a client of a coordinator that died. Raises SegmentError."""
        client = self._clients[saved.name] = LogMaps(saved.name, saved.generation)
        adopt = functools.partial(ClientBitmaps.make, self.machine, saved.name, saved.generation, adopt=True)
        for slot_id, slot in self.slots.items():
            client.maps[slot_id] = adopt(slot.spec)
        for retired in saved.retired:
            client.retired[retired.slot.id] = (retired, adopt(retired.slot))

    def unregister(self, client: str) -> LogMaps:
        """Gather no more for it. Its segments go once the journal does not name it (``committed``), or it is
        readmitted."""
        found = self._clients.pop(client)
        self._gone.append(found)
        return found

    def readmit(self, client: LogMaps) -> None:
        """Take ``unregister`` back, at once."""
        self._gone.remove(client)
        self._clients[client.name] = client

    def discard_client(self, client: str) -> None:
        """Take ``register`` back: no journal has named it."""
        self._clients.pop(client).close()

    @property
    def clients(self) -> list[str]:
        return sorted(self._clients)

    def saved_clients(self) -> list[LogClient]:
        """What a successor must know of them."""
        return [LogClient(c.name, c.generation, [retired for retired, _ in c.retired.values()])
                for c in self._clients.values()]

    def mark_client(self, client: str, slot_id: int) -> None:
        """All of the slot is dirty for this client."""
        self._clients[client].maps[slot_id].pending.mark_range(0, self.slots[slot_id].pages)

    def mark_for(self, client: str, slot_id: int, word: int, bits: bytes) -> None:
        """These pages are dirty for this client alone (``bits``: one a page, from the lowest of word ``word`` on, whole
        words). Raises VmmError, with nothing marked."""
        maps = self._clients[client].maps
        if slot_id not in maps:
            raise VmmError(f"there is no memory slot {slot_id} (existing slots: {', '.join(map(str, maps))})")
        words, pending = np.frombuffer(bits, "<u8"), maps[slot_id].pending
        end = 64 * (word + len(words))
        if word < 0 or end - 64 >= pending.pages or (
                end > pending.pages and int(words[-1]) >> 64 - (end - pending.pages)):
            raise VmmError(f"slot {slot_id} has no such pages")
        pending.merge(words, word)

    def take(self, client: str, *, again: bool = False) -> dict[int, Taken]:
        """Fold the slot bitmaps into every client's, then give ``client`` its own: its synced bitmaps hold what was
        dirtied since its last take. By slot id. ``again``: the last take was not received, and is given once more
        with it. The caller has flushed; where ``changed`` is set, it has the journal written before it answers."""
        for slot_id, born, first, count in self.open_writes:
            if slot_id in self.slots and self.slots[slot_id].spec.born == born:
                self.mark(slot_id, first, count)
        owner = self._clients[client]
        if again:
            for maps in (*owner.maps.values(), *(maps for _, maps in owner.retired.values())):
                self._loops.fold(maps.synced, maps.pending)
                step("sync-again")
        alone = len(self._clients) == 1
        if not alone:
            self._fold_all()
        taken: dict[int, Taken] = {}
        for slot_id, maps in owner.maps.items():
            slot = self.slots[slot_id]
            dirty = (self._loops.take(slot.bitmap, maps.pending, maps.synced) if alone
                     else self._take_pending(maps))
            step("sync-slot")
            taken[slot_id] = Taken(slot.now, dirty, maps.segment.name)
        for slot_id, (retired, maps) in list(owner.retired.items()):
            if slot_id in owner.maps or (retired.delivered and not again):
                self._drop_retired(owner, slot_id)
                continue
            dirty = self._take_pending(maps)
            taken[slot_id] = Taken(retired.slot, dirty, maps.segment.name, retired=True)
            self.changed = self.changed or not retired.delivered
            retired.delivered = True
        return taken

    def _take_pending(self, maps: ClientBitmaps) -> int:
        self._loops.clear(maps.synced)
        return int(self._loops.publish(maps.pending, maps.synced))

    def synced(self, client: str, slot_id: int) -> ClientBitmaps:
        return self._clients[client].maps[slot_id]

    def _fold_all(self) -> None:
        for slot in self.slots.values():
            self._fold(slot)

    def _fold(self, slot: MemorySlot) -> None:
        for client in self._clients.values():
            self._loops.fold(slot.bitmap, client.maps[slot.spec.id].pending)
            step("fold-client")
        self._loops.clear(slot.bitmap)

    def _drop_retired(self, client: LogMaps, slot_id: int) -> None:
        if slot_id in client.retired:
            self._gone.append(client.retired.pop(slot_id)[1])
            self.changed = True

    # --- the journal ------------------------------------------------------------------------------

    def committed(self) -> None:
        """The journal has been written: what it does not name any more is unlinked."""
        self.changed = False
        while self._gone:
            step("log-unlink")
            self._gone.pop().close()

    def segments(self) -> list[str]:
        """Names of every segment that is the log's: of slots and of clients."""
        return [*(name for slot in self.slots.values() for name in slot.segments),
                *(maps.segment.name for client in self._clients.values()
                  for maps in (*client.maps.values(), *(each for _, each in client.retired.values())))]

    # --- counts ----------------------------------------------------------------------------------

    def dirty_pages(self, slot_id: int) -> int:
        """Pages dirty and not yet folded to the clients."""
        return self.slots[slot_id].bitmap.count()

    def close(self) -> None:
        for each in (*self._clients.values(), *self._gone):
            each.close()
        self._clients.clear()
        self._gone.clear()
        for slot in self.slots.values():
            slot.close()
        self.slots.clear()
