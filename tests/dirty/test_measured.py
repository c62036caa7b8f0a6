"""Tracking ``auto``, which goes by what is measured: the decision against a record of all that it was told, and
machines whose rings do not hold what they write."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from machines import ACCELS, changed_pages, replace, spec, until

from vmm.client.machine import Machine
from vmm.dirty.tracking.auto import Measured, Sample

ROOM = 1000
VCPUS = 2
TIMEOUT = 120.0      # what is measured has other tests beside it


class Decision(RuleBasedStateMachine):
    """What a machine goes through, in seconds and pages. The rules that hold are told from the whole record."""

    def __init__(self) -> None:
        super().__init__()
        self.measured = Measured(ROOM)
        self.mode = "ring"
        self.now = 100.0
        self.repeats, self.stalled, self.flushes = 0, 0.0, 0
        self.pages = [0] * VCPUS
        self.record: list[tuple[float, str, float, float]] = []     # (now, mode, cost so far, most of a flush)
        self.switched = [(self.now, "ring")]
        self.tell(0.0)

    def tell(self, most: float) -> None:
        self.record.append((self.now, self.mode, self.repeats * 2.1e-6 + self.stalled, most))
        chosen = self.measured.choose(self.mode, Sample(self.now, VCPUS, self.repeats, self.stalled, self.flushes,
                                                        tuple(self.pages)))
        assert chosen in ("ring", "bitmap")
        if chosen != self.mode:
            self.allowed(chosen)
            self.mode = chosen
            self.switched.append((self.now, chosen))
            self.record.append((self.now, self.mode, self.record[-1][2], 0.0))

    def allowed(self, chosen: str) -> None:
        since = self.switched[-1][0]
        if chosen == "bitmap":      # some second or more, up to now, cost more than 5 % of both vCPUs
            cost = self.record[-1][2]
            assert any(self.now - then >= 1.0 and cost - before > 0.05 * VCPUS * (self.now - then)
                       for then, mode, before, _ in self.record if then >= since)
        else:                       # nothing larger than half a ring for ten seconds
            assert self.now - since >= 10.0
            assert all(most <= ROOM / 2 for then, _, _, most in self.record if then > self.now - 10.0)

    @rule(seconds=st.sampled_from([0.001, 0.3, 1.0, 4.0]), share=st.sampled_from([0.0, 0.04, 0.06, 0.9]))
    @precondition(lambda self: self.mode == "ring")
    def rings_cost(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.repeats += int(share * VCPUS * seconds / 2.1e-6)
        self.tell(0.0)

    @rule(seconds=st.sampled_from([0.001, 1.0, 4.0]), share=st.sampled_from([0.01, 0.5]))
    @precondition(lambda self: self.mode == "ring")
    def vcpus_stall(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.stalled += share * VCPUS * seconds
        self.tell(0.0)

    @rule(seconds=st.sampled_from([0.01, 1.0, 6.0, 20.0]),
          first=st.sampled_from([0, 10, ROOM // 2, ROOM // 2 + 1, ROOM]))
    @precondition(lambda self: self.mode == "bitmap")
    def syncs(self, seconds: float, first: int) -> None:
        self.now += seconds
        self.flushes += 1
        self.pages[0] += first
        self.pages[1] += 5
        self.tell(first)

    @rule(seconds=st.sampled_from([0.5, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tell(0.0)

    @invariant()
    def rings_that_are_tried_in_vain_are_tried_less_and_less(self) -> None:
        """Of three stretches of bitmaps with next to nothing in between, the last is four times as long."""
        stretches = list(zip(self.switched, self.switched[1:], strict=False))
        lengths = [(then - now, mode) for (now, mode), (then, _) in stretches]
        for at in range(len(lengths) - 4):
            (a, kind), (b, _), (c, _), (d, _), (e, _) = lengths[at:at + 5]
            if kind == "bitmap" and b < 10.0 and d < 10.0:
                assert c >= 20.0
                assert e >= 40.0
                assert a >= 10.0


Decision.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestDecision = Decision.TestCase


def test_a_mode_that_others_have_set_is_measured_anew() -> None:
    measured = Measured(ROOM)
    assert measured.choose("ring", Sample(0.0, 1, 0, 0.0, 0, (0,))) == "ring"
    assert measured.choose("bitmap", Sample(50.0, 1, 10**9, 0.0, 1, (0,))) == "bitmap"      # no window of rings
    assert measured.choose("ring", Sample(60.0, 1, 10**9, 0.0, 2, (0,))) == "ring"
    measured.forget()
    assert measured.choose("ring", Sample(70.0, 1, 2 * 10**9, 0.0, 2, (0,))) == "ring"
    assert measured.choose("ring", Sample(71.5, 1, 3 * 10**9, 0.0, 2, (0,))) == "bitmap"


def told(machine: Machine) -> set[int]:
    return {p for first, count in machine.sync("a").slots[0] for p in range(first, first + count)}


@pytest.mark.parametrize("accel", ACCELS)
def test_rings_that_do_not_hold_what_is_written_make_room_for_bitmaps_and_come_back(accel: str) -> None:
    """With nothing lost on either way. (A slot that is not logged is one that nothing is written to.) The guest gets as
    much of the processor as others do, or it would cost too little."""
    hot = replace(spec("random", accel=accel, vcpus=1, ring=1024, writes=0, timeout=None, mib=8), tracking="auto",
                  nice=0)
    with Machine.launch(hot) as machine:
        assert machine.status()["tracking"] == "ring"
        machine.register("a")
        before = machine.ram(0).copy()
        until(lambda: machine.status()["tracking"] == "bitmap", "bitmaps", TIMEOUT)
        machine.pause()
        assert set() < changed_pages(before, machine.ram(0)) <= told(machine)
        machine.resume()
        machine.log_stop(0)

        def back() -> bool:
            machine.sync("a")
            return bool(machine.status()["tracking"] == "ring")

        until(back, "rings", TIMEOUT)
        machine.log_start(0)
        machine.pause()
        told(machine)
        before = machine.ram(0).copy()
        machine.resume()
        until(lambda: machine.status()["tracking"] == "bitmap", "bitmaps again", TIMEOUT)
        machine.pause()
        assert set() < changed_pages(before, machine.ram(0)) <= told(machine)


@pytest.mark.parametrize("accel", ACCELS)
@pytest.mark.parametrize("needs", ["limit", "asked"])
def test_rings_stay_where_they_are_needed(accel: str, needs: str) -> None:
    """However little they hold: for a limit, and where a user has asked for them."""
    hot = replace(spec("random", accel=accel, vcpus=1, ring=1024, writes=0, timeout=None, mib=8),
                  tracking="ring" if needs == "asked" else "auto")
    with Machine.launch(hot) as machine:
        machine.register("a")
        if needs == "limit":
            machine.dirty_limit(1 << 40)        # which nobody comes to
        resets = machine.status()["vcpus"][0]["resets"]
        seconds = machine.status()["vcpus"][0]["guest_s"] + 3.0
        until(lambda: machine.status()["vcpus"][0]["guest_s"] > seconds, "it has run for some windows", TIMEOUT)
        assert machine.status()["vcpus"][0]["resets"] > resets
        assert machine.status()["tracking"] == "ring"
