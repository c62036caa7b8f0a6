"""How full a ring is, as whoever looks sees it: against the entries that went in and those that were freed."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.layout import VcpuControl
from ipc.ring import RingReader
from ipc.shm import Segment
from vmm.machine.names import segment_name

ENTRIES = 16
ENTRY = struct.Struct("<IIQ")

steps = st.lists(st.tuples(st.sampled_from(["push", "harvest", "reset"]), st.integers(0, ENTRIES)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(steps, st.sampled_from([0, 2**32 - 5, 2**32 - 1]))
def test_entries_that_are_not_free_are_counted(steps: list[tuple[str, int]], first: int) -> None:
    """Wherever the ring's beginning is in it, and with nothing changed by the look."""
    memory = Segment.create(segment_name("test-fill", "ring"), ENTRIES * ENTRY.size)
    try:
        control = VcpuControl(fetch_total=first, reset_total=first)
        ring = RingReader(control, ENTRIES)
        ring.map_segment(memory)
        pushed = harvested = freed = first
        for what, count in steps:
            if what == "push":
                end = min(pushed + count, freed + ENTRIES)
                for number in range(pushed, end):
                    ENTRY.pack_into(memory.buf, number % ENTRIES * ENTRY.size, 1, 0, number)
                pushed = end
            elif what == "harvest":
                end = min(harvested + count, pushed)
                for number in range(harvested, end):
                    ENTRY.pack_into(memory.buf, number % ENTRIES * ENTRY.size, 2, 0, number)
                harvested = end
                control.fetch_total = harvested
            else:
                for number in range(freed, harvested):
                    ENTRY.pack_into(memory.buf, number % ENTRIES * ENTRY.size, 0, 0, number)
                freed = harvested
                control.reset_total = freed
            before = np.frombuffer(memory.buf, np.uint8).copy()
            assert ring.filled == pushed - freed
            assert np.array_equal(before, np.frombuffer(memory.buf, np.uint8))
        control.reset_total = control.fetch_total + 1       # a ring that has lost count, and one that is not there
        assert ring.filled == 0
        ring.forget()
        assert ring.filled == 0
    finally:
        memory.close()
