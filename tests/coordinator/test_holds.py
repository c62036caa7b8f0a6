"""Who holds what of a machine: pauses, leases, limits, clients, recordings. Holders are real processes that die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import ACCELS, runs, spec, stands_still, until

from ipc.linux.processid import ProcessId, identity, open_process
from vmm.client.machine import Machine
from vmm.errors import ExitCode, VmmError
from vmm.machine import verbs

PAGE = 4096


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """One that runs for ever."""
    with Machine.launch(spec("random", accel="unicorn", writes=0, spin=200, timeout=None)) as running:
        yield running


@pytest.fixture
def other(machine: Machine) -> Iterator[Machine]:
    """Another connection to it."""
    with contextlib.closing(Machine.attach(machine.name)) as attached:
        yield attached


class Process:
    """Another process that holds something of machine ``t`` until it is told to end, or killed."""

    def __init__(self, *lines: str, prefix: tuple[str, ...] = ()) -> None:
        body = "".join(f"    {line}\n" for line in lines)
        script = (f"import sys\nfrom vmm import Machine, VmmError\nwith Machine.attach('t') as m:\n{body}"
                  "    print('held', flush=True)\n    sys.stdin.read()\n")
        self.popen = subprocess.Popen([*prefix, sys.executable, "-c", script], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)
        assert self.popen.stdout is not None
        self.said = self.popen.stdout.readline().strip()

    @property
    def pid(self) -> int:
        return self.popen.pid

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()

    def __enter__(self) -> Process:
        assert self.said == "held", self.said
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


PAUSED = ("pause = m.paused('copying'); pause.__enter__()",)


def kill_coordinator(machine: Machine) -> None:
    """It has been replaced when this returns."""
    coordinator = machine.status()["coordinator"]
    os.kill(coordinator["pid"], signal.SIGKILL)
    until(lambda: machine.status()["coordinator"]["restarts"] == coordinator["restarts"] + 1, "a replacement")


def holders(machine: Machine, what: str) -> list[tuple[str, int]]:
    return [(h["why"], h["pid"]) for h in machine.status()["holders"] if h["what"] == what]


def nothing_held(machine: Machine) -> bool:
    """But for clients that are nobody's own."""
    return not [h for h in machine.status()["holders"] if h["what"] != "client" or h["pid"]]


# --- processes ---------------------------------------------------------------------------------------------


def test_a_process_is_its_pid_and_its_start() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        found = identity(sleeper.pid)
        os.close(open_process(found))
        with pytest.raises(ProcessLookupError):
            open_process(ProcessId(found.pid, found.start - 1))     # an earlier one that had this pid
        sleeper.kill()
        sleeper.wait()
        with pytest.raises(ProcessLookupError):
            open_process(found)
    for pid in (-1, 0, 1 << 40, (1 << 31) - 1):
        with pytest.raises(ProcessLookupError):
            identity(pid)
        with pytest.raises(ProcessLookupError):
            open_process(ProcessId(pid, 1))
    assert identity() == identity(os.getpid())


# --- pauses --------------------------------------------------------------------------------------------------


def test_pauses_are_counted(accel: str) -> None:
    with Machine.launch(spec("random", accel=accel, writes=0, spin=200, timeout=None)) as machine, \
            contextlib.closing(Machine.attach("t")) as other:
        with machine.paused("one"):
            with other.paused("two"), machine.paused("three"):
                assert {why for why, _ in holders(machine, "pause")} == {"one", "two", "three"}
                assert stands_still(machine)
            assert stands_still(machine)
            assert holders(machine, "pause") == [("one", os.getpid())]
        assert machine.status()["state"] == "running"
        assert runs(machine)


def test_a_user_takes_back_the_users_pause_alone(machine: Machine, other: Machine) -> None:
    with machine.paused("copying"):
        assert other.resume() == [f"copying (pid {os.getpid()})"]
        other.pause()
        other.pause()       # there is one
        assert set(holders(machine, "pause")) == {("user", 0), ("copying", os.getpid())}
    assert machine.status()["state"] == "paused"
    assert stands_still(machine)
    assert other.resume() == []
    assert runs(machine)


def test_a_pause_goes_with_its_process(machine: Machine) -> None:
    with Process(*PAUSED) as first, Process(*PAUSED) as second:
        assert holders(machine, "pause") == [("copying", first.pid), ("copying", second.pid)]
        first.kill()
        until(lambda: holders(machine, "pause") == [("copying", second.pid)], "the first one's pause to go")
        assert stands_still(machine)
        second.kill()
        until(lambda: machine.status()["state"] == "running", "the machine to run")
        assert runs(machine)


