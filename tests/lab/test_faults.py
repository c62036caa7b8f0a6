"""The campaign of faults: its plans, its oracle, how a failure is shortened, and a short run of it all."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from command import vmm
from machines import ANY, nothing_left, spec, until

from ipc.shm import PAGE_SIZE
from vmm.client.machine import Machine
from vmm.errors import VmmError
from vmm.lab.faults import run as run_module
from vmm.lab.faults.campaign import Campaign, Failure
from vmm.lab.faults.delay import Relay
from vmm.lab.faults.hit import Hit
from vmm.lab.faults.move import Move, end, move
from vmm.lab.faults.oracle import Lost, Oracle
from vmm.lab.faults.plan import HOT_SLOT, KILLS, Episode, Event, Fault, draw_episode, possible
from vmm.lab.faults.run import Outcome, run_episode
from vmm.lab.faults.shrink import shrink
from vmm.lab.faults.upgraded import upgrade
from vmm.machine.spec import RamSlot

CAN = {"kvm": ("ring", "bitmap", "uffd", "auto"), "unicorn": ("ring", "bitmap")}
DATA = 2 << 20      # offset in slot 0, behind the image


# --- plans -------------------------------------------------------------------------------------------------------


def test_a_seed_plans_the_same_campaign() -> None:
    first = [draw_episode(7, i, CAN, postcopy=True) for i in range(20)]
    assert first == [draw_episode(7, i, CAN, postcopy=True) for i in range(20)]
    assert first != [draw_episode(8, i, CAN, postcopy=True) for i in range(20)]
    assert msgspec.json.decode(msgspec.json.encode(first), type=list[Episode]) == first


def test_every_plan_can_be_carried_out() -> None:
    """Nothing is plugged twice or logged that is not there; somebody is left to run; no more coordinators die than a
    machine bears; what needs rings is done where there are some for certain."""
    done: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for number in range(1000):
        episode = draw_episode(1, number, CAN, postcopy=True)
        hot, paused, limited, unlogged, dead, kills = False, False, False, set(), 0, 0
        mode, accels = episode.tracking, {episode.accel}
        for event in episode.events:
            fault = event.fault
            uncertain = fault is not None and fault.kills and "vcpu" in fault.victim
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
                    how, accel = event.arguments
                    assert how in ("precopy", "postcopy", "in-place")
                    assert not dead
                    accels.add(str(accel))      # it may have stayed
                    assert not mode or all(mode in CAN[each] for each in accels)
                case "upgrade":
                    assert not dead
                    assert not uncertain
                case "tracking":
                    mode = "" if uncertain else str(event.arguments[0])
                    assert all(event.arguments[0] in CAN[each] for each in accels)
                    assert event.arguments[0] in ("ring", "auto") or not limited
                case "limit":
                    assert mode in ("ring", "auto") or limited
                    assert limited == (event.arguments[0] == 0)
                    limited = bool(event.arguments[0]) or uncertain
                case "record":
                    assert mode in ("ring", "auto")
            done[event.kind] += 1
            if fault is not None:
                assert event.do in ("migrate", "upgrade") or fault.victim in ("coordinator", "keeper", "vcpu0", "vcpu1",
                                                                             "vcpu2")
                assert not (fault.kills and fault.victim == "keeper")
                faults[fault.kind] += 1
                kills += fault.kills and fault.victim.endswith("coordinator")
                dead += uncertain
        assert kills <= KILLS
        assert dead < episode.vcpus
    assert set(done) == {"start", "check", "look", "run", "write", "plug", "unplug", "log-stop", "log-start",
                         "tracking", "snapshot", "client", "nobody", "pause", "resume", "migrate precopy",
                         "migrate postcopy", "migrate in-place", "upgrade", "limit", "record", "stop"}
    either = {"coordinator", "vcpu", "source", "target", "target-coordinator", "target-keeper", "target-vcpu"}
    assert set(faults) == {"delay messages", "stop keeper",
                           *(f"{what} {whom}" for what in ("kill", "stop") for whom in either)}


def test_a_host_without_userfaultfd_is_asked_for_no_post_copy() -> None:
    kinds = {event.kind for i in range(200) for event in draw_episode(1, i, CAN, postcopy=False).events}
    assert "migrate precopy" in kinds
    assert "migrate postcopy" not in kinds


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


# --- what is done, and to whom -----------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def _state(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_who_is_stopped_continues(sleeper: subprocess.Popen[bytes]) -> None:
    with Hit(Fault("target", 200, 0.0), lambda: sleeper.pid, late=True) as hit:
        until(lambda: _state(sleeper) == "T", "it is stopped")
    assert hit.done
    until(lambda: _state(sleeper) != "T", "it continues")


def test_who_comes_late_is_hit_then(sleeper: subprocess.Popen[bytes]) -> None:
    came = threading.Event()
    with Hit(Fault("target", 0, 1.0), lambda: sleeper.pid if came.is_set() else None, late=False) as hit:
        assert sleeper.poll() is None
        came.set()
        assert sleeper.wait(20) == -signal.SIGKILL
    assert hit.done


@pytest.mark.parametrize("there", [False, True])
def test_who_is_not_hit_in_time_is_not_counted(there: bool, sleeper: subprocess.Popen[bytes]) -> None:
    with Hit(Fault("target", 0, 60_000.0), lambda: sleeper.pid if there else None, late=False) as hit:
        pass
    assert not hit.done
    assert sleeper.poll() is None


def test_late_messages_arrive_in_their_order_and_to_the_last(tmp_path: Path) -> None:
    """Though the other end has closed by then."""
    path, heard = tmp_path / "there", bytearray()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with Relay(path, 20) as relay:
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(relay.address.removeprefix("ipc://"))
                other, _ = listener.accept()
                for word in range(100):
                    one.sendall(bytes([word]) * 100)
            with other:
                other.settimeout(20.0)
                while piece := other.recv(1 << 16):
                    heard += piece
            assert relay.held
    assert bytes(heard) == b"".join(bytes([word]) * 100 for word in range(100))
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


MOVES = ["precopy", "in-place", pytest.param("postcopy", marks=pytest.mark.postcopy)]


def _episode(accel: str, *events: Event, verify: bool = True) -> Episode:
    return Episode(1, 0, accel, "ring", 2, 1024, 4, verify, (Event("start"), *events, Event("check"), Event("stop")))


@pytest.mark.parametrize("accel", ANY)
@pytest.mark.parametrize("how", MOVES)
def test_limits_and_recordings_go_on_after_a_migration(accel: str, how: str) -> None:
    outcome = run_episode(_episode(accel, Event("limit", (2000,)), Event("record"), Event("migrate", (how, accel)),
                                   Event("record"), Event("limit", (0,)), verify=how != "in-place"))
    assert (outcome.problem, outcome.done[f"migrate {how}"]) == ("", 1)
    assert outcome.compared_pages > outcome.dirty_pages > 0


@pytest.mark.parametrize("accel", ANY)
@pytest.mark.parametrize("how", ["precopy", "in-place"])
@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_killed_end_of_a_migration_leaves_the_machine_on_one_side(accel: str, how: str, victim: str) -> None:
    """As soon as the target has begun to make the machine."""
    outcome = run_episode(_episode(accel, Event("migrate", (how, accel), Fault(victim, 0, 0.0)),
                                   verify=how != "in-place"))
    assert (outcome.problem, outcome.hits) == ("", {f"kill {victim}": 1})


@pytest.mark.parametrize("accel", ANY)
@pytest.mark.parametrize(("victim", "after_ms"), [("source", 0.0), ("source", 150.0), ("coordinator", 0.0),
                                                  ("target-coordinator", 0.0)])
def test_an_upgrade_loses_nothing_whoever_is_killed(accel: str, victim: str, after_ms: float) -> None:
    """Clients, limits, host writes and the verifier go on, and another upgrade after it."""
    outcome = run_episode(_episode(
        accel, Event("limit", (2000,)), Event("check"), Event("write", (1, 7)),
        Event("upgrade", (), Fault(victim, 0, after_ms)), Event("look"), Event("write", (1, 9)), Event("check"),
        Event("upgrade"), Event("limit", (0,))))
    assert (outcome.problem, outcome.done["upgrade"]) == ("", 2)
    assert after_ms or outcome.hits == {f"kill {victim}": 1}


def test_an_upgrade_that_fails_for_no_reason_is_a_finding(machine: Machine, tmp_path: Path) -> None:
    """Somebody takes a snapshot meanwhile."""
    refused = pytest.raises(VmmError, match=r"upgrade has ended with 2: .*snapshot")
    with machine.lease("snapshot", "of a test"), refused:
        upgrade(machine, tmp_path, None)


def test_a_migration_that_fails_for_no_reason_is_a_finding(machine: Machine, tmp_path: Path) -> None:
    """There is no such accelerator to receive it on."""
    with pytest.raises(VmmError, match="Invalid value for '--accel'"):
        move(machine, Move("t-1", "dream", "precopy", tmp_path), None)


def test_a_machine_of_nobody_is_ended(machine: Machine, tmp_path: Path) -> None:
    machine.pause()
    moved, hit = move(machine, Move("t-1", machine.status()["accelerator"], "precopy", tmp_path), None)
    assert (moved, hit) == (True, False)
    end("t-1")
    until(lambda: nothing_left("t-1"), "its last process has gone")
    end("t-1")


def test_an_older_page_is_told_from_one_that_the_guest_wrote_since() -> None:
    then = np.zeros((3, PAGE_SIZE), np.uint8)
    then[:, 0] = 5
    now = then.copy()
    now[0, :6] = (7, 0, 0, 0, 1, 9)     # a higher number of another round
    run_module._not_older({0: now.reshape(-1)}, {0: then.reshape(-1)}, "migration")
    now[1, 0] = 4
    now[2, 4000] = 1
    with pytest.raises(VmmError, match=r"migration: 2 pages of slot 0 are older .*: 0x1, 0x2"):
        run_module._not_older({0: now.reshape(-1)}, {0: then.reshape(-1)}, "migration")


@pytest.mark.parametrize("accel", ANY)
def test_a_page_that_is_in_no_record_is_found(accel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One below the guest's own memory, which no guest writes however fast its host is."""
    real = run_module._Run._memory

    def scribbled(machine: Machine) -> dict[int, np.ndarray]:
        found = real(machine)
        found[0][3 * PAGE_SIZE:][:8] = np.frombuffer(time.monotonic_ns().to_bytes(8, "little"), np.uint8)
        return found

    monkeypatch.setattr(run_module._Run, "_memory", staticmethod(scribbled))
    outcome = run_episode(_episode(accel, Event("record")))
    assert outcome.problem == ("recording: 1 pages of slot 0 changed and are in no record of a complete trace: 0x3")


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
    assert campaign["done"]["check"] >= 2
    assert campaign["compared_pages"] > campaign["dirty_pages"] > 0


