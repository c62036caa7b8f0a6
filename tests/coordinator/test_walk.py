"""The walk: the coordinator is killed at each step of the list (ipc/steps.py), on each accelerator.

After each kill the machine goes on, the verb that was under way succeeds when the client asks again (which
``Machine`` does by itself), the memory shows that no page was lost to a client, and at the end nothing is left
behind (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import ACCELS, exact, spec, until
from needs import missing
from places import TESTS

from ipc.shm import Segment, list_segments
from ipc.sockets import FdListener
from ipc.steps import STEPS
from vmm.client.machine import Machine, SyncResult
from vmm.consumers.trace import record
from vmm.errors import ExitCode, VmmError
from vmm.machine.names import segment_name
from vmm.machine.spec import MachineSpec, RamSlot

TIMEOUT = 60.0
KILLS = 5               # of one machine: more in a short time end it
PLUGGED = 0x4000_0000   # where slot 2 is plugged in


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Steps:
    """The files that the machine's processes look for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def kill(self, name: str) -> None:
        (self._directory / f"kill-{name}").touch()

    def fail(self, name: str, number: int) -> None:
        (self._directory / f"fail-{name}").write_text(str(number))

    def reached(self) -> bool:
        """Every step that was asked for has been reached."""
        return not list(self._directory.iterdir())


@pytest.fixture
def steps(steps: Path) -> Steps:
    """The directory of tests/conftest.py, and what is done with it."""
    return Steps(steps)


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {p for first, count in ranges for p in range(first, first + count)}


