"""Rings that have lost count, and rings whose worker has died: nothing lost, nothing looked at twice, no end to
nothing but the vCPU concerned. The ring of a software CPU can be forged, so all of it is tried everywhere."""

from __future__ import annotations

import os
import resource
import signal
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from machines import ACCELS, changed_pages, exact, machine_processes, replace, spec, until
from shared import control_blocks, forge_full, software_ring

from ipc.layout import VcpuControl, machine_control, vcpu_control
from ipc.shm import Segment
from ipc.steps import STEPS
from vmm.client.machine import Machine
from vmm.dirty.log import DirtyLog
from vmm.dirty.reaper import Reaper
from vmm.dirty.tracking.modes import tracking_mode
from vmm.errors import ExitCode, VmmError
from vmm.machine.events import Tracer
from vmm.machine.memory import MemorySlot
from vmm.machine.names import segment_name
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec
from vmm.vcpus.handle import VcpuHandle
from vmm.vcpus.pool import VcpuPool

TIMEOUT = 60.0
PAGE = 300


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def busy(accel: str, **changes: Any) -> MachineSpec:
    return replace(spec("stamp", accel=accel, ring=1024, writes=0, spin=200, timeout=None), **changes)


def pages_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {p for first, count in ranges for p in range(first, first + count)}


def restarts(machine: Machine) -> int:
    try:
        return int(machine.status()["coordinator"]["restarts"])
    except VmmError:
        return -1


def lose_count(accel: str) -> None:
    """Of vCPU 0 of the machine t, which is paused."""
    if accel == "unicorn":
        forge_full("t", 0, PAGE)
    else:
        with control_blocks("t") as blocks:
            blocks[0].reset_total += 1


# --- invariant 3 ---------------------------------------------------------------------------------------------


def test_a_ring_that_lost_count_is_replaced_and_every_page_marked(accel: str) -> None:
    """The guest goes on, and the verifier finds nothing lost, nor holds the marked pages against anybody."""
    with Machine.launch(busy(accel, verify=exact(0.02))) as machine:
        machine.register("a")
        machine.pause()
        machine.sync("a")
        lose_count(accel)
        synced = machine.sync("a")
        status = machine.status()
        assert synced.pages == status["slots"][0]["pages"]
        assert [v["ring_rebuilds"] for v in status["vcpus"]] == [1, 0]
        before = machine.ram(0).copy()
        assert machine.sync("a").pages == 0
        machine.resume()
        rounds = machine.status()["verification"]["rounds"]
        until(lambda: machine.status()["verification"]["rounds"] > rounds + 3, "rounds", TIMEOUT)
        entries = [v["guest_entries"] for v in machine.status()["vcpus"]]
        until(lambda: all(v["guest_entries"] > n for v, n in zip(machine.status()["vcpus"], entries, strict=True)),
              "both vCPUs run", TIMEOUT)
        machine.pause()
        assert changed_pages(before, machine.ram(0)) <= pages_of(machine.sync("a").slots[0])
        machine.resume()
        machine.stop()
        report = machine.wait(TIMEOUT)
    assert report["verification"]["lost_pages"] == 0, report["verification"]
    assert report["verification"]["surplus_pages"] == 0, report["verification"]
    assert report["exit_code"] == ExitCode.STOPPED