def test_what_failed_is_replayed(tmp_path: Path) -> None:
    """From the file that the campaign has left."""
    accel = next(iter(possible()))
    shortest = Episode(5, 2, accel, "ring", 1, 1024, 2, False, (Event("start"), Event("unplug")))
    found = Campaign(5, failure=Failure(shortest, "was lost", shortest))
    (tmp_path / "faults.json").write_bytes(msgspec.json.encode(found))
    done = vmm("stress", "--faults", "1", "--replay", str(tmp_path / "faults.json"), timeout=240.0)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed 5, episode 2" in done.stdout
    assert "FAILED: there is no memory slot 5" in done.stdout


@pytest.mark.parametrize(("content", "error"), [
    (b"{}", "is not the result of vmm stress --faults"),
    (msgspec.json.encode(Campaign(5)), "nothing failed in that campaign")])
def test_what_cannot_be_replayed_is_said(content: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_bytes(content)
    done = vmm("stress", "--faults", "1", "--replay", str(tmp_path / "faults.json"))
    assert done.returncode == 2
    assert error in done.stderr


@pytest.mark.parametrize(("arguments", "error"), [
    (("--faults", "3", "--vcpus", "2"), "--faults: cannot be used with --vcpus"),
    (("--faults", "3", "--resume"), "--faults: cannot be used with --resume"),
    (("--seed", "3", "--output", "x"), "--seed: only valid with --faults"),
    (("--replay", "f", "--output", "x"), "--replay: only valid with --faults"),
    (("--faults", "3", "--seed", "3", "--replay", "f"), "--replay: has a seed of its own"),
    (("--vcpus", "2"), "--output: give a directory for the results")])
def test_options_that_do_not_go_together_are_one_line(arguments: tuple[str, ...], error: str) -> None:
    done = vmm("stress", *arguments)
    assert (done.returncode, done.stderr.splitlines()) == (2, [f"vmm: error: {error}"])
