"""Machines that arrive paused, and those whose source is kept as a copy: who runs, and who never does by itself."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from machines import nothing_left, stands_still, until
from migrations import Receiver, ended, goes_on, touched, vmm

from ipc.steps import STEPS
from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import target as target_module
from vmm.consumers.migration.handover import load_hand_over
from vmm.consumers.migration.status import load_status
from vmm.errors import VmmError
from vmm.migrate import Options


def is_a_copy(machine: Machine) -> None:
    """It stands still, handed over, and nothing but force has it go on."""
    status = machine.status()
    assert status["state"] == "paused"
    assert status["handed_over"]
    assert not [client for client in status["clients"] if client.startswith("migrate")]
    assert stands_still(machine)
    with pytest.raises(VmmError, match="was handed over"):
        machine.resume()
    with pytest.raises(VmmError, match="was handed over"):
        migrate.migrate(machine, "ipc://@nobody")
    assert stands_still(machine)


@pytest.mark.parametrize("postcopy", [pytest.param(False, id="precopy"),
                                      pytest.param(True, id="postcopy", marks=pytest.mark.postcopy)])
def test_a_running_machine_arrives_paused_and_stands_still_until_it_is_resumed(postcopy: bool, running: Machine,
                                                                               address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    options = Options(paused=True, keep_source=True, postcopy=postcopy, downtime=1e-6 if postcopy else 0.3)
    with touched("source"):
        report = migrate.migrate(running, address, options)
    assert bool(report.ram.postcopy_pages) == postcopy
    with receiver.result() as moved:
        assert moved.status()["state"] == "paused"
        assert stands_still(moved)
        assert moved.ram(0).tobytes() == running.ram(0).tobytes()      # as it was handed over, and no guest ran since
        assert moved.resume() == []
        goes_on(moved)


def test_a_source_that_is_kept_stays_paused_while_the_target_runs(running: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    assert migrate.migrate(running, address, Options(keep_source=True)).status == "completed"
    with receiver.result() as moved:
        before = running.ram(0).tobytes()
        goes_on(moved)
        is_a_copy(running)
        assert running.ram(0).tobytes() == before
        moved.stop()
    until(lambda: nothing_left("target"), "the target's machine is gone")
    is_a_copy(running)
    assert running.resume(force=True) == []
    goes_on(running)
    with pytest.raises(VmmError, match="has not been handed over"):
        migrate.recover(running)
    again = Receiver(address, accel="unicorn")      # it is a machine like others
    migrate.migrate(running, address)
    with again.result() as moved:
        goes_on(moved)


AFTER = [s for s in STEPS["migration, its source"] if s in ("migrate-handed-over", "migrate-commit", "migrate-stop",
                                                            "migrate-done")]


@pytest.mark.parametrize("step", AFTER)
def test_a_source_killed_after_the_hand_over_is_kept_all_the_same(step: str, steps: Path, running: Machine,
                                                                  address: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that takes over keeps it too; and does not ask a target that has heard already."""
    if step == "migrate-done":      # nobody comes any more
        monkeypatch.setattr(target_module, "_HEARD", 1.0)
    receiver = Receiver(address, accel="unicorn")
    (steps / f"kill-{step}").touch()
    ended(vmm("migrate", "source", address, "--keep-source"), -signal.SIGKILL)
    with receiver.result() as moved:
        goes_on(moved)
        until(lambda: load_status("source")["status"] == "completed", "it is finished")
        assert load_hand_over("source").finished
        assert load_status("source")["rounds"], "what the first process counted is kept"
        known = bool(load_status("source")["downtime"])
        assert known == (step in ("migrate-stop", "migrate-done")), "and measured, if it had heard that it runs"
        assert ("downtime not known" in ended(vmm("migrate", "status", "source"))[0]) == (not known)
        until(lambda: not [h for h in running.status()["holders"] if h["what"] == "lease"], "it is nobody's")
        is_a_copy(running)
        goes_on(moved)
    assert not list(steps.iterdir())


def test_from_the_command_line(running: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    said, _ = ended(vmm("migrate", "source", address, "--paused", "--keep-source"))
    assert "source stays paused here" in said
    with receiver.result() as moved:
        assert stands_still(moved)
        is_a_copy(running)
        assert json.loads(ended(vmm("migrate", "status", "source", "--json"))[0])["status"] == "completed"
        ended(vmm("stop", "source"))
        ended(vmm("resume", "target"))
        goes_on(moved)
