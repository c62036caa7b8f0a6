"""Who runs a machine when one of those who move it dies, step by step: never two, never none (docs/protocol.md has
the table)."""

from __future__ import annotations

import signal
import subprocess
import threading
from pathlib import Path

import pytest
from machines import nothing_left, until
from migrations import TIMEOUT, WALK, PlayedTarget, Receiver, Relay, goes_on, receiver_process, vmm

from ipc.steps import STEPS
from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import source as source_module
from vmm.consumers.migration import target as target_module
from vmm.consumers.migration import wire
from vmm.errors import ExitCode, VmmError
from vmm.migrate import MigrationError, Options


class Watch(threading.Thread):
    """Looks all the time whether both machines run. The target's first, and again at the end: if one of them runs that
    did not stand still in between, and the source's does meanwhile, they run together."""

    def __init__(self, target: str = "target") -> None:
        super().__init__(daemon=True)
        self._target = target
        self._over = threading.Event()
        self.both = False
        self.start()

    def run(self) -> None:
        attached: dict[str, Machine] = {}
        while not self._over.wait(0.02):
            self.both |= all(self._runs(name, attached) for name in (self._target, "source", self._target))
        for machine in attached.values():
            machine.detach()

    @staticmethod
    def _runs(name: str, attached: dict[str, Machine]) -> bool:
        try:
            if name not in attached:
                attached[name] = Machine.attach_pinned(name)
            return str(attached[name].status()["state"]) == "running"
        except VmmError:
            if name in attached:
                attached.pop(name).detach()
            return False

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._over.set()
        self.join()
        if kind is None:
            assert not self.both, "both ran"


def works(machine: Machine) -> None:
    machine.register("after")
    until(lambda: machine.sync("after").pages > 0, "the guest dirties pages")


