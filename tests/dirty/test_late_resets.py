"""Rings that are harvested, and not reset before somebody asks or they get full."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import ACCELS, changed_pages, spec, until

from ipc.layout import RING_MIN, RING_RESERVE
from vmm.client.machine import Machine
from vmm.machine.rules import fitting_ring
from vmm.machine.spec import RamSlot, ReaperSpec

OFTEN = ReaperSpec(mode="fixed", interval=0.005)
_MIB = 4                # of the guest's memory: its pages are fewer than the ring has entries


def count(machine: Machine, what: str) -> int:
    return sum(vcpu[what] for vcpu in machine.status()["vcpus"])


def reaped(machine: Machine, times: int = 5) -> bool:
    """So often more; True, or it fails."""
    wanted = machine.status()["reaper"]["iterations"] + times
    until(lambda: machine.status()["reaper"]["iterations"] >= wanted, "the reaper reaps")
    return True


@pytest.mark.parametrize("accel", ACCELS)
def test_what_nobody_has_asked_for_is_not_protected_again_and_not_lost(accel: str) -> None:
    walk = spec("sequential", accel=accel, mib=_MIB, passes=0, timeout=None, reaper=OFTEN, log="always")
    with Machine.launch(walk) as machine:
        until(lambda: count(machine, "dirty_pages") > 500, "pages are harvested")
        pages = count(machine, "dirty_pages")
        assert reaped(machine)
        assert count(machine, "resets") == count(machine, "ring_full_exits") == 0
        assert count(machine, "dirty_pages") < pages + (_MIB << 8) + 64     # each page once
        # One who comes now is told of what is written from now on, though it makes no entry any more.
        machine.pause()
        machine.register("late")
        before = machine.ram(0).copy()
        machine.resume()
        assert reaped(machine)
        machine.pause()
        changed = changed_pages(before, machine.ram(0))
        told = {page for first, number in machine.sync("late").slots[0] for page in range(first, first + number)}
        assert changed
        assert changed <= told
        # It has been protected again by then.
        assert count(machine, "resets") >= 1
        before = machine.ram(0).copy()
        machine.resume()
        assert reaped(machine)
        machine.pause()
        again = {page for first, number in machine.sync("late").slots[0] for page in range(first, first + number)}
        assert set() < changed_pages(before, machine.ram(0)) <= again


@pytest.mark.parametrize("accel", ACCELS)
def test_a_ring_that_all_pages_fit_into_is_not_reset_before_somebody_asks(accel: str) -> None:
    """However little room is left in it then: there are no more pages to fill it."""
    pages = 8192 - RING_RESERVE - 1
    walk = spec("random", accel=accel, vcpus=1, ring=8192, slots=[RamSlot(0, 0, pages * 4096)], writes=0, timeout=None,
                reaper=OFTEN)
    with Machine.launch(walk) as machine:
        machine.register("a")
        memory = machine.ram(0)
        for _ in range(3):
            machine.pause()
            machine.sync("a")
            before, resets = memory.copy(), count(machine, "resets")
            machine.resume()
            until(lambda old=before: len(changed_pages(old, memory)) > 0.92 * pages, "nearly all of it is written")
            assert reaped(machine)
            assert count(machine, "resets") == resets
            assert count(machine, "ring_full_exits") == 0


@pytest.mark.parametrize("accel", ACCELS)
def test_where_each_entry_counts_a_ring_is_reset_with_each_reap(accel: str) -> None:
    walk = spec("sequential", accel=accel, mib=_MIB, passes=0, timeout=None, reaper=OFTEN, log="always")
    with Machine.launch(walk) as machine:
        assert reaped(machine)
        assert count(machine, "resets") == 0
        machine.dirty_limit(1000, 0)
        until(lambda: machine.status()["vcpus"][0]["resets"] > 5, "a ring with a limit is reset")
        machine.dirty_limit(0)
        assert reaped(machine, 2)       # one may have begun before
        resets = count(machine, "resets")
        assert reaped(machine)
        assert count(machine, "resets") == resets


@pytest.mark.parametrize("accel", ACCELS)
def test_reset_early(accel: str) -> None:
    walk = spec("sequential", accel=accel, mib=_MIB, passes=0, timeout=None,
                reaper=ReaperSpec(mode="fixed", interval=0.005, reset="early"), log="always")
    with Machine.launch(walk) as machine:
        until(lambda: count(machine, "resets") > 5, "rings are reset")


@given(slots=st.lists(st.integers(1, 1 << 26), min_size=1, max_size=4), largest=st.sampled_from([1024, 4096, 65536]))
def test_a_fitting_ring_has_room_for_all_pages_and_is_no_larger_than_it_must(slots: list[int], largest: int) -> None:
    entries = fitting_ring([RamSlot(i, 0, pages * 4096) for i, pages in enumerate(slots)], largest)
    room = entries - RING_RESERVE
    assert RING_MIN <= entries <= largest
    assert entries & (entries - 1) == 0
    assert room > sum(slots) or entries == largest
    assert entries == RING_MIN or entries / 2 - RING_RESERVE <= sum(slots)