class Watched:
    """A machine, and what its memory says of one client's log: whatever changed in slot 0 must have been told."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.register("oracle")
        self.begin()

    def begin(self) -> None:
        """With what the memory has now."""
        self._before = self.machine.ram(0).copy()
        self._told: set[int] = set()

    def look(self) -> SyncResult:
        result = self.machine.sync("oracle")
        self._told |= pages(result.slots[0])
        return result

    def check(self) -> None:
        """Nothing was lost until now, and the guest goes on."""
        memory = self.machine.ram(0)
        until(lambda: not np.array_equal(memory, self._before), "the guest writes")
        self.machine.pause()
        self.look()
        now = memory.copy()
        differs = (now.reshape(-1, 4096) != self._before.reshape(-1, 4096)).any(axis=1)
        changed = set(np.flatnonzero(differs).tolist())
        assert changed <= self._told, f"{len(changed - self._told)} of {len(changed)} pages were lost"
        self._before, self._told = now, set()
        self.machine.resume()
        until(lambda: not np.array_equal(memory, now), "the guest goes on")

    def restarts(self) -> int:
        return int(self.machine.status()["coordinator"]["restarts"])

    def segments(self, kind: str) -> list[str]:
        """Of the machine, those that begin so."""
        return list_segments(segment_name(self.machine.name, kind)[1:])


def busy(accel: str, **more: Any) -> MachineSpec:
    return spec("stamp", accel=accel, writes=0, spin=100, timeout=None, slots=[RamSlot(0, 0, 8 << 20)], **more)


# --- what is done while the coordinator is killed: up to ``yield`` nothing is armed
# ---------------------------------

Scenario = Callable[[Watched, str], Iterator[None]]


def registering(w: Watched, step: str) -> Iterator[None]:
    yield
    w.machine.register("second")
    assert w.machine.status()["clients"] == ["oracle", "second"]
    assert len(w.segments("client.second")) == 1
    until(lambda: w.machine.sync("second").pages > 0, "pages of the new client")
    w.machine.unregister("second")


def registering_like(w: Watched, step: str) -> Iterator[None]:
    """The new client begins with all that the other has not been told yet."""
    m = w.machine
    m.pause()
    w.look()
    m.write(0x50_0000, b"x")
    yield
    m.register("second", like="oracle")
    assert 0x500 in pages(m.sync("second").slots[0])
    assert 0x500 in pages(w.look().slots[0])
    m.unregister("second")
    m.resume()


def unregistering(w: Watched, step: str) -> Iterator[None]:
    w.machine.register("second")
    yield
    w.machine.unregister("second")
    assert w.machine.status()["clients"] == ["oracle"]
    assert w.segments("client.second") == []


def syncing(w: Watched, step: str) -> Iterator[None]:
    w.machine.register("second")
    yield
    w.look()
    w.machine.unregister("second")


def syncing_alone(w: Watched, step: str) -> Iterator[None]:
    w.look()
    yield
    w.look()


def writing(w: Watched, step: str) -> Iterator[None]:
    m = w.machine
    m.memory_add(2, PLUGGED, 64 << 10)
    w.look()
    assert w.look().slots[2] == []
    yield
    if step.startswith("host-"):
        script = ("import sys\nfrom vmm.client.machine import Machine\n"
                  "Machine.attach(sys.argv[1]).write(int(sys.argv[2]), b'z' * 5000)\n")
        done = subprocess.run([sys.executable, "-c", script, m.name, str(PLUGGED + 100)], timeout=TIMEOUT)
        assert done.returncode == -signal.SIGKILL
    else:
        m.write(PLUGGED + 100, b"z" * 5000)
        assert m.read(PLUGGED + 100, 5000) == b"z" * 5000
    assert w.look().slots[2] == [(0, 2)]
    until(lambda: w.look().slots[2] == [], "the write is over")
    m.memory_remove(2)


def adding(w: Watched, step: str) -> Iterator[None]:
    m = w.machine
    yield
    m.memory_add(2, PLUGGED, 64 << 10)
    assert [s["id"] for s in m.status()["slots"]] == [0, 2]
    assert len(w.segments("ram2.")) == len(w.segments("log2.")) == 1
    w.look()
    m.write(PLUGGED + 4096, b"x")
    assert w.look().slots[2] == [(1, 1)]
    m.memory_remove(2)


def removing(w: Watched, step: str) -> Iterator[None]:
    m = w.machine
    m.memory_add(2, PLUGGED, 64 << 10)
    w.look()
    m.write(PLUGGED + 3 * 4096, b"x")
    yield
    m.memory_remove(2)
    told = w.look()
    assert (told.slots[2], told.retired) == ([(3, 1)], {2})
    assert 2 not in w.look().slots
    assert [s["id"] for s in m.status()["slots"]] == [0]
    assert w.segments("ram2.") == w.segments("log2.") == []
    assert len(w.segments("client.oracle")) == 1
    m.memory_add(2, PLUGGED, 64 << 10)      # again, under the same number
    m.memory_remove(2)


def not_logging(w: Watched, step: str) -> Iterator[None]:
    yield
    w.machine.log_stop(0)
    assert w.look().unlogged == {0}
    w.machine.log_start(0)
    w.look()


def logging(w: Watched, step: str) -> Iterator[None]:
    w.machine.log_stop(0)
    w.look()
    yield
    w.machine.log_start(0)
    told = w.look()
    assert told.unlogged == frozenset()
    assert pages(told.slots[0]) == set(range(2048))


def needed(w: Watched, step: str) -> Iterator[None]:
    """The only client goes, and one comes."""
    m = w.machine
    m.unregister("oracle")
    off(m)
    yield
    m.register("oracle")
    assert m.status()["logging"]
    w.begin()


def needed_no_more(w: Watched, step: str) -> Iterator[None]:
    m = w.machine
    m.unregister("oracle")
    yield
    off(m)
    m.register("oracle")
    w.begin()


def off(m: Machine) -> None:
    m.set_tracking("ring")
    until(lambda: not m.status()["logging"], "nobody needs it")


def tracking(w: Watched, step: str) -> Iterator[None]:
    yield
    w.machine.set_tracking("bitmap")
    assert w.machine.status()["tracking"] == "bitmap"
    w.look()
    w.machine.set_tracking("ring")


def tracking_again(w: Watched, step: str) -> Iterator[None]:
    w.machine.set_tracking("none")
    yield
    w.machine.set_tracking("ring")
    assert w.machine.status()["tracking"] == "ring"


def recording(w: Watched, step: str) -> Iterator[None]:
    path = Path(os.environ["VMM_STEPS"]).parent / "a.trace"
    yield
    end = record(w.machine, path, 0.1, 0.01)
    # What had not begun is begun again; what was over was over.
    assert end.complete == (step != "record-stop"), end.reason
    assert end.entries > 0 or not end.complete
    assert w.segments("record") == []


def pausing(w: Watched, step: str) -> Iterator[None]:
    yield
    w.machine.pause()
    assert w.machine.status()["state"] == "paused"
    still = w.machine.ram(0).copy()
    assert np.array_equal(still, w.machine.ram(0))
    w.machine.resume()


def resuming(w: Watched, step: str) -> Iterator[None]:
    w.machine.pause()
    yield
    w.machine.resume()
    assert w.machine.status()["state"] == "running"


def leasing(w: Watched, step: str) -> Iterator[None]:
    m = w.machine
    yield
    with m.lease("migration", "to the moon") as lease:
        with pytest.raises(VmmError, match="to the moon"):
            m.memory_add(2, PLUGGED, 64 << 10)
        lease.freeze()
        assert m.status()["state"] == "paused"
        with pytest.raises(VmmError, match="for the last time"):
            m.write(0x50_0000, b"x")
        lease.hand_over("the moon")
        assert m.status()["handed_over"] == "the moon"
        lease.take_back()
        lease.thaw()
    assert m.status()["state"] == "running"


def limiting(w: Watched, step: str) -> Iterator[None]:
    yield
    w.machine.dirty_limit(4000)
    assert [v["dirty_limit_pages_per_s"] for v in w.machine.status()["vcpus"]] == [4000] * 2
    w.machine.dirty_limit(0)


#: By what is being done: how, and at which of its steps (all, where none are named).
SCENARIOS: dict[str, list[tuple[Scenario, tuple[str, ...]]]] = {
    "any verb": [(adding, ()), (removing, ())],
    "journal": [(registering, ("journal-write",)), (removing, ("journal-written",))],
    "segment": [(registering, ("segment-empty",)), (adding, ("segment-sized",))],
    "register": [(registering_like, ())],
    "unregister": [(unregistering, ())],
    "sync": [(syncing, ()), (syncing_alone, ("sync-slot",))],
    "host write": [(writing, ())],
    "memory add": [(adding, ())],
    "memory remove": [(removing, ())],
    "log start, log stop": [(not_logging, ("log-committed",)), (logging, ())],
    "log on, log off": [(needed, ()), (needed_no_more, ())],
    "tracking": [(tracking, ()), (tracking_again, ("tracking-marked",))],
    "recording": [(recording, ())],
    "pause": [(pausing, ())],
    "resume": [(resuming, ())],
    "lease": [(leasing, ())],
    "freeze": [(leasing, ())],
    "hand over": [(leasing, ())],
    "dirty limit": [(limiting, ())],
}
#: What the workers do in it depends on the accelerator; the others are walked on one.
ON_EACH = ("memory add", "memory remove", "log start, log stop", "log on, log off", "tracking")
#: Walked by tests of their own: below, or in another file.
APART = {"start", "stop", "verification", "post-copy", "take-over"}
ELSEWHERE = {
    "snapshot create": "test_snapshot.py", "snapshot merge": "test_chain.py", "snapshot delete": "test_chain.py",
    "claiming a machine's name": "test_claims.py", "clearing what a machine has left": "test_claims.py",
    "ring rebuild": "test_lost_count.py", "dead ring": "test_lost_count.py",
    "a machine's life": "test_life.py", "migration, its source": "test_handover.py",
    "migration, its target": "test_handover.py", "upgrade": "test_upgrade.py",
    "an upgrade that is not finished": "test_upgrade.py",
    "a call of another process's thread": "test_injection.py",
    "lazy restore": "test_lazy_restore.py", "a hand-over that is not finished": "test_handover.py",
}
#: Steps that are reached only after a kill at another.
AFTER = {"sync-again": "sync-taken"}


def test_every_step_is_walked() -> None:
    assert set(SCENARIOS) | APART | set(ELSEWHERE) == set(STEPS)
    for group, file in ELSEWHERE.items():
        text = next(TESTS.rglob(file)).read_text()
        assert f'"{group}"' in text or all(f"{step}" in text for step in STEPS[group]), group


def batches(todo: list[tuple[Scenario, str]]) -> Iterator[list[tuple[Scenario, str]]]:
    """What one machine bears."""
    part: list[tuple[Scenario, str]] = []
    for each in todo:
        if sum(1 + (step in AFTER) for _, step in (*part, each)) > KILLS:
            yield part
            part = []
        part.append(each)
    yield part


ANY = "unicorn" if missing("kvm") else "kvm"


@pytest.mark.parametrize(("accel", "group"), [
    *(pytest.param("kvm", group, marks=pytest.mark.kvm) for group in ON_EACH),
    *(("unicorn", group) for group in ON_EACH), *((ANY, group) for group in SCENARIOS if group not in ON_EACH)])
def test_killed_at_each_step(accel: str, group: str, steps: Steps) -> None:
    todo = [(scenario, step) for scenario, some in SCENARIOS[group] for step in some or STEPS[group]]
    for part in batches(todo):
        with Machine.launch(busy(accel)) as machine:
            watched = Watched(machine)
            for scenario, step in part:
                where = f"{scenario.__name__} killed at {step}"
                before = watched.restarts()
                kills = [name for name in (AFTER.get(step), step) if name]
                acting = scenario(watched, step)
                next(acting)
                for name in kills:
                    steps.kill(name)
                with contextlib.suppress(StopIteration):
                    next(acting)
                assert steps.reached(), f"{where}: was not reached"
                expected = 0 if step.startswith("host-") else len(kills)
                assert watched.restarts() == before + expected, where
                watched.check()
            machine.stop()
            assert machine.wait(TIMEOUT)["exit_code"] == ExitCode.STOPPED


def test_killed_while_it_starts(steps: Steps) -> None:
    for step in STEPS["start"]:
        with Machine.launch(busy(ANY), start=False) as machine:
            watched = Watched(machine)
            steps.kill(step)
            machine.start()
            assert steps.reached()
            assert (watched.restarts(), machine.status()["state"]) == (1, "running")
            watched.check()


def test_killed_while_it_stops(steps: Steps) -> None:
    for step in STEPS["stop"]:
        with Machine.launch(busy(ANY)) as machine:
            steps.kill(step)
            machine.stop("of this test")
            report = machine.wait(TIMEOUT)
            assert steps.reached()
            assert report["exit_code"] == ExitCode.STOPPED
            assert report["cause"] == "stopped: of this test"
            assert [v["exit_reason"] for v in report["vcpus"]] == ["stopped"] * 2
            assert report["coordinator"]["restarts"] == 1


def test_killed_while_it_verifies(accel: str, steps: Steps) -> None:
    """The verifier's own rounds, which nobody asks for, and what it does when memory comes and goes."""
    with Machine.launch(busy(accel, verify=exact(0.05))) as machine:
        def rounds() -> int:
            return int(machine.status()["verification"]["rounds"])

        for step in STEPS["verification"]:
            steps.kill(step)
            until(steps.reached, step)
            before = rounds()
            until(lambda n=before: rounds() > n + 1, "rounds")
        steps.kill("memory-add-set")
        machine.memory_add(2, PLUGGED, 64 << 10)
        machine.write(PLUGGED, b"x" * 5000)
        before = rounds()
        until(lambda: rounds() > before + 1, "rounds")
        steps.kill("memory-remove-committed")
        machine.memory_remove(2)
        before = rounds()
        until(lambda: rounds() > before + 1, "rounds")
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert report["verification"]["lost_pages"] == 0, report["verification"]
        assert report["verification"]["surplus_pages"] == 0, report["verification"]
        assert report["exit_code"] == ExitCode.STOPPED