def killed(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL, (process.returncode, out, err)


SOURCE_STEPS = STEPS["migration, its source"]
BEFORE = SOURCE_STEPS[:SOURCE_STEPS.index("migrate-handed-over")]
AFTER = SOURCE_STEPS[SOURCE_STEPS.index("migrate-handed-over"):]


@pytest.mark.parametrize("more", [(), ("--in-place",)], ids=["copied", "in place"])
@pytest.mark.parametrize("step", BEFORE)
def test_a_source_that_is_killed_before_the_hand_over_leaves_the_machine_running(
        step: str, more: tuple[str, ...], steps: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "_UNDECIDED", 1.0)
    monkeypatch.setattr(target_module, "_HEARD", 1.0)
    with Machine.launch(WALK) as machine, Watch():
        receiver = Receiver(address, accel="unicorn")
        (steps / f"kill-{step}").touch()
        killed(vmm("migrate", "source", address, *more))
        goes_on(machine)
        assert "source" in receiver.failure()
        goes_on(machine)


@pytest.mark.parametrize("more", [
    pytest.param((), id="precopy"), pytest.param(("--in-place",), id="in place"),
    pytest.param(("--postcopy", "--downtime", "1us"), id="postcopy", marks=pytest.mark.postcopy)])
@pytest.mark.parametrize("step", AFTER)
def test_a_source_that_is_killed_after_the_hand_over_is_replaced(
        step: str, more: tuple[str, ...], steps: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if step == "migrate-done":      # nobody comes any more
        monkeypatch.setattr(target_module, "_HEARD", 1.0)
    with Machine.launch(WALK) as machine, Watch():
        receiver = Receiver(address, accel="unicorn")
        (steps / f"kill-{step}").touch()
        killed(vmm("migrate", "source", address, *more))
        with receiver.result() as moved:
            works(moved)
            until(lambda: machine.status()["state"] == "ended", "the source's machine has ended")


def test_whoever_takes_over_from_a_killed_source_may_be_killed_too(steps: Path, address: str) -> None:
    with Machine.launch(WALK) as machine, Watch():
        receiver = Receiver(address, accel="unicorn")
        (steps / "kill-migrate-handed-over").touch()
        (steps / "kill-migrate-commit").touch()
        (steps / "kill-migrate-stop").touch()
        killed(vmm("migrate", "source", address))
        with receiver.result() as moved:
            works(moved)
            until(lambda: machine.status()["state"] == "ended", "the source's machine has ended")
    assert not list(steps.iterdir())


@pytest.mark.parametrize("step", STEPS["a hand-over that is not finished"])
def test_a_hand_over_is_finished_though_whoever_sees_to_it_is_killed(step: str, steps: Path, address: str) -> None:
    """The source's coordinator, when it has noted that the source is gone; the process that it begins, before that
    has its lease."""
    with Machine.launch(WALK) as machine, Watch():
        receiver = Receiver(address, accel="unicorn")
        (steps / "kill-migrate-handed-over").touch()
        (steps / f"kill-{step}").touch()
        killed(vmm("migrate", "source", address))
        with receiver.result() as moved:
            works(moved)
            until(lambda: machine.status()["state"] == "ended", "the source's machine has ended")
    assert not list(steps.iterdir())


@pytest.mark.parametrize("step", [*STEPS["lease"], *STEPS["freeze"], *STEPS["hand over"], "pause-noted"])
def test_a_coordinator_that_is_killed_in_the_hand_over_is_replaced(step: str, steps: Path, address: str) -> None:
    """The source's. The migration goes on with the next."""
    with Machine.launch(WALK) as machine, Watch():
        receiver = Receiver(address, accel="unicorn")
        (steps / f"kill-{step}").touch()
        migrate.migrate(machine, address)
        assert not list(steps.iterdir()), "nobody was killed"
        with receiver.result() as moved:
            works(moved)


@pytest.mark.parametrize("detach", [False, True], ids=["foreground", "detach"])
@pytest.mark.parametrize("step", STEPS["migration, its target"])
def test_a_receiver_that_is_killed_after_commit_leaves_the_source_to_a_person(
        step: str, detach: bool, steps: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at the source can know whether the machine had begun there: it stays paused, and says so."""
    monkeypatch.setattr(source_module, "_NOBODY_PATIENCE", 1.0)
    runs_there = detach and step == "receive-started"
    with Machine.launch(WALK) as machine:
        with Watch():
            (steps / f"kill-{step}").touch()
            process = receiver_process(address, "--accel", "unicorn", *(["--detach"] if detach else []))
            with pytest.raises(MigrationError, match="was handed over and stays paused here") as failure:
                migrate.migrate(machine, address)
            killed(process)
            assert "vmm resume source --force" in str(failure.value)
            assert machine.status()["state"] == "paused"
            if runs_there:
                with Machine.attach("target") as moved:
                    works(moved)
                    moved.stop()
            until(lambda: nothing_left("target"), "the target's machine is gone")
        with pytest.raises(VmmError, match="was handed over"):
            machine.resume()
        with pytest.raises(MigrationError, match="no receiver is listening there"):
            migrate.recover(machine)
        with pytest.raises(VmmError, match="was handed over"):
            migrate.migrate(machine, address)
        machine.resume(force=True)
        goes_on(machine)
        with pytest.raises(VmmError, match="has not been handed over"):
            migrate.recover(machine)


@pytest.mark.parametrize("detach", [False, True], ids=["foreground", "detach"])
def test_a_receiver_that_is_killed_before_commit_leaves_nothing(detach: bool, address: str) -> None:
    """At any moment of pre-copy, and the machine that was arriving goes with it."""
    process = receiver_process(address, "--accel", "unicorn", *(["--detach"] if detach else []))

    def kill_soon(report: migrate.Report) -> None:
        if report.status == "active":
            process.kill()

    with Machine.launch(WALK) as machine:
        with pytest.raises(MigrationError):
            migrate.migrate(machine, address, Options(bandwidth=2e6), progress=kill_soon)
        killed(process)
        goes_on(machine)
        until(lambda: nothing_left("target"), "the target's machine is gone")


def test_a_refusal_at_the_last_moment_gives_the_machine_back(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target cannot start it, ends it, and then says so."""
    receiver = Receiver(address, accel="unicorn")
    with Machine.launch(WALK) as machine, Watch():
        seen: list[str] = []

        def refuse_to_start(machine: Machine) -> None:
            raise VmmError("its coordinator did not answer within 30 s")

        def watch(report: migrate.Report) -> None:
            if report.status == "device" and not seen:
                seen.append(report.status)
                monkeypatch.setattr(Machine, "start", refuse_to_start)

        with pytest.raises(MigrationError, match="refused at the last moment: its coordinator did not answer"):
            migrate.migrate(machine, address, progress=watch)
        goes_on(machine)
        assert "did not answer" in receiver.failure()


def test_a_connection_that_breaks_at_the_hand_over_is_made_anew(address: str, runtime_dir: Path) -> None:
    receiver = Receiver(address, accel="unicorn")
    with Relay(receiver.at, runtime_dir / "relay") as relay, Machine.launch(WALK) as machine, Watch():

        def watch(report: migrate.Report) -> None:
            if report.status == "handed-over" and not broken:
                broken.append(True)
                relay.broken()

        broken: list[bool] = []
        assert migrate.migrate(machine, relay.address, progress=watch).status == "completed"
        assert broken
        with receiver.result() as moved:
            works(moved)


def test_nothing_cancels_a_machine_that_was_handed_over(address: str) -> None:
    """Neither a signal nor the verb: both say so. The target takes its time to answer."""
    answer = threading.Event()
    with (Machine.launch(WALK) as machine,
          PlayedTarget(address, {wire.Commit: lambda m: [wire.Running()] if answer.is_set() else []}) as target):
        source = vmm("migrate", "source", address)
        until(lambda: target.has(wire.Commit), "handed over", TIMEOUT)
        cancel = vmm("migrate", "cancel", "source")
        assert "can no longer be cancelled" in cancel.communicate(timeout=TIMEOUT)[1]
        assert cancel.returncode == ExitCode.BAD_INPUT
        source.send_signal(signal.SIGINT)
        source.send_signal(signal.SIGTERM)
        assert source.stderr is not None
        assert "can no longer be cancelled" in source.stderr.readline()
        assert machine.status()["state"] == "paused"
        answer.set()
        source.communicate(timeout=TIMEOUT)
        assert source.returncode == 0
        until(lambda: machine.status()["state"] == "ended", "the source's machine has ended")
        assert target.has(wire.Done)
