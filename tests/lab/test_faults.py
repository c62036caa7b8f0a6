"""The campaign of faults: its plans, its oracle, how a failure is shortened, and a short run of it all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from command import vmm
from machines import ANY, spec

from ipc.shm import PAGE_SIZE
from vmm.client.machine import Machine
from vmm.errors import VmmError
from vmm.lab.faults.oracle import Lost, Oracle
from vmm.lab.faults.plan import HOT_SLOT, KILLS, Episode, Event, draw_episode, possible
from vmm.lab.faults.run import Outcome
from vmm.lab.faults.shrink import shrink
from vmm.machine.spec import RamSlot

CAN = {"kvm": ("ring", "bitmap", "uffd", "auto"), "unicorn": ("ring", "bitmap")}
DATA = 2 << 20      # offset in slot 0, behind the image


# --- plans -------------------------------------------------------------------------------------------------------


def test_a_seed_plans_the_same_campaign() -> None:
    first = [draw_episode(7, i, CAN) for i in range(20)]
    assert first == [draw_episode(7, i, CAN) for i in range(20)]
    assert first != [draw_episode(8, i, CAN) for i in range(20)]
    assert msgspec.json.decode(msgspec.json.encode(first), type=list[Episode]) == first


def test_every_plan_can_be_carried_out() -> None:
    """Nothing is plugged twice or logged that is not there; somebody is left to run; no more coordinators die than a
    machine bears."""
    done: Counter[str] = Counter()
    for number in range(500):
        episode = draw_episode(1, number, CAN)
        hot, paused, unlogged, dead, kills = False, False, set(), set(), 0
        for event in episode.events:
            match event.do:
                case "plug" | "unplug":
                    assert hot == (event.do == "unplug")
                    hot = not hot
                    unlogged.discard(HOT_SLOT)
                case "log-stop" | "log-start":
                    assert (event.arguments[0] in unlogged) == (event.do == "log-start")
                    assert event.arguments[0] != HOT_SLOT or hot
                    unlogged ^= {event.arguments[0]}
                case "pause" | "resume":
                    assert paused == (event.do == "resume")
                    paused = not paused
                case "snapshot":
                    assert not unlogged
                    assert not dead
                case "migrate":
                    assert not dead
                case "tracking":
                    assert event.arguments[0] in CAN[episode.accel]
            done[event.do] += 1
            if event.fault is not None and event.fault.stop_ms == 0:
                assert event.fault.victim != "keeper"
                kills += event.fault.victim == "coordinator"
                dead |= {event.fault.victim} - {"coordinator"}
        assert kills <= KILLS
        assert len(dead) < episode.vcpus
    assert set(done) == {"start", "check", "look", "run", "write", "plug", "unplug", "log-stop", "log-start",
                         "tracking", "snapshot", "client", "pause", "resume", "migrate", "stop"}


def test_what_a_host_cannot_do_is_said() -> None:
    with pytest.raises(VmmError, match="unknown accelerator 'dream'"):
        possible(["dream"])


# --- the oracle --------------------------------------------------------------------------------------------------


@pytest.fixture(params=ANY)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Nobody but the test writes to slot 1, and to slot 0 behind the image."""
    slots = [RamSlot(0, 0, 4 << 20), RamSlot(1, 1 << 32, 64 * PAGE_SIZE)]
    idle = spec("idle", accel=str(request.param), vcpus=1, slots=slots, milliseconds=0, timeout=None)
    with Machine.launch(idle) as launched:
        yield launched


@pytest.mark.parametrize("how", ["look", "check"])
def test_a_page_that_no_sync_has_is_found(machine: Machine, how: str) -> None:
    oracle = Oracle("t", "faults")
    try:
        getattr(oracle, how)()
        machine.write(1 << 32, b"marked")
        getattr(oracle, how)()
        machine.ram(1, writable=True)[5 * PAGE_SIZE + 7] = 1       # marked nowhere
        with pytest.raises(Lost, match=r"client faults: 1 pages of slot 1 changed and are in no sync \(.*\): 0x5"):
            getattr(oracle, how)()
    finally:
        oracle.close()


