"""What is said of a machine that has moved, at both ends and afterwards."""

from __future__ import annotations

from machines import until
from migrations import TIMEOUT, WALK, Receiver, ended, vmm

from vmm import migrate
from vmm.client.machine import Machine
from vmm.machine.log import read_log
from vmm.machine.records import log_path, outcome
from vmm.migrate import Options


def said(name: str) -> list[str]:
    return [line.text for line in read_log(log_path(name))]


def test_a_machine_that_has_moved_says_where_it_went_and_where_it_came_from(address: str) -> None:
    with Machine.launch(WALK, detach=True) as machine:
        receiver = Receiver(address, accel="unicorn")
        report = migrate.migrate(machine, address)
        with receiver.result() as moved:
            cause = f"migrated to {address} (migration {report.id})"
            found = machine.wait(TIMEOUT)
            assert (found["cause"], found["exit_code"]) == (cause, 8)
            machine.release()
            until(lambda: outcome("source") is not None, "it is gone")
            assert f"ended exit_code=8 cause={cause}" in said("source")
            listed, _ = ended(vmm("list", "--all", "--json"))
            assert cause in listed
            _, gone = ended(vmm("stop", "source"), 7)
            assert f"is no longer running: {cause}" in gone
            assert f"it arrives by migration from machine 'source' (migration {report.id})" in said("target")
            moved.stop()
            assert moved.wait(TIMEOUT)["cause"] == "stopped on request"


def test_a_copy_that_is_kept_is_stopped_by_its_user(address: str) -> None:
    with Machine.launch(WALK) as machine:
        receiver = Receiver(address, accel="unicorn")
        report = migrate.migrate(machine, address, Options(keep_source=True))
        with receiver.result():
            machine.stop()
            assert machine.wait(TIMEOUT)["cause"] == (
                f"stopped on request, after it was handed over to {address} (migration {report.id})")