@pytest.mark.parametrize("name", STEPS["ring rebuild"])
def test_a_coordinator_that_dies_while_a_ring_is_replaced_leaves_all_pages_marked(
        accel: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMM_STEPS", str(tmp_path))
    with Machine.launch(busy(accel)) as machine:
        machine.register("a")
        machine.pause()
        machine.sync("a")
        lose_count(accel)
        (tmp_path / f"kill-{name}").touch()
        synced = machine.sync("a")      # asked again of the successor
        status = machine.status()
        assert not list(tmp_path.iterdir())
        assert status["coordinator"]["restarts"] == 1
        assert synced.pages == status["slots"][0]["pages"]
        assert machine.sync("a").pages == 0
        machine.resume()
        until(lambda: machine.sync("a").pages > 0, "the guest runs", TIMEOUT)


@pytest.mark.kvm
def test_a_vcpu_whose_ring_cannot_be_replaced_ends_and_the_machine_goes_on() -> None:
    """Its worker may open nothing any more, /dev/kvm least of all."""
    with Machine.launch(busy("kvm")) as machine:
        machine.register("a")
        machine.pause()
        machine.sync("a")
        resource.prlimit(machine.status()["vcpus"][0]["pid"], resource.RLIMIT_NOFILE, (3, 3))
        lose_count("kvm")
        synced = machine.sync("a")
        status = machine.status()
        assert synced.pages == status["slots"][0]["pages"]
        assert [v["state"] for v in status["vcpus"]] == ["dead", "paused"]
        machine.resume()
        until(lambda: machine.sync("a").pages > 0, "the other vCPU runs", TIMEOUT)
        machine.stop()
        report = machine.wait(TIMEOUT)
    assert report["exit_code"] == ExitCode.WORKER_DIED
    assert [v["exit_reason"] for v in report["vcpus"]] == ["worker-died", "stopped"]


class Refilled:
    """In place of a machine's workers: one in whose ring there are entries again whenever it was reset."""

    paused = True

    def __init__(self, vcpu: VcpuHandle, ring: Segment) -> None:
        self.all = [vcpu]
        self.rebuilt = 0
        self._ring = ring

    def await_resets(self, vcpus: list[VcpuHandle]) -> None:
        for vcpu in vcpus:
            vcpu.control.reset_total = vcpu.control.fetch_total
            self.fill()

    def fill(self) -> None:
        first = self.all[0].control.fetch_total
        for i in range(16):
            at = (first + i) % 16 * 16
            self._ring.buf[at:at + 16] = struct.pack("<IIQ", int(i < 8), 0, 5)

    def pause(self, vcpus: list[VcpuHandle]) -> None:
        pass

    def rebuild_ring(self, vcpu: VcpuHandle) -> None:
        self.rebuilt += 1
        vcpu.control.fetch_total = vcpu.control.reset_total = 0


def test_a_ring_that_fills_while_its_vcpu_stands_still_holds_nobody(tmp_path: Path) -> None:
    """Whatever it is that writes there: a drain has an end, and every page is marked."""
    with Segment.create(segment_name("t", "ring0"), 16 * 16) as ring, \
         Segment.create(segment_name("t", "control"), 2 * 4096) as control:
        vcpu = VcpuHandle(0, vcpu_control(control.address, 0), 16)
        vcpu.watch(os.getpid())
        vcpu.ring.map_segment(ring)
        vcpus = Refilled(vcpu, ring)
        log = DirtyLog("t")
        log.add_slot(MemorySlot("t", RamSlot(0, 0, 64 * 4096), vcpu_logs=0, create=True))
        said: list[int] = []
        reaper = Reaper(ReaperSpec(), cast(VcpuPool, vcpus), log, machine_control(control.address), Tracer([], ""),
                        lambda vcpu, owed, reset, pages: said.append(vcpu), mode=tracking_mode("ring"))
        try:
            vcpus.fill()
            assert reaper.drain() > 0
            assert (vcpus.rebuilt, said) == (1, [0])
            assert log.dirty_pages(0) == 64
        finally:
            reaper.close()
            log.close()
            os.close(vcpu.pidfd)


def test_a_ring_that_has_overflowed_is_not_reset_before_all_is_marked() -> None:
    """So that a successor of a coordinator that dies in between still sees that entries were written over."""
    with Segment.create(segment_name("t", "ring0"), 16 * 16) as ring, \
         Segment.create(segment_name("t", "control"), 2 * 4096) as control:
        block = vcpu_control(control.address, 0)
        for i in range(16):
            ring.buf[16 * i:16 * i + 16] = struct.pack("<IIQ", 1, 0, 5)

        class Killed(Refilled):
            """The coordinator dies where it would have the vCPU stand still."""

            def pause(self, vcpus: list[VcpuHandle]) -> None:
                raise KeyboardInterrupt

            def await_resets(self, vcpus: list[VcpuHandle]) -> None:
                for vcpu in vcpus:
                    if vcpu.control.reset_request != vcpu.control.reset_done:       # as the worker does
                        vcpu.control.reset_total = vcpu.control.fetch_total
                        vcpu.control.reset_done = vcpu.control.reset_request

        log = DirtyLog("t")
        log.add_slot(MemorySlot("t", RamSlot(0, 0, 64 * 4096), vcpu_logs=0, create=True))
        try:
            for coordinator, pool in enumerate((Killed, Refilled)):
                vcpu = VcpuHandle(0, block, 16)
                vcpu.watch(os.getpid())
                vcpu.ring.map_segment(ring)
                reaper = Reaper(ReaperSpec(), cast(VcpuPool, pool(vcpu, ring)), log, machine_control(control.address),
                                Tracer([], ""), lambda vcpu, owed, reset, pages: None, mode=tracking_mode("ring"))
                try:
                    if coordinator == 0:
                        with pytest.raises(KeyboardInterrupt):
                            reaper.reap()
                    else:
                        reaper.reap()
                finally:
                    reaper.close()
                    os.close(vcpu.pidfd)
            assert log.dirty_pages(0) == 64
        finally:
            log.close()


# --- the rings of the dead ------------------------------------------------------------------------------------


def test_a_dead_ring_that_had_overflowed_marks_every_page_and_is_not_looked_at_again() -> None:
    with Machine.launch(busy("unicorn")) as machine:
        machine.register("a")
        machine.pause()
        machine.sync("a")
        forge_full("t", 0, PAGE)
        os.kill(machine.status()["vcpus"][0]["pid"], signal.SIGKILL)
        until(lambda: machine.status()["vcpus"][0]["state"] == "dead", "death seen", TIMEOUT)
        pages = machine.status()["slots"][0]["pages"]
        assert machine.sync("a").pages == pages
        assert machine.sync("a").pages == 0
        machine.set_tracking("bitmap")
        machine.set_tracking("ring")
        assert machine.sync("a").pages == 0
        os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
        until(lambda: restarts(machine) == 1, "another coordinator", TIMEOUT)
        assert machine.sync("a").pages == 0
        machine.resume()
        until(lambda: machine.sync("a").pages > 0, "the other vCPU runs", TIMEOUT)
        machine.stop()
        assert machine.wait(TIMEOUT)["exit_code"] == ExitCode.WORKER_DIED


@pytest.mark.parametrize("step", STEPS["dead ring"])
def test_a_coordinator_that_dies_after_it_collected_a_dead_ring_loses_nothing(
        accel: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMM_STEPS", str(tmp_path))
    with Machine.launch(busy(accel)) as machine:
        machine.register("a")
        machine.pause()
        machine.sync("a")
        before = machine.ram(0).copy()
        machine.resume()
        until(lambda: bool(changed_pages(before, machine.ram(0))), "pages written", TIMEOUT)
        (tmp_path / f"kill-{step}").touch()
        os.kill(machine.status()["vcpus"][0]["pid"], signal.SIGKILL)
        until(lambda: restarts(machine) == 1, "another coordinator", TIMEOUT)
        machine.pause()
        assert changed_pages(before, machine.ram(0)) <= pages_of(machine.sync("a").slots[0])


def test_a_worker_and_the_coordinator_that_die_together_leave_nothing_behind_unmarked(accel: str) -> None:
    """A KVM ring that only the dead coordinator had mapped is gone, and what was in it is not known."""
    with Machine.launch(busy(accel, ring_entries=4096)) as machine:
        machine.register("a")
        machine.pause()
        machine.sync("a")
        before = machine.ram(0).copy()
        machine.resume()
        until(lambda: len(changed_pages(before, machine.ram(0))) > 20, "pages written", TIMEOUT)
        status = machine.status()
        assert machine._keeper is not None
        os.kill(machine._keeper.pid, signal.SIGSTOP)    # so that both are gone before anybody looks
        os.kill(status["coordinator"]["pid"], signal.SIGKILL)
        os.kill(status["vcpus"][0]["pid"], signal.SIGKILL)
        until(lambda: status["vcpus"][0]["pid"] not in machine_processes("t"), "the worker's end", TIMEOUT)
        os.kill(machine._keeper.pid, signal.SIGCONT)
        until(lambda: restarts(machine) == 1, "another coordinator", TIMEOUT)
        machine.pause()
        assert changed_pages(before, machine.ram(0)) <= pages_of(machine.sync("a").slots[0])
        assert [v["state"] for v in machine.status()["vcpus"]] == ["dead", "paused"]


@pytest.mark.parametrize("tracking", ["ring", "bitmap", pytest.param("uffd", marks=pytest.mark.uffd)])
def test_a_killed_worker_is_no_surplus(accel: str, tracking: str) -> None:
    """Whatever had to be marked: the verifier says that nothing was lost, and the exit status what happened."""
    with Machine.launch(busy(accel, tracking=tracking, verify=exact(0.02))) as machine:
        until(lambda: machine.status()["verification"]["rounds"] > 1, "rounds", TIMEOUT)
        os.kill(machine.status()["vcpus"][1]["pid"], signal.SIGKILL)
        until(lambda: machine.status()["vcpus"][1]["state"] == "dead", "death seen", TIMEOUT)
        rounds = machine.status()["verification"]["rounds"]
        until(lambda: machine.status()["verification"]["rounds"] > rounds + 2, "rounds after it", TIMEOUT)
        machine.stop()
        report = machine.wait(TIMEOUT)
    assert report["verification"]["lost_pages"] == 0, report["verification"]
    assert report["verification"]["surplus_pages"] == 0, report["verification"]
    assert report["exit_code"] == ExitCode.WORKER_DIED


# --- totals that cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outstanding", [-3, -1, 0, 1, 15, 16, 17, 1 << 62, (1 << 64) - 1])
def test_a_harvest_never_takes_more_than_the_ring_has(outstanding: int) -> None:
    """All entries are dirty; the totals say that so many await their reset."""
    entries = 16
    with Segment.create(segment_name("test-lost", "ring"), 4096) as segment, \
         Segment.create(segment_name("test-lost", "control"), 4096) as control:
        vcpu = VcpuHandle(0, VcpuControl.from_address(control.address), entries)
        vcpu.ring.map_segment(segment)
        table = np.zeros((1, 3), np.uint64)     # no slot: each entry is a bad one
        for at in range(0, entries * 16, 16):
            segment.buf[at] = 1
        start = 1 << 40
        vcpu.control.fetch_total = start
        vcpu.control.reset_total = start - outstanding
        expected = min(max(0, entries - vcpu.ring.outstanding), entries)
        assert vcpu.ring.countable == (0 <= outstanding <= entries)
        assert vcpu.ring.harvest(table.ctypes.data) == expected
        assert vcpu.ring.overflowed


def test_the_ring_is_seen_by_the_test_as_it_is_by_the_worker() -> None:
    """The forging above rests on that."""
    with Machine.launch(busy("unicorn", log="always")) as machine, software_ring("t", 0) as entries:
        assert len(entries) == 1024
        until(lambda: machine.status()["vcpus"][0]["dirty_pages"] > 0, "entries harvested", TIMEOUT)
        assert any(entry.offset for entry in entries)