def test_a_page_that_was_in_the_sync_before_is_no_loss_while_the_guest_runs(machine: Machine) -> None:
    """It was written between the reading and the sync of one look, and is seen changed in the next."""
    oracle = Oracle("t", "faults")
    try:
        sync = oracle._machine.sync

        def written_in_between(client: str) -> object:
            machine.write((1 << 32) + 3 * PAGE_SIZE, b"late")
            return sync(client)

        oracle._machine.sync = written_in_between       # type: ignore[method-assign, assignment]
        oracle.look()
        oracle._machine.sync = sync                     # type: ignore[method-assign]
        oracle.look()
    finally:
        oracle.close()


def test_slots_that_come_and_go_are_followed(machine: Machine) -> None:
    oracle = Oracle("t", "faults")
    try:
        machine.memory_add(5, 1 << 33, 16 * PAGE_SIZE)
        machine.write(1 << 33, b"there")
        oracle.check()
        machine.write((1 << 33) + PAGE_SIZE, b"and gone")
        machine.memory_remove(5)
        oracle.check()
        machine.memory_add(5, 1 << 33, 16 * PAGE_SIZE)
        oracle.look()
        view = machine.ram(5, writable=True)
        view[9 * PAGE_SIZE] = 1                         # marked nowhere
        machine.memory_remove(5)
        with pytest.raises(Lost, match="the slot was removed"):
            oracle.check()
    finally:
        oracle.close()


def test_what_is_written_without_logging_must_be_told_once_there_is(machine: Machine) -> None:
    oracle = Oracle("t", "faults")
    try:
        machine.log_stop(1)
        machine.ram(1, writable=True)[2 * PAGE_SIZE] = 1
        oracle.look()
        machine.log_start(1)        # all of it is dirty now
        oracle.look()
        oracle.check()
    finally:
        oracle.close()


# --- shortening --------------------------------------------------------------------------------------------------


def test_a_failure_is_shortened_to_what_it_takes() -> None:
    """A machine that fails when "write 7" comes somewhere after "plug"."""
    episode = Episode(1, 0, "kvm", "ring", 1, 1024, 4, False, tuple(
        Event(do) if do != "write" else Event("write", (7,)) for do in
        ("start", "look", "plug", "run", "run", "look", "write", "check", "run", "stop")))

    def run(tried: Episode) -> Outcome:
        names = [event.do for event in tried.events]
        fails = "plug" in names and "write" in names[names.index("plug"):]
        return Outcome(problem=f"client a: {len(names)} pages were lost" if fails else "", at=names.index("write")
                       if fails else -1)

    shortest = shrink(episode, run(episode), run, 60.0)
    assert [event.do for event in shortest.events] == ["plug", "write"]


def test_another_problem_is_not_taken_for_it() -> None:
    episode = Episode(1, 0, "kvm", "ring", 1, 1024, 4, False, (Event("start"), Event("look"), Event("stop")))

    def run(tried: Episode) -> Outcome:
        whole = len(tried.events) == 3
        return Outcome(problem="3 pages lost" if whole else "it was not started", at=2)

    assert shrink(episode, run(episode), run, 60.0) == episode


# --- all of it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accel", ANY)
def test_a_short_campaign_loses_nothing(accel: str) -> None:
    done = vmm("stress", "--faults", "12", "--seed", "3", "--accel", accel, "--json", timeout=240.0)
    assert done.returncode == 0, done.stdout + done.stderr
    campaign = json.loads(done.stdout)
    assert campaign["failure"] is None
    assert campaign["faults"] >= 12
    assert sum(campaign["hits"].values()) == campaign["faults"]
    assert campaign["compared_pages"] > campaign["dirty_pages"] > 0


@pytest.mark.parametrize(("arguments", "error"), [
    (("--faults", "3", "--vcpus", "2"), "--faults: cannot be used with --vcpus"),
    (("--faults", "3", "--resume"), "--faults: cannot be used with --resume"),
    (("--seed", "3", "--output", "x"), "--seed: only valid with --faults"),
    (("--vcpus", "2"), "--output: give a directory for the results")])
def test_options_that_do_not_go_together_are_one_line(arguments: tuple[str, ...], error: str) -> None:
    done = vmm("stress", *arguments)
    assert (done.returncode, done.stderr.splitlines()) == (2, [f"vmm: error: {error}"])
