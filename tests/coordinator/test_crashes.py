"""Real signals to real processes: what survives, what is reported, and that nothing is left behind.

The autouse fixture in conftest.py checks segments and files after every test here; processes are
checked by each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from machines import ANY, alive, exact, nothing_left, replace, spec, until
from places import TESTS

from vmm.client.machine import Machine
from vmm.errors import ExitCode, VmmError
from vmm.machine.runtime import collect_garbage, is_running, leftovers, machine_dir, runtime_root

TIMEOUT = 60.0


@pytest.fixture(params=ANY)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pids(machine: Machine) -> tuple[int, list[int]]:
    status = machine.status()
    return status["coordinator"]["pid"], [v["pid"] for v in status["vcpus"]]


def test_killed_worker_is_reported_and_its_last_pages_are_kept(accel: str) -> None:
    busy = spec("random", accel=accel, writes=0, timeout=None, spin=200)
    with Machine.launch(busy, name="crash") as machine:
        machine.register("a")
        before = machine.ram(0).copy()
        _, workers = pids(machine)
        os.kill(workers[1], signal.SIGKILL)
        until(lambda: machine.status()["vcpus"][1]["state"] == "dead", "death seen")
        machine.pause()
        dirty = {p for first, n in machine.sync("a").slots[0] for p in range(first, first + n)}
        after = machine.ram(0)
        changed = {p for p in range(len(after) // 4096)
                   if (before[p * 4096:(p + 1) * 4096] != after[p * 4096:(p + 1) * 4096]).any()}
        assert changed <= dirty
        machine.resume()
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert report["exit_code"] == ExitCode.WORKER_DIED
        assert [v["exit_reason"] for v in report["vcpus"]] == ["stopped", "worker-died"]
    assert nothing_left("crash")


def test_killed_coordinator_is_replaced_and_no_page_is_lost(accel: str) -> None:
    """Invariant 5, end to end: kill -9 at random moments under the verifier."""
    machine_spec = spec("stamp", accel=accel, writes=40_000, spin=50, verify=exact(0.03))
    with Machine.launch(replace(machine_spec, dirty_quota=2000), name="crash") as machine:  # or it might end before
        for restart in range(3):
            coordinator, workers = pids(machine)
            os.kill(coordinator, signal.SIGKILL)
            until(lambda n=restart: machine_restarts(machine) > n, "another coordinator")
            assert pids(machine)[1] == workers
        with contextlib.suppress(VmmError):     # "has ended"
            machine.dirty_limit(0)
        report = machine.wait(TIMEOUT)
        assert report["coordinator"]["restarts"] == 3
        assert report["verification"]["lost_pages"] == 0
        assert report["verification"]["surplus_pages"] == 0
        assert report["exit_code"] == 0
    assert nothing_left("crash")


def machine_restarts(machine: Machine) -> int:
    try:
        return int(machine.status()["coordinator"]["restarts"])
    except VmmError:
        return -1


def test_killed_keeper_ends_the_machine(accel: str) -> None:
    machine = Machine.launch(spec("idle", accel=accel, milliseconds=0, timeout=None), name="crash")
    coordinator, workers = pids(machine)
    assert machine._keeper is not None
    os.kill(machine._keeper.pid, signal.SIGKILL)
    until(lambda: not any(alive(p) for p in [coordinator, *workers]), "coordinator and workers gone")
    assert nothing_left("crash")    # its coordinator has cleared up
    machine.close()


def test_keeper_and_coordinator_killed_at_once_leave_nothing(accel: str) -> None:
    machine = Machine.launch(spec("random", accel=accel, writes=0, timeout=None), name="crash")
    coordinator, workers = pids(machine)
    assert machine._keeper is not None
    os.kill(machine._keeper.pid, signal.SIGSTOP)    # so that it cannot start another one
    os.kill(coordinator, signal.SIGKILL)
    os.kill(machine._keeper.pid, signal.SIGKILL)
    until(lambda: not any(alive(p) for p in [coordinator, *workers]), "workers gone")
    until(lambda: nothing_left("crash"), "files gone")
    machine.close()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_launching_process_that_goes_takes_the_machine_along(accel: str, signum: int) -> None:
    """The foreground launch: its end, however it comes, ends the machine."""
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "from machines import spec\nfrom vmm.client.machine import Machine\n"
              f"busy = spec('random', accel={accel!r}, writes=0, timeout=None)\n"
              "with Machine.launch(busy, name='crash') as m:\n"
              "    print('up', flush=True)\n    m.wait()\n")
    process = subprocess.Popen([sys.executable, "-c", script, str(TESTS)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signum)
    process.wait(TIMEOUT)
    process.stdout.close()
    until(lambda: nothing_left("crash"), "everything gone")


def test_garbage_is_found_and_collected() -> None:
    from ipc.shm import Segment
    from vmm.machine.names import segment_name

    left = [Segment.create(segment_name("long-dead", what), 4096) for what in ("ram0", "client.a.0")]
    for segment in left:
        segment._owner = False
        segment.close()
    runtime_root().mkdir(mode=0o700)
    machine_dir("long-dead").mkdir()
    assert set(leftovers()) == {"long-dead"}
    assert not is_running("long-dead")
    removed = collect_garbage()
    assert len(removed) == 3
    assert leftovers() == {}
    assert nothing_left("long-dead")


@pytest.mark.kvm
def test_garbage_collection_spares_the_running() -> None:
    with Machine.launch(spec("idle", accel="kvm", milliseconds=0, timeout=None), name="crash") as machine:
        assert leftovers() == {}
        assert collect_garbage() == []
        with pytest.raises(VmmError, match="is running"):
            collect_garbage("crash")
        assert machine.status()["state"] == "running"