def test_a_pause_before_the_start_counts_after_it() -> None:
    with Machine.launch(spec("random", accel="unicorn", writes=0, timeout=None), start=False) as machine:
        with machine.paused("copying"):
            kill_coordinator(machine)
            machine.start()
            assert machine.status()["state"] == "paused"
            assert stands_still(machine)
        assert runs(machine)


def test_holds_outlive_the_coordinator(machine: Machine) -> None:
    with Process(*PAUSED, "m.register('mine', mine=True)",
                 "limits = m.limits('slow'); limits.set(77, 1)") as process:
        machine.pause()
        kill_coordinator(machine)
        assert set(holders(machine, "pause")) == {("user", 0), ("copying", process.pid)}
        assert ("mine", process.pid) in holders(machine, "client")
        assert [v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"]] == [0, 77]
        assert machine.resume() == [f"copying (pid {process.pid})"]
        process.kill()
        until(lambda: nothing_held(machine), "all of it to go")
        assert runs(machine)


def test_a_holder_that_died_beside_the_coordinator_holds_nothing(machine: Machine) -> None:
    with Process(*PAUSED, "lease = m.lease('migration', 'to nowhere')") as process:
        coordinator = machine.status()["coordinator"]["pid"]
        os.kill(coordinator, signal.SIGSTOP)        # it does not see the process end
        process.kill()
        os.kill(coordinator, signal.SIGKILL)
        until(lambda: machine.status()["coordinator"]["restarts"] == 1, "a replacement")
        until(lambda: nothing_held(machine), "all of it to go")
        assert runs(machine)


def test_a_process_in_a_pid_namespace_may_hold(machine: Machine) -> None:
    """It has another pid there; what counts is the one that the coordinator sees."""
    with Process(*PAUSED, prefix=("unshare", "--pid", "--fork", "--kill-child")):
        (_, pid), = holders(machine, "pause")
        assert pid not in (0, os.getpid())
        os.kill(pid, signal.SIGKILL)
        until(lambda: machine.status()["state"] == "running", "the machine to run")


def test_a_forked_child_does_not_ask_in_its_parents_name(machine: Machine) -> None:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            try:
                machine.pause()
            except VmmError as exc:
                os._exit(0 if "forked" in str(exc) else 1)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert machine.status()["state"] == "running"


@pytest.mark.parametrize("start", [-1, 1, 1 << 40, 1 << 70])
def test_who_says_another_start_than_it_has_holds_nothing(machine: Machine, start: int) -> None:
    with pytest.raises(VmmError, match=r"nothing can be held for|bad request"):
        machine._client.ask(verbs.Pause, token="x", why="y", owner_start=start)
    assert nothing_held(machine)


# --- leases --------------------------------------------------------------------------------------------------

#: What a lease keeps others from: kind -> {what is tried: what is said}.
TRIES: dict[str, Any] = {
    "a migration": lambda m: m.lease("migration", "to b").close(),
    "a snapshot": lambda m: m.lease("snapshot", "into d").close(),
    "memory add": lambda m: m.memory_add(3, 1 << 30, PAGE),
    "memory remove": lambda m: m.memory_remove(1),
    "log stop": lambda m: m.log_stop(0),
    "tracking none": lambda m: m.set_tracking("none"),
}
KEPT_OUT = {"migration": set(TRIES), "snapshot": set(TRIES) - {"a snapshot"}}


@pytest.mark.parametrize("kind", KEPT_OUT)
def test_a_lease_keeps_out_what_would_break_it(machine: Machine, other: Machine, kind: str) -> None:
    with machine.lease(kind, "to or into x"):
        assert holders(other, "lease") == [(f"{kind} to or into x", os.getpid())]
        for what, attempt in TRIES.items():
            if what in KEPT_OUT[kind]:
                with pytest.raises(VmmError, match=rf"machine 't' cannot .* \(pid {os.getpid()}\)"):
                    attempt(other)
            else:
                attempt(other)
    for what in KEPT_OUT[kind] - {"memory remove"}:
        TRIES[what](other)
        if what == "tracking none":
            other.set_tracking("ring")


def test_a_lease_goes_with_its_process(machine: Machine) -> None:
    with Process("lease = m.lease('migration', 'to nowhere'); lease.freeze()") as process:
        kill_coordinator(machine)
        assert holders(machine, "lease") == [("migration to nowhere", process.pid)]
        assert machine.status()["state"] == "paused"
        with pytest.raises(VmmError, match=f"pid {process.pid}"):
            machine.write(0x40_0000, b"x")
        process.kill()
        until(lambda: nothing_held(machine), "the lease to go")
        assert machine.status()["state"] == "running"
        machine.write(0x40_0000, b"x")


def test_a_machine_that_arrives_is_its_receivers_alone() -> None:
    with Machine.launch(spec("random", accel="unicorn", writes=0, timeout=None), start=False) as machine, \
            contextlib.closing(Machine.attach("t")) as other:
        with machine.lease("incoming", "from x"):
            for attempt in (other.start, lambda: other.memory_add(3, 1 << 30, PAGE), lambda: other.register("a"),
                            lambda: other.write(0x40_0000, b"x"), lambda: other.set_state([])):
                with pytest.raises(VmmError, match="it is still arriving from x"):
                    attempt()
            assert machine.status()["state"] == "ready"
            machine.write(0x40_0000, b"x")
            kill_coordinator(machine)
            machine.start()
        assert other.status()["state"] == "running"
        with pytest.raises(VmmError, match="has already been started"):
            other.lease("incoming", "from y")


def test_a_machine_whose_receiver_dies_before_its_start_goes_too() -> None:
    machine = Machine.launch(spec("random", accel="unicorn", writes=0, timeout=None), start=False, detach=True)
    try:
        with Process("lease = m.lease('incoming', 'from x')") as process:
            process.kill()
            assert machine._keeper is not None
            assert machine._keeper.wait(20) == ExitCode.STOPPED
    finally:
        machine.close()


def test_a_machine_that_was_handed_over_stays_so(machine: Machine) -> None:
    with Process("lease = m.lease('migration', 'to x'); lease.freeze(); lease.hand_over('tcp://x')") as process:
        with pytest.raises(VmmError, match="still in progress"):
            machine.resume(force=True)
        kill_coordinator(machine)
        process.kill()
        until(lambda: nothing_held(machine), "the lease to go")
        kill_coordinator(machine)
        assert machine.status()["handed_over"] == "tcp://x"
        assert stands_still(machine)
        for attempt in (machine.resume, lambda: machine.lease("migration", "to y"),
                        lambda: machine.write(0x40_0000, b"x"), lambda: machine.memory_add(3, 1 << 30, PAGE)):
            with pytest.raises(VmmError, match="was handed over to tcp://x"):
                attempt()
        with machine.lease("migration", "to x", recover=True), pytest.raises(VmmError, match="still in progress"):
            machine.resume(force=True)
        assert machine.resume(force=True) == []
        assert runs(machine)
        with pytest.raises(VmmError, match="has not been handed over"):
            machine.lease("migration", "to x", recover=True)


def test_a_machine_that_was_refused_is_taken_back(machine: Machine) -> None:
    with machine.lease("migration", "to x") as lease:
        with pytest.raises(VmmError, match="is not frozen"):
            lease.hand_over("tcp://x")
        lease.freeze()
        lease.hand_over("tcp://x")
        lease.take_back()
        assert stands_still(machine)
        lease.thaw()
        assert runs(machine)


def test_who_has_ended_is_in_nobodys_way(machine: Machine, other: Machine) -> None:
    """A verb that is sent after a process has ended finds nothing of it, also where both come at once."""
    with Process("lease = m.lease('migration', 'to x')") as process:
        coordinator = machine.status()["coordinator"]["pid"]
        os.kill(coordinator, signal.SIGSTOP)
        process.kill()
        deadline = time.monotonic() + 20
        number = other._client._send(verbs.TakeLease, {"mine": True, "token": "y", "kind": "migration",
                                                         "why": "to y"}, deadline)
        os.kill(coordinator, signal.SIGCONT)
        assert other._client._await(number, deadline) == {}


# --- limits, clients, recordings --------------------------------------------------------------------------------


def test_the_least_limit_counts_and_a_process_takes_its_own_along(machine: Machine) -> None:
    def quotas() -> list[int]:
        return [v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"]]

    machine.dirty_limit(500)
    with Process("limits = m.limits('migration'); limits.set(100, 0); limits.set(900, 1)") as process:
        assert quotas() == [100, 500]
        machine.dirty_limit(0)
        with pytest.raises(VmmError, match=rf"by migration \(pid {process.pid}\)"):
            machine.set_tracking("bitmap")
        assert quotas() == [100, 900]
        machine.dirty_limit(50, 1)
        assert quotas() == [100, 50]
        process.kill()
        until(lambda: quotas() == [0, 50], "the limits to go")
    kill_coordinator(machine)
    assert quotas() == [0, 50]


def test_limits_set_at_run_time_are_in_the_state(machine: Machine) -> None:
    machine.dirty_limit(500, 1)
    machine.log_stop(0)
    machine.set_tracking("auto")
    with machine.paused("look"), machine.limits("own") as limits:
        limits.set(7)
        found = machine.state()
    assert found["spec"]["dirty_quotas"] == [0, 500]
    assert found["spec"]["tracking"] == "auto"
    assert [s["log"] for s in found["spec"]["slots"]] == [False]
    assert found["paused"] is False
    machine.dirty_limit(500)
    machine.pause()
    found = machine.state()
    assert (found["spec"]["dirty_quota"], found["spec"]["dirty_quotas"], found["paused"]) == (500, [], True)


@pytest.mark.parametrize(("quota", "vcpu"), [(-5, None), (1 << 70, None), ((1 << 40) + 1, 0), (5, -1), (5, 2)])
def test_limits_out_of_bounds_are_refused(machine: Machine, quota: int, vcpu: int | None) -> None:
    with pytest.raises(VmmError, match=r"must be from 0 to|there is no vCPU|bad request"):
        machine.dirty_limit(quota, vcpu)
    assert [v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"]] == [0, 0]


def test_what_a_process_gathers_is_its_own(machine: Machine) -> None:
    with Process("m.register('mine', mine=True)") as process:
        for attempt in (lambda: machine.sync("mine"), lambda: machine.unregister("mine"),
                        lambda: machine.register("mine", mine=True)):
            with pytest.raises(VmmError, match=f"belongs to process {process.pid}"):
                attempt()
        process.kill()
        until(lambda: machine.status()["clients"] == [], "the client to go")
    machine.register("mine", mine=True)
    machine.sync("mine")


def test_a_recording_is_its_own_processs(machine: Machine) -> None:
    with Process("m.record_start()") as process:
        assert holders(machine, "recording") == [("trace", process.pid)]
        for attempt in (machine.record_step, machine.record_stop, machine.record_start):
            with pytest.raises(VmmError, match=str(process.pid)):
                attempt()
        process.kill()
        until(lambda: nothing_held(machine), "the recording to go")
    machine.record_start()
    machine.record_stop()


# --- what people see -------------------------------------------------------------------------------------------


def vmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True, timeout=60)


def test_resume_says_who_holds_the_machine(machine: Machine) -> None:
    with machine.paused("snapshot"):
        assert vmm("pause", "t").stdout == "t is paused\n"
        done = vmm("resume", "t")
        assert (done.returncode, done.stdout) == (0, f"t stays paused: snapshot (pid {os.getpid()})\n")
        assert json.loads(vmm("resume", "t", "--json").stdout)["held_by"] == [f"snapshot (pid {os.getpid()})"]
        shown = vmm("status", "t").stdout
        assert f"pause        snapshot (pid {os.getpid()})" in shown
    assert vmm("resume", "t").stdout == "t is running\n"
    with machine.lease("migration", "to x") as lease:
        lease.freeze()
        lease.hand_over("tcp://x:1")
    done = vmm("resume", "t")
    assert done.returncode == 2
    assert "vmm resume --force t" in done.stderr
    assert "handed over to tcp://x:1" in vmm("status", "t").stdout
    assert vmm("resume", "t", "--force").stdout == "t is running\n"


def test_a_dirty_limit_of_vcpu_minus_one_is_refused(machine: Machine) -> None:
    done = vmm("dirty-limit", "set", "t", "20MB/s", "--vcpu", "-1")
    assert done.returncode == 2
    assert "-1 is not in the range" in done.stderr


def test_a_snapshot_does_not_take_a_users_pause_along(machine: Machine, other: Machine, tmp_path: Path) -> None:
    from vmm.consumers import snapshot

    done: list[int] = []

    def progress(pages: int, total: int) -> None:
        if not done:
            done.append(vmm("pause", "t").returncode)

    snapshot.create(machine, tmp_path / "chain", progress=progress)
    assert done == [0]
    assert other.status()["state"] == "paused"
    snapshot.create(machine, tmp_path / "chain")
    assert other.status()["state"] == "paused"
