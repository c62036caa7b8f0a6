"""What a client has, and what it is told, over the end of a coordinator, of a slot, of another client. (The kill at
every step is in test_walk.py.)"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import ACCELS, alive, changed_pages, replace, spec, until
from needs import missing
from shared import control_blocks

from ipc.shm import list_segments
from vmm.client.machine import Machine
from vmm.consumers.missing import MissingPages
from vmm.consumers.trace import record
from vmm.errors import VmmError
from vmm.machine import verbs
from vmm.machine.names import segment_name
from vmm.machine.spec import MachineSpec, RamSlot

TIMEOUT = 60.0
ANY = "unicorn" if missing("kvm") else "kvm"
PLUGGED = 0x4000_0000


def busy(accel: str, **more: Any) -> MachineSpec:
    return spec("stamp", accel=accel, writes=0, spin=100, timeout=None, slots=[RamSlot(0, 0, 8 << 20)], **more)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine.launch(busy(ANY)) as launched:
        yield launched


def restarts(machine: Machine) -> int:
    with Machine.attach(machine.name) as other:
        return int(other.status()["coordinator"]["restarts"])


def kill_coordinator(machine: Machine) -> None:
    """Nothing is asked of the machine by this connection meanwhile."""
    with Machine.attach(machine.name) as other:
        before = other.status()["coordinator"]
        os.kill(before["pid"], signal.SIGKILL)
        until(lambda: other.status()["coordinator"]["restarts"] > before["restarts"], "another coordinator")


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {p for first, count in ranges for p in range(first, first + count)}


# --- a coordinator that died while nobody asked --------------------------------------------------------------


def test_a_loss_before_a_request_is_none_of_that_request(machine: Machine) -> None:
    """Each is carried out once, and says that it was, whatever happened to an idle connection before."""
    for act in (lambda: machine.memory_add(2, PLUGGED, 64 << 10), lambda: machine.memory_remove(2),
                lambda: machine.register("a")):
        kill_coordinator(machine)
        act()
    assert [s["id"] for s in machine.status()["slots"]] == [0]
    assert machine.status()["clients"] == ["a"]
    machine.memory_add(2, PLUGGED, 64 << 10)
    with pytest.raises(VmmError, match="already exists"):     # it is another request
        machine.memory_add(2, PLUGGED, 64 << 10)
    with pytest.raises(VmmError, match="there is no memory slot 3"):
        machine.memory_remove(3)


def test_a_request_that_is_asked_again_is_carried_out_once(machine: Machine) -> None:
    """As it is when the answer was lost, to the same coordinator and to the next."""
    def ask(verb: type[verbs.Verb], **arguments: Any) -> None:
        machine._client._ask(verb, arguments, f"{verb.__name__} once", 30.0)

    for _ in range(2):
        ask(verbs.MemoryAdd, slot=2, gpa=PLUGGED, size=64 << 10, log=True)
    machine.write(PLUGGED, b"kept")
    kill_coordinator(machine)
    ask(verbs.MemoryAdd, slot=2, gpa=PLUGGED, size=64 << 10, log=True)
    assert machine.read(PLUGGED, 4) == b"kept"
    for _ in range(2):
        ask(verbs.MemoryRemove, slot=2)
    machine.memory_add(2, PLUGGED, 64 << 10)
    ask(verbs.MemoryRemove, slot=2)
    assert [s["id"] for s in machine.status()["slots"]] == [0, 2]


def test_the_last_pages_of_a_removed_slot_outlive_the_coordinator(machine: Machine) -> None:
    machine.memory_add(2, PLUGGED, 64 << 10)
    machine.register("a")
    machine.register("b")
    machine.sync("a")
    machine.write(PLUGGED + 5 * 4096, b"x")
    machine.memory_remove(2)
    kill_coordinator(machine)
    told = machine.sync("a")
    assert (told.slots[2], told.retired) == ([(5, 1)], {2})
    kill_coordinator(machine)
    assert 2 not in machine.sync("a").slots
    assert machine.sync("b").slots[2] == [(5, 1)]
    machine.memory_add(2, PLUGGED, 64 << 10)    # its number is free
    assert machine.sync("a").slots[2] == [(0, 16)]


def test_a_machine_is_as_old_as_it_is(machine: Machine) -> None:
    until(lambda: machine.status()["elapsed_s"] > 1.0, "a second")
    before = machine.status()["elapsed_s"]
    kill_coordinator(machine)
    assert machine.status()["elapsed_s"] > before


def test_a_machine_that_has_ended_stays_so() -> None:
    with Machine.launch(spec("hello", accel=ANY, vcpus=1)) as machine:
        report = machine.wait(TIMEOUT)
        kill_coordinator(machine)
        again = machine.wait(TIMEOUT)
        assert (again["exit_code"], again["elapsed_s"]) == (report["exit_code"], report["elapsed_s"])


def test_no_stranger_is_taken_for_a_worker(machine: Machine) -> None:
    """What a control block says is the worker's word: not for whom a successor watches and signals."""
    workers = [v["pid"] for v in machine.status()["vcpus"]]
    with subprocess.Popen([sys.executable, "-c", "import time\ntime.sleep(1000)"]) as stranger:
        try:
            for pid in (stranger.pid, 0, os.getpid()):
                with control_blocks(machine.name) as blocks:
                    blocks[1].pid = pid
                    del blocks
                kill_coordinator(machine)
                assert [v["pid"] for v in machine.status()["vcpus"]] == workers
                machine.pause()     # kicks
                machine.resume()
            assert stranger.poll() is None
            assert all(alive(pid) for pid in workers)
            machine.stop()
            assert {v["exit_reason"] for v in machine.wait(TIMEOUT)["vcpus"]} == {"stopped"}
        finally:
            stranger.kill()