@pytest.mark.skipif(bool(missing("postcopy")), reason=missing("postcopy"))
def test_killed_while_pages_are_awaited(accel: str, steps: Steps, tmp_path: Path) -> None:
    """Each vCPU's userfaultfd comes to whoever asked, once at least, and all of them are the same."""
    listener = FdListener(tmp_path / "userfault")
    try:
        for part in (STEPS["post-copy"][:3], STEPS["post-copy"][3:]):
            with Machine.launch(busy(accel), start=False) as machine:
                for step in part:
                    steps.kill(step)
                    addresses = machine.incoming(str(listener.path))
                    assert len(addresses) == 2
                    came = set()
                    while len(came) < 2:
                        index, fd = listener.receive(TIMEOUT)
                        os.close(fd)
                        came.add(index)
                    assert machine.status()["incoming"] is True
                    machine.arrived()
                    assert steps.reached(), step
                    assert machine.status()["incoming"] is False
                watched = Watched(machine)
                assert watched.restarts() == len(part)
                machine.start()
                watched.check()
    finally:
        listener.close()


def test_killed_while_it_takes_over(steps: Steps) -> None:
    for part in (STEPS["take-over"][:2], STEPS["take-over"][2:]):
        with Machine.launch(busy(ANY)) as machine:
            watched = Watched(machine)
            for step in part:
                stray = Segment.create(segment_name(machine.name, "stray"), 4096)   # as one that was not finished
                stray._owner = False
                stray.close()
                before = watched.restarts()
                steps.kill(step)
                os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
                until(steps.reached, step)
                watched.check()
                # One that had not written down that it has taken over was never there.
                assert watched.restarts() == before + (1 if step == "take-over" else 2)
                assert watched.segments("stray") == []


