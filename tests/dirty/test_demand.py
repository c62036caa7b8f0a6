"""The vCPUs log what they write while somebody needs it: not for nobody, and from the first who asks with nothing
lost. What was written is seen in memory, which the log has no part in."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import ACCELS, ANY, changed_pages, exact, replace, spec, until
from needs import missing

from ipc.sockets import FdListener
from vmm.client.machine import Machine
from vmm.errors import VmmError
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

TIMEOUT = 60.0
LOGGING = ["ring", "bitmap"] + ([] if missing("uffd") else ["uffd"])
MODES = [*LOGGING, "auto"]
PLUGGED = 0x4000_0000


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def busy(accel: str, tracking: str = "ring", **more: Any) -> MachineSpec:
    """It writes all the time, in all of its memory."""
    return replace(spec("stamp", accel=accel, writes=0, spin=50, timeout=None, mib=4), tracking=tracking, **more)


def logging(machine: Machine) -> bool:
    return bool(machine.status()["logging"])


def harvested(machine: Machine) -> int:
    return sum(vcpu["dirty_pages"] for vcpu in machine.status()["vcpus"])


def told(machine: Machine, client: str, slot: int = 0) -> set[int]:
    return {p for first, count in machine.sync(client).slots[slot] for p in range(first, first + count)}


def writes(machine: Machine) -> None:
    """For a while: pages of all of its memory."""
    memory = machine.ram(0)
    before = memory.copy()
    until(lambda: len(changed_pages(before, memory)) > 100, "the guest writes")


def off(machine: Machine) -> None:
    """At once: whoever sets a mode of tracking has it as it is to be."""
    machine.set_tracking(machine.status()["tracking_asked"])
    until(lambda: not logging(machine), "logging is off")


def check(machine: Machine, client: str) -> None:
    """Whatever changes from here on, while it runs, its next sync says."""
    machine.pause()
    told(machine, client)
    before = machine.ram(0).copy()
    machine.resume()
    writes(machine)
    machine.pause()
    changed = changed_pages(before, machine.ram(0))
    assert set() < changed <= told(machine, client)
    machine.resume()


# --- for nobody, and for the first ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_logged_for_nobody_and_all_for_the_first_who_asks(accel: str, mode: str) -> None:
    with Machine.launch(busy(accel, mode)) as machine:
        for turn in range(4):
            assert not logging(machine)
            counted = harvested(machine)
            writes(machine)
            if turn % 2:    # the memory of which nothing has been told is that which the guest stood still with
                machine.pause()
            machine.register("first")
            assert logging(machine)
            if turn == 1:   # what was written before would have been found by now: there was nothing
                assert harvested(machine) == counted
            before = machine.ram(0).copy()
            if turn % 2:
                machine.resume()
            writes(machine)
            machine.pause()
            changed = changed_pages(before, machine.ram(0))
            assert set() < changed <= told(machine, "first")
            machine.resume()
            check(machine, "first")
            machine.unregister("first")
            assert logging(machine)     # for a moment: it may come again
            machine.register("second")
            check(machine, "second")
            machine.unregister("second")
            off(machine)
        assert machine.status()["coordinator"]["restarts"] == 0


@pytest.mark.parametrize("accel", ANY)
@pytest.mark.parametrize("mode", ["ring", "auto"])
def test_after_the_last_it_ends_by_itself(accel: str, mode: str) -> None:
    with Machine.launch(busy(accel, mode)) as machine:
        machine.register("first")
        check(machine, "first")
        machine.unregister("first")
        until(lambda: not logging(machine), "logging is off")
        counted = harvested(machine)
        writes(machine)
        machine.pause()
        machine.register("second")
        assert harvested(machine) == counted
        machine.resume()
        check(machine, "second")


@pytest.mark.parametrize("accel", ANY)
def test_the_coordinator_sleeps_while_nobody_asks(accel: str) -> None:
    often = ReaperSpec(mode="fixed", interval=0.001)
    with Machine.launch(busy(accel, reaper=often)) as machine:
        def turns() -> int:
            return int(machine.status()["coordinator"]["turns"])

        memory = machine.ram(0)

        def slept() -> bool:
            before, there = turns(), memory.copy()
            until(lambda: len(changed_pages(there, memory)) > 100, "the guest writes")      # which asks for nothing
            return turns() == before + 1

        until(slept, "the coordinator only answers")
        machine.register("first")
        until(lambda: not slept(), "it reaps")
        machine.unregister("first")
        off(machine)
        until(slept, "the coordinator only answers")


# --- who needs it -------------------------------------------------------------------------------------------------


def limited(machine: Machine) -> Callable[[], None]:
    machine.dirty_limit(100_000)
    return lambda: machine.dirty_limit(0)


def limited_for_one(machine: Machine) -> Callable[[], None]:
    machine.dirty_limit(100_000, 1)
    return lambda: machine.dirty_limit(0, 1)


def recorded(machine: Machine) -> Callable[[], None]:
    machine.record_start()
    counted = harvested(machine)
    until(lambda: machine.record_step() and harvested(machine) > counted, "something is recorded")
    return machine.record_stop


def registered(machine: Machine) -> Callable[[], None]:
    machine.register("mine", mine=True)
    return lambda: machine.unregister("mine")


@pytest.mark.parametrize("accel", ANY)
@pytest.mark.parametrize("needing", [limited, limited_for_one, recorded, registered])
def test_whoever_needs_a_log_has_one(accel: str, needing: Callable[[Machine], Callable[[], None]]) -> None:
    with Machine.launch(busy(accel)) as machine:
        assert not logging(machine)
        end = needing(machine)
        assert logging(machine)
        machine.set_tracking("ring")
        assert logging(machine)
        counted = harvested(machine)
        machine.register("other")
        until(lambda: machine.sync("other").pages > 0 and harvested(machine) > counted, "pages are harvested")
        machine.unregister("other")
        end()
        off(machine)


@pytest.mark.parametrize("accel", ANY)
@pytest.mark.parametrize("wanted", [{"verify": exact(0.05)}, {"log": "always"}, {"dirty_quota": 100_000},
                                    {"trace": ["kvm_dirty_ring_reap"], "trace_file": "/dev/null"}],
                         ids=lambda wanted: next(iter(wanted)))
def test_a_machine_that_is_to_have_a_log_has_it_from_the_start(accel: str, wanted: dict[str, Any]) -> None:
    with Machine.launch(busy(accel, **wanted), start=False) as machine:
        assert logging(machine)
        machine.start()
        until(lambda: harvested(machine) > 0, "pages are harvested")
        machine.set_tracking("ring")
        writes(machine)
        assert logging(machine)


@pytest.mark.parametrize("accel", ANY)
def test_the_log_ends_with_the_limit_that_the_machine_had_from_the_start(accel: str) -> None:
    with Machine.launch(busy(accel, dirty_quota=100_000)) as machine:
        machine.dirty_limit(0)
        off(machine)
        machine.register("first")
        check(machine, "first")


def test_a_client_of_a_machine_that_has_not_begun_has_all_of_it(accel: str) -> None:
    with Machine.launch(busy(accel), start=False) as machine:
        assert not logging(machine)
        machine.register("first")
        assert logging(machine)
        before = machine.ram(0).copy()
        machine.start()
        writes(machine)
        machine.pause()
        assert set() < changed_pages(before, machine.ram(0)) <= told(machine, "first")


# --- memory slots, modes, what fails ---------------------------------------------------------------------------


def test_slots_are_logged_as_they_say_once_somebody_asks(accel: str) -> None:
    """Those that come while nothing is logged, and those that are not to be; switched meanwhile, too."""
    slots = [RamSlot(0, 0, 4 << 20), RamSlot(5, 0x8000_0000, 2 << 20, log=False)]
    with Machine.launch(busy(accel, slots=slots)) as machine:
        machine.memory_add(2, PLUGGED, 64 << 10)
        machine.log_stop(2)
        machine.log_start(2)
        assert [(s["id"], s["logged"]) for s in machine.status()["slots"]] == [(0, True), (5, False), (2, True)]
        assert not logging(machine)
        machine.register("first")
        assert machine.sync("first").unlogged == {5}
        assert told(machine, "first", 5) == set()
        machine.write(PLUGGED + 4096, b"x")
        assert told(machine, "first", 2) == {1}
        machine.log_start(5)
        assert told(machine, "first", 5) == set(range(512))     # nobody knows
        check(machine, "first")
        memory, before = machine.ram(5), machine.ram(5).copy()
        until(lambda: not np.array_equal(memory, before), "the guest writes there")
        machine.pause()
        assert set() < changed_pages(before, memory)
        machine.sync("first")
        machine.resume()
        machine.unregister("first")
        off(machine)
        machine.memory_remove(2)
        machine.register("second")
        check(machine, "second")


def test_from_mode_to_mode_with_and_without_somebody(accel: str) -> None:
    with Machine.launch(busy(accel)) as machine:
        for mode in [*LOGGING, "none", *reversed(MODES)]:
            machine.set_tracking(mode)
            until(lambda: not logging(machine), "logging is off")
            if mode == "none":
                with pytest.raises(VmmError, match="has no dirty log"):
                    machine.register("first")
                continue
            machine.register("first")
            check(machine, "first")
            for other in LOGGING:
                machine.set_tracking(other)
                assert logging(machine)
                check(machine, "first")
            machine.unregister("first")


def test_a_log_that_cannot_be_switched_on_leaves_all_as_it_was(accel: str, steps: Path) -> None:
    with Machine.launch(busy(accel)) as machine:
        (steps / "fail-journal-write").write_text("28")
        with pytest.raises(VmmError, match="journal cannot be written"):
            machine.register("first")
        status = machine.status()
        assert (status["logging"], status["clients"]) == (False, [])
        writes(machine)
        machine.register("first")
        check(machine, "first")


@pytest.mark.parametrize("accel", ANY)
def test_a_log_that_cannot_be_switched_off_stays(accel: str, steps: Path) -> None:
    with Machine.launch(busy(accel)) as machine:
        machine.register("first")
        machine.unregister("first")
        (steps / "fail-journal-write").write_text("28")
        until(lambda: not list(steps.iterdir()), "it was to be switched off")
        assert logging(machine)
        machine.register("second")
        check(machine, "second")


@pytest.mark.parametrize("accel", ANY)
def test_a_successor_has_it_as_it_was(accel: str) -> None:
    with Machine.launch(busy(accel)) as machine:
        for needed in (False, True):
            if needed:
                machine.register("first")
            before = machine.status()["coordinator"]
            os.kill(before["pid"], signal.SIGKILL)
            until(lambda n=before["restarts"]: machine.status()["coordinator"]["restarts"] > n, "another one")
            assert logging(machine) == needed
            writes(machine)
        check(machine, "first")
        machine.unregister("first")
        off(machine)


@pytest.mark.postcopy
def test_while_pages_are_missing_there_is_a_log(accel: str, tmp_path: Path) -> None:
    """Not every vCPU could be stopped then, to switch it on."""
    listener = FdListener(tmp_path / "userfault")
    try:
        with Machine.launch(busy(accel), start=False) as machine:
            assert not logging(machine)
            machine.incoming(str(listener.path))
            assert logging(machine)
            machine.incoming(str(listener.path))
            machine.arrived()
            machine.start()
            until(lambda: not logging(machine), "logging is off")
            machine.register("first")
            check(machine, "first")
    finally:
        listener.close()
