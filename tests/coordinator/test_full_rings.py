"""vCPUs at a full ring, and what is between them and the coordinator: a bell that is not heard, a coordinator that
stands still or is killed. The reaper's own time does not come: a full ring is all that it goes by."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from machines import ACCELS, alive, changed_pages, exact, spec, until
from shared import control_blocks

from ipc.bell import Doorbell
from ipc.layout import VcpuState
from vmm.client.machine import Machine
from vmm.machine.names import machine_dir
from vmm.machine.spec import MachineSpec, ReaperSpec

TIMEOUT = 120.0
NEVER = ReaperSpec(mode="fixed", interval=3600.0)


def filling(accel: str) -> MachineSpec:
    """Walks over more pages than its ring holds, again and again."""
    return spec("sequential", accel=accel, vcpus=2, ring=1024, passes=0, timeout=None, reaper=NEVER, log="always")


@contextmanager
def silenced(name: str) -> Iterator[list[int]]:
    """Whatever rings is taken from the bell before the coordinator hears it, mostly; how often."""
    taken = [0]
    over = threading.Event()

    def take() -> None:
        with closing(Doorbell(machine_dir(name))) as bell:
            while not over.is_set():
                if select.select([bell.fd], [], [], 0.01)[0]:
                    bell.silence()
                    taken[0] += 1

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("accel", ACCELS)
def test_a_bell_that_nobody_hears_costs_time_and_nothing_else(accel: str) -> None:
    walk = spec("sequential", accel=accel, vcpus=2, ring=1024, passes=30, timeout=None, reaper=NEVER,
                verify=exact(3600))
    with Machine.launch(walk) as machine, silenced("t") as taken:
        report = machine.wait(TIMEOUT)
    assert report["exit_code"] == 0
    assert sum(vcpu["ring_full_exits"] for vcpu in report["vcpus"]) > 0
    assert taken[0] > 0


@pytest.mark.parametrize("accel", ACCELS)
def test_a_coordinator_that_stood_still_lets_all_go(accel: str) -> None:
    with Machine.launch(filling(accel)) as machine, control_blocks("t") as blocks:
        pid = machine.status()["coordinator"]["pid"]
        for _ in range(3):
            os.kill(pid, signal.SIGSTOP)
            try:
                until(lambda: all(b.state == VcpuState.RING_FULL for b in blocks), "every ring is full", TIMEOUT)
            finally:
                os.kill(pid, signal.SIGCONT)
            exits = [b.ring_full_exits for b in blocks]
            until(lambda was=exits: all(b.ring_full_exits > n for b, n in zip(blocks, was, strict=True)),   # type: ignore[misc]
                  "every vCPU goes on", TIMEOUT)
        assert machine.status()["coordinator"]["restarts"] == 0
        assert all(vcpu["ring_rebuilds"] == 0 for vcpu in machine.status()["vcpus"])


@pytest.mark.parametrize("accel", ACCELS)
def test_a_successor_lets_those_go_who_wait_and_nothing_is_lost(accel: str) -> None:
    """Killed while every ring is full: what they hold is in the next sync."""
    with Machine.launch(filling(accel)) as machine, control_blocks("t") as blocks:
        machine.register("a")
        machine.pause()
        machine.sync("a")
        before = machine.ram(0).copy()
        machine.resume()
        pid = machine.status()["coordinator"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        until(lambda: all(b.state == VcpuState.RING_FULL for b in blocks), "every ring is full", TIMEOUT)
        exits = [b.ring_full_exits for b in blocks]
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), "it is gone", TIMEOUT)
        until(lambda: all(b.ring_full_exits > n for b, n in zip(blocks, exits, strict=True)), "every vCPU goes on",
              TIMEOUT)
        machine.pause()
        changed = changed_pages(before, machine.ram(0))
        told = {p for first, count in machine.sync("a").slots[0] for p in range(first, first + count)}
        assert len(changed) > 2 * 448
        assert changed <= told
        assert machine.status()["coordinator"]["restarts"] == 1
        assert all(vcpu["ring_rebuilds"] == 0 for vcpu in machine.status()["vcpus"])