# --- what cannot be written down, is not done ------------------------------------------------------------------


def described(m: Machine) -> Any:
    """What the verbs below change."""
    status = m.status()
    return status["clients"], status["tracking"], [(s["id"], s["logged"]) for s in status["slots"]]


def test_a_full_journal_refuses_and_nothing_is_done(accel: str, steps: Steps) -> None:
    """Each verb is refused in one line, leaves all as it was, and does it when there is room again."""
    with Machine.launch(busy(accel)) as machine:
        watched = Watched(machine)
        for act in (lambda: machine.register("second"), lambda: machine.unregister("second"),
                    lambda: machine.memory_add(2, PLUGGED, 64 << 10), lambda: machine.write(PLUGGED, b"x"),
                    lambda: machine.memory_remove(2), lambda: machine.log_stop(0), lambda: machine.log_start(0),
                    lambda: machine.set_tracking("none"), lambda: machine.set_tracking("ring"), machine.pause,
                    machine.resume, lambda: machine.dirty_limit(100_000)):
            before, state = described(machine), machine.status()["state"]
            segments = watched.segments("")
            steps.fail("journal-write", errno.ENOSPC)
            with pytest.raises(VmmError, match="journal cannot be written"):
                act()
            assert steps.reached()
            assert (described(machine), machine.status()["state"]) == (before, state)
            assert watched.segments("") == segments
            if before[1] != "none":
                watched.look()
            act()
        watched.check()
        assert watched.restarts() == 0


def test_full_shared_memory_refuses_and_nothing_is_done(accel: str, steps: Steps) -> None:
    with Machine.launch(busy(accel)) as machine:
        watched = Watched(machine)
        before, segments = described(machine), watched.segments("")
        for act, undo in ((lambda: machine.register("second"), lambda: machine.unregister("second")),
                          (lambda: machine.memory_add(2, PLUGGED, 64 << 10), lambda: machine.memory_remove(2))):
            for step in STEPS["segment"]:
                steps.fail(step, errno.ENOSPC)
                with pytest.raises(VmmError, match="/dev/shm is too small"):
                    act()
                assert described(machine) == before
                assert watched.segments("") == segments
            act()
            undo()
            watched.look()
            watched.look()      # what was told for the last time is forgotten
        watched.check()