# --- an answer that did not come -----------------------------------------------------------------------------


def test_a_sync_that_was_not_answered_loses_nothing(machine: Machine) -> None:
    """It took too long, and whoever asked went on; the coordinator took the pages all the same."""
    machine.pause()
    machine.register("a")
    machine.write(0x50_0000, b"x")
    coordinator = machine.status()["coordinator"]["pid"]
    os.kill(coordinator, signal.SIGSTOP)
    try:
        with pytest.raises(VmmError, match="did not answer"):
            machine._client.ask(verbs.Sync, timeout=0.2, client="a")
    finally:
        os.kill(coordinator, signal.SIGCONT)
    machine.status()        # behind it
    assert machine.sync("a").slots[0] == [(0x500, 1)]
    assert machine.sync("a").slots[0] == []


# --- slots that come again -------------------------------------------------------------------------------------


def test_a_slot_that_another_client_replaces_is_another_slot(machine: Machine) -> None:
    machine.memory_add(2, PLUGGED, 64 << 10)
    machine.register("c")
    machine.write(PLUGGED, b"old")
    machine.sync("c")
    view = machine.ram(2)
    bitmap = machine.bitmap(2, "c")
    with Machine.attach(machine.name) as other:
        other.memory_remove(2)
        other.memory_add(2, PLUGGED, 64 << 10)
        assert other.read(PLUGGED, 3) == b"\0\0\0"
        with pytest.raises(VmmError, match="another slot was added"):
            machine.mark_dirty(2, 0, 1)                     # of the view that is still held
        with pytest.raises(VmmError, match="another slot was added"), machine.writing(2, 0, 1):
            pytest.fail("this memory is nobody's")
        other.write(PLUGGED, b"new")
        assert machine.read(PLUGGED, 3) == b"new"
        machine.write(PLUGGED + 4096, b"seen")
        assert other.read(PLUGGED + 4096, 4) == b"seen"
        told = machine.sync("c")
        assert told.slots[2] == [(0, 16)]
        assert told.pages == sum(count for ranges in told.slots.values() for _, count in ranges)
        assert machine.bitmap(2, "c").count() == 16
        assert bytes(machine.ram(2)[:3]) == b"new"
    assert bytes(view[:3]) == b"old"            # a view that is held is of what it was of
    assert bitmap.pages == 16


def test_a_client_that_is_registered_anew_is_another_client(machine: Machine) -> None:
    machine.pause()
    machine.register("c")
    machine.write(0x50_0000, b"x")
    assert machine.sync("c").slots[0] == [(0x500, 1)]
    with Machine.attach(machine.name) as other:
        other.unregister("c")
        other.register("c")
        other.write(0x60_0000, b"x")
        assert machine.sync("c").slots[0] == [(0x600, 1)]


