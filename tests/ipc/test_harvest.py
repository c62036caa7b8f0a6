"""Harvest and reset against a plain Python model of the ring protocol.

The machine below plays producer (a vCPU), coordinator (harvest, publish) and owner (reset) in any
order, crashes of the coordinator included. The oracle is a Python set a page of which is never
forgotten; it shares no code with the kernels.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipc.bitmap import Bitmap, bitmap_bytes, slot_table
from ipc.compiled import calls
from ipc.layout import MAX_SLOTS
from ipc.shm import Segment
from vmm.machine.names import segment_name

ENTRIES = 16
SLOTS = {0: 130, 3: 5000}   # slot id -> pages; neither a multiple of 64
ENTRY = struct.Struct("<IIQ")

good = st.sampled_from(sorted(SLOTS)).flatmap(
    lambda s: st.tuples(st.just(s), st.one_of(st.integers(0, SLOTS[s] - 1), st.just(SLOTS[s] - 1))))
bad = st.one_of(
    st.tuples(st.just(0), st.integers(SLOTS[0], 2**64 - 1)),            # past the end of the slot
    st.tuples(st.integers(4, 0xFFFF), st.integers(0, 10)),              # no such slot
    st.tuples(st.integers(1, 0xFFFF).map(lambda a: a << 16), st.integers(0, 10)),   # no such as_id
)


class Ring:
    """The ring and its two bitmaps in real segments, and the model beside them."""

    def __init__(self, fetch: int = 0) -> None:
        self.memory = Segment.create(segment_name("test-harvest", "ring"), ENTRIES * 16)
        size = sum(2 * bitmap_bytes(p) for p in SLOTS.values())
        self.maps = Segment.create(segment_name("test-harvest", "maps"), size)
        self.guard = bytes(self.maps.size)
        self.staging: dict[int, Bitmap] = {}
        self.published: dict[int, Bitmap] = {}
        self.table = slot_table(MAX_SLOTS)
        offset = 0
        for slot, pages in SLOTS.items():
            self.staging[slot] = Bitmap(self.maps, offset, pages)
            self.published[slot] = Bitmap(self.maps, offset + bitmap_bytes(pages), pages)
            offset += 2 * bitmap_bytes(pages)
            self.table[slot] = (self.staging[slot].words_address, self.staging[slot].summary_address, pages)
        self.push_total = self.fetch_total = self.reset_total = fetch
        self.bad = 0

    def entry(self, index: int) -> tuple[int, int, int]:
        flags, slot, offset = ENTRY.unpack_from(self.memory.buf, index % ENTRIES * 16)
        return flags, slot, offset

    def set_flags(self, index: int, flags: int) -> None:
        struct.pack_into("<I", self.memory.buf, index % ENTRIES * 16, flags)

    def push(self, slot: int, offset: int) -> bool:
        if self.push_total - self.reset_total >= ENTRIES:
            return False
        ENTRY.pack_into(self.memory.buf, self.push_total % ENTRIES * 16, 1, slot, offset)
        self.push_total += 1
        return True

    def harvest(self, limit: int | None = None, pages: np.ndarray[Any, Any] | None = None) -> int:
        out = np.zeros(4, np.uint64)
        room = ENTRIES - (self.fetch_total - self.reset_total)
        calls.harvest(self.memory.address, ENTRIES, self.fetch_total, min(room, limit or room),
                        self.table.ctypes.data, MAX_SLOTS, out.ctypes.data,
                        *((0, 0) if pages is None else (pages.ctypes.data, len(pages))))
        self.bad += int(out[1])
        return int(out[0])

    def reset(self) -> int:
        """What KVM_RESET_DIRTY_RINGS does: from its own index on, while the entry is harvested."""
        count = 0
        while count < ENTRIES and self.entry(self.reset_total + count)[0] & 2:
            self.set_flags(self.reset_total + count, 0)
            count += 1
        self.reset_total += count
        return count

    def publish(self) -> None:
        for slot, staging in self.staging.items():
            calls.publish(staging, self.published[slot])

    def pages(self, maps: dict[int, Bitmap]) -> set[tuple[int, int]]:
        return {(slot, int(p)) for slot, m in maps.items() for p in np.flatnonzero(m.bools())}

    def close(self) -> None:
        self.staging.clear()
        self.published.clear()
        self.memory.close()
        self.maps.close()


class HarvestMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # Near the wrap of a 32-bit index, where the seed's kvm_fetch_index wraps.
        self.ring = Ring(fetch=2**32 - 3 * ENTRIES)
        self.dirtied: set[tuple[int, int]] = set()      # pushed and not yet seen published
        self.queue: list[tuple[int, int]] = []          # pushed, not harvested
        self.unprotected: set[tuple[int, int]] = set()  # harvested, not reset
        self.bad = 0

    @rule(page=good)
    def guest_dirties(self, page: tuple[int, int]) -> None:
        if self.ring.push(*page):
            self.dirtied.add(page)
            self.queue.append(page)

    @rule(page=bad)
    def bad_entry(self, page: tuple[int, int]) -> None:
        if self.ring.push(*page):
            self.bad += 1
            self.queue.append((-1, -1))

    @rule(limit=st.integers(1, ENTRIES))
    def harvest(self, limit: int) -> None:
        room = ENTRIES - (self.ring.fetch_total - self.ring.reset_total)
        expected = min(len(self.queue), limit, room)
        assert self.ring.harvest(limit) == expected
        self.ring.fetch_total += expected
        taken, self.queue = self.queue[:expected], self.queue[expected:]
        self.unprotected |= {p for p in taken if p[0] >= 0}

    @precondition(lambda self: self.queue)
    @rule(limit=st.integers(1, ENTRIES))
    def coordinator_dies_before_it_stores_the_fetch_index(self, limit: int) -> None:
        room = ENTRIES - (self.ring.fetch_total - self.ring.reset_total)
        done = self.ring.harvest(limit)                 # flags say RESET, fetch_total does not know
        bad = self.ring.bad
        again = self.ring.harvest()                     # the successor
        assert again == min(len(self.queue), room) >= done
        assert self.ring.bad - bad <= again - done      # entries taken twice are not counted bad twice
        self.ring.fetch_total += again
        taken, self.queue = self.queue[:again], self.queue[again:]
        self.unprotected |= {p for p in taken if p[0] >= 0}

    @rule()
    def reap(self) -> None:
        """The whole step in its order; the count must match, and then the pages may be seen."""
        self.harvest(ENTRIES)
        owed = self.ring.fetch_total - self.ring.reset_total
        assert self.ring.reset() == owed
        self.unprotected.clear()
        self.ring.publish()
        waiting = {p for p in self.queue if p[0] >= 0}
        seen = self.ring.pages(self.ring.published)
        assert self.dirtied - waiting <= seen           # nothing lost
        assert seen <= self.dirtied                     # nothing made up
        for bitmap in self.ring.published.values():
            bitmap.clear()
        self.dirtied = waiting

    @invariant()
    def nothing_published_early(self) -> None:
        assert not self.ring.pages(self.ring.published)
        assert self.unprotected <= self.ring.pages(self.ring.staging)

    @invariant()
    def bad_entries_are_counted_and_dropped(self) -> None:
        assert self.ring.bad <= self.bad
        assert self.ring.pages(self.ring.staging) <= self.dirtied

    def teardown(self) -> None:
        self.ring.close()


HarvestMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHarvest = HarvestMachine.TestCase


@pytest.fixture
def ring() -> Any:
    made = Ring()
    yield made
    made.close()


def test_exactly_full_ring_is_harvested_once_and_not_again(ring: Ring) -> None:
    for page in range(ENTRIES):
        assert ring.push(0, page)
    assert not ring.push(0, 99)
    assert ring.harvest() == ENTRIES
    ring.fetch_total += ENTRIES
    assert ring.harvest() == 0      # its own RESET entries are no predecessor's leavings
    assert ring.reset() == ENTRIES
    assert ring.harvest() == 0
    assert ring.pages(ring.staging) == {(0, p) for p in range(ENTRIES)}


def test_harvest_stops_at_the_first_entry_that_is_not_dirty(ring: Ring) -> None:
    for page in range(4):
        ring.push(0, page)
    ring.set_flags(2, 0)            # not published yet
    assert ring.harvest() == 2
    assert ring.pages(ring.staging) == {(0, 0), (0, 1)}


def test_entries_are_traced_in_order_with_the_fetch_index(ring: Ring) -> None:
    ring.push_total = ring.fetch_total = ring.reset_total = 2**32 - 2
    for page in (5, 4, 129):
        ring.push(0, page)
    pages = np.zeros(3 * ENTRIES, np.uint64)
    assert ring.harvest(pages=pages) == 3
    assert pages[:9].tolist() == [2**32 - 2, 0, 5, 2**32 - 1, 0, 4, 2**32, 0, 129]


def test_bad_entries_touch_nothing_outside_the_bitmaps(ring: Ring) -> None:
    for slot, offset in [(0, 130), (0, 2**63), (1, 0), (0xFFFF, 0), (1 << 16, 0), (3, 5000)]:
        ring.push(slot, offset)
    assert ring.harvest() == 6
    assert ring.bad == 6
    assert not any(bytes(ring.maps.buf))
