"""Lanes: what is read is what was written, in order, or is counted as lost; and never half of two marks."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import time

from hypothesis import given
from hypothesis import strategies as st

from ipc.lanes import Kind, Lane
from ipc.layout import control_size, coordinator_lane, vcpu_lane

MARK = 32       # bytes


def fresh(capacity: int) -> Lane:
    return Lane(bytearray(MARK * (1 + capacity)))


@given(st.integers(1, 9), st.lists(st.integers(0, 12), max_size=12))
def test_every_mark_is_read_once_or_lost(capacity: int, bursts: list[int]) -> None:
    """Against a plain list of all that was put. Of what a lane has room for, all but the oldest is read: the writer
    might have been writing over that one."""
    lane, put, after = fresh(capacity), 0, 0
    for burst in bursts:
        for _ in range(burst):
            lane.put(Kind.REAP, took=put, who=put % 7, value=put)
            put += 1
        marks, after, lost = lane.read(before := after)
        read = [mark.value for mark in marks]
        assert read == list(range(before + lost, put))
        assert after == put
        assert lost == max(0, burst + 1 - capacity)
        assert all(mark.who == mark.value % 7 and mark.took == mark.value for mark in marks)
        assert all(a.at <= b.at for a, b in itertools.pairwise(marks))


def test_a_mark_says_when_it_was_put() -> None:
    lane = fresh(4)
    before = time.monotonic_ns()
    lane.put(Kind.STALL, took=5)
    (mark,), _, _ = lane.read(0)
    assert before <= mark.at <= time.monotonic_ns()
    assert (mark.kind, mark.took, mark.who, mark.value) == (Kind.STALL, 5, 0, 0)


def test_numbers_that_do_not_fit_are_cut_and_not_an_error() -> None:
    """A mark must never be what a coordinator ends for."""
    lane = fresh(4)
    lane.put(Kind.REAP, who=(3 << 32) + 5, value=-1)
    (mark,), _, _ = lane.read(0)
    assert (mark.who, mark.value) == (5, (1 << 64) - 1)


def test_no_mark_is_half_of_two() -> None:
    """Another process writes as fast as it can into a lane so small that it laps its reader again and again."""
    memory = mmap.mmap(-1, MARK * 64)
    lane = Lane((ctypes.c_char * len(memory)).from_buffer(memory))
    writer = os.fork()
    if not writer:
        number = 0
        while True:
            lane.put(Kind.REAP, took=number, who=number & 0xFFFF, value=number)
            number += 1
    try:
        after = seen = lapped = 0
        deadline = time.monotonic() + 20.0
        while (seen < 20_000 or not lapped) and time.monotonic() < deadline:
            marks, after, lost = lane.read(after)
            first = after - len(marks)
            assert [m.value for m in marks] == list(range(first, after))
            assert all(m.took == m.value and m.who == m.value & 0xFFFF for m in marks)
            seen, lapped = seen + len(marks), lapped + (lost > 0)
        assert seen >= 20_000
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        del lane
    memory.close()


def test_a_lane_has_what_its_writer_writes_and_nothing_else() -> None:
    """Whatever a worker that went wild has put there, it is not told as if another had."""
    memory = (ctypes.c_char * control_size(2))()
    lanes = {Lane.of_coordinator(ctypes.addressof(memory), 2): coordinator_lane(2),
             Lane.of_vcpu(ctypes.addressof(memory), 2, 1): vcpu_lane(2, 1)}
    seen: list[set[Kind]] = []
    for lane, (offset, size) in lanes.items():
        wild = Lane((ctypes.c_char * size).from_buffer(memory, offset))
        for kind in Kind:
            wild.put(kind)
        seen.append({mark.kind for mark in lane.read(0)[0]})
    assert seen == [{kind for kind in Kind if kind > 16}, {kind for kind in Kind if kind < 16}]


@given(st.binary(min_size=MARK * 4, max_size=MARK * 4), st.integers(0, 1 << 64))
def test_junk_is_no_mark(junk: bytes, after: int) -> None:
    """A worker that went wild may have written anything over its lane."""
    now = time.monotonic_ns()
    marks, _, lost = Lane(bytearray(junk)).read(after)
    assert lost >= 0
    assert all(isinstance(m.kind, Kind) and 0 <= m.took <= m.at <= now + 60 * 10**9 for m in marks)


def test_lanes_lie_behind_the_blocks_and_apart() -> None:
    for vcpus in (1, 2, 256):
        places = [(0, 4096 * (1 + vcpus)), coordinator_lane(vcpus), *(vcpu_lane(vcpus, i) for i in range(vcpus))]
        assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(places))
        assert sum(places[-1]) == control_size(vcpus)