def test_a_slot_that_one_worker_cannot_have_is_in_none(accel: str) -> None:
    """Its address space is full: a real limit, of the one process."""
    with Machine.launch(busy(accel)) as machine:
        machine.register("a")
        workers = [v["pid"] for v in machine.status()["vcpus"]]

        def mapped(pid: int) -> bool:
            return ".ram2." in Path(f"/proc/{pid}/maps").read_text()

        size = 64 << 20
        virtual = int(Path(f"/proc/{workers[1]}/statm").read_text().split()[0]) * 4096
        resource.prlimit(workers[1], resource.RLIMIT_AS, (virtual + size // 2, resource.RLIM_INFINITY))
        for _ in range(2):
            with pytest.raises(VmmError, match="vcpu 1"):
                machine.memory_add(2, PLUGGED, size)
            assert [s["id"] for s in machine.status()["slots"]] == [0]
            assert not any(mapped(pid) for pid in workers)
            assert list_segments(segment_name(machine.name, "ram2")[1:]) == []
            machine.sync("a")
        resource.prlimit(workers[1], resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        machine.memory_add(2, PLUGGED, size)
        assert all(mapped(pid) for pid in workers)
        machine.sync("a")
        machine.stop()
        assert {v["exit_reason"] for v in machine.wait(TIMEOUT)["vcpus"]} == {"stopped"}


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_was_written_while_nobody_logged_is_known_to_be_unknown(accel: str) -> None:
    """For clients of before, and of the time in between."""
    with Machine.launch(busy(accel)) as machine:
        machine.register("before")
        machine.sync("before")
        memory = machine.ram(0)
        then = memory.copy()
        machine.log_stop(0)
        machine.register("between")
        seen = memory.copy()
        until(lambda: len(changed_pages(seen, memory)) > 50, "the guest writes")
        machine.log_start(0)
        machine.pause()
        assert changed_pages(then, memory) <= pages(machine.sync("before").slots[0])
        assert changed_pages(seen, memory) <= pages(machine.sync("between").slots[0])


# --- recordings ------------------------------------------------------------------------------------------------


def test_a_recording_has_rings_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    with Machine.launch(replace(busy(ANY), tracking="bitmap")) as machine:
        with pytest.raises(VmmError, match=r"only dirty rings record .* \(run vmm tracking t ring\)"):
            record(machine, path, 0.2, 0.01)
        assert list(tmp_path.iterdir()) == []
        machine.set_tracking("ring")
        refused: list[str] = []

        def switch_away(part: float, entries: int) -> None:
            if not refused:
                with pytest.raises(VmmError, match="is being recorded") as caught:
                    machine.set_tracking("bitmap")
                refused.append(str(caught.value))

        end = record(machine, path, 0.3, 0.01, switch_away)
        assert refused
        assert end.complete
        assert end.entries > 0
        machine.set_tracking("auto")        # nobody wants the log
        assert not machine.status()["logging"]
        ways: set[str] = set()
        end = record(machine, path, 0.3, 0.01, lambda part, entries: ways.add(machine.status()["tracking"]))
        assert (ways, end.reason, end.complete) == ({"ring"}, "", True)
        assert end.entries > 0


# --- post-copy ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(missing("postcopy")), reason=missing("postcopy"))
def test_a_coordinator_that_dies_while_vcpus_wait_for_pages_is_replaced(accel: str) -> None:
    """Whether they can be stopped then (KVM) or not (a software CPU). They go on when the pages come."""
    with Machine.launch(busy(accel), start=False) as machine:
        absent = np.zeros(2048, bool)
        absent[600:2000] = True             # most of what the guest uses
        with MissingPages(machine, {0: absent}) as pages_missing:
            machine.start()
            poll = select.poll()
            for fd in pages_missing.faults:
                poll.register(fd, select.POLLIN)
            assert poll.poll(TIMEOUT * 1000), "no vCPU waits"
            kill_coordinator(machine)
            status = machine.status()
            assert (status["incoming"], status["state"]) == (True, "running")
            for fd in pages_missing.faults:
                pages_missing.wanted(fd)
            pages_missing.put(0, np.flatnonzero(absent), None)
            pages_missing.finish()
        assert machine.status()["incoming"] is False
        memory = machine.ram(0)
        before = memory.copy()
        until(lambda: len(changed_pages(before, memory)) > 50, "the guest goes on")
        machine.register("a")
        machine.stop()
        assert {v["exit_reason"] for v in machine.wait(TIMEOUT)["vcpus"]} == {"stopped"}


# --- owners ----------------------------------------------------------------------------------------------------


def test_a_client_whose_process_ends_with_the_coordinator_is_gone(machine: Machine) -> None:
    script = ("import sys\nfrom vmm import Machine\nwith Machine.attach(sys.argv[1]) as m:\n"
              "    m.register('passing', mine=True)\n    print('there', flush=True)\n    sys.stdin.read()\n")
    with subprocess.Popen([sys.executable, "-c", script, machine.name], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"there\n"
        kill_coordinator(machine)
        assert machine.status()["clients"] == ["passing"]
        coordinator = machine.status()["coordinator"]["pid"]
        os.kill(coordinator, signal.SIGSTOP)    # it is not to see the end of the holder
        holder.kill()
        holder.wait()
        os.kill(coordinator, signal.SIGKILL)    # which a stopped process heeds too
    until(lambda: restarts(machine) == 2, "another coordinator")
    assert machine.status()["clients"] == []
    assert list_segments(segment_name(machine.name, "client")[1:]) == []

