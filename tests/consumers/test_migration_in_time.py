"""Migrations that are to be over in time: a limit, a stall, what comes then, and what is said of it before. Real
machines whose memory is dirtied all the time."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from machines import nothing_left, spec, until
from migrations import TIMEOUT, PlayedTarget, Receiver, ended, goes_on, touched, vmm

from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.consumers.migration.control import change
from vmm.consumers.migration.status import load_status
from vmm.consumers.migration.steering import Changes
from vmm.errors import ExitCode, VmmError
from vmm.migrate import MigrationError, Options

WALK = spec("sequential", accel="unicorn", name="source", mib=16, passes=0, spin=50, timeout=None)
#: Nothing fits into this downtime, and there is no end of rounds: without a limit it would go on for ever.
ENDLESS: dict[str, Any] = {"downtime": 1e-9, "max_rounds": 1000, "converge": False}


@pytest.fixture
def busy() -> Iterator[Machine]:
    with Machine.launch(WALK) as machine, touched("source"):
        yield machine


@pytest.mark.parametrize("limit", [{"timeout": 6.0}, {"stall": 1.0}], ids=["time limit", "stall"])
def test_given_up_in_time_the_machine_goes_on_here(limit: dict[str, float], busy: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    with pytest.raises(MigrationError, match=r"not handed over within 6 s|has left less than another") as failure:
        migrate.migrate(busy, address, Options(**ENDLESS, **limit))
    assert failure.value.exit_code == ExitCode.MIGRATION_FAILED
    found = load_status("source")
    assert (found["status"], found["error"]) == ("failed", str(failure.value))
    assert len(found["rounds"]) > 1
    assert found["forecast"] is not None
    goes_on(busy)
    assert "the source gave up" in receiver.failure()
    goes_on(busy)


@pytest.mark.parametrize("options", [
    {"timeout": 2.0, **ENDLESS}, {"stall": 1.0, **ENDLESS}, {"timeout": 1.0, "bandwidth": 4e6, "downtime": 1e-9}],
    ids=["time limit", "stall", "in the first round"])
@pytest.mark.parametrize("action", ["force", pytest.param("postcopy", marks=pytest.mark.postcopy)])
def test_brought_to_an_end_in_time_the_machine_goes_on_there(action: Any, options: dict[str, Any], busy: Machine,
                                                             address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    report = migrate.migrate(busy, address, Options(on_timeout=action, paused=True, keep_source=True, **options))
    with receiver.result() as moved:
        assert report.status == "completed"
        assert bool(report.ram.postcopy_pages) == (action == "postcopy")
        assert moved.ram(0).tobytes() == busy.ram(0).tobytes()
        if "timeout" in options:
            assert f"not handed over within {options['timeout']:g} s" in report.warnings[0]
        moved.resume()
        goes_on(moved)


def test_a_target_that_takes_its_time_is_not_waited_for_longer(busy: Machine, address: str) -> None:
    """The limit counts from the beginning, and up to the hand-over: while the memory is made there, while the guest
    stands still; from then on the machine is the target's, however long it takes."""
    for silent in (wire.Offer, wire.RoundEnd, wire.State):
        reply = [wire.Received()] if silent is wire.Offer else []
        with PlayedTarget(address, {silent: reply}) as target:
            began = time.monotonic()
            with pytest.raises(MigrationError, match="not handed over within 1 s"):
                migrate.migrate(busy, address, Options(timeout=1.0))
            assert time.monotonic() - began < 6.0
            assert not target.has(wire.Commit)
        goes_on(busy)
    late: list[float] = []

    def answer(message: wire.Wire) -> list[wire.Wire]:
        late.append(time.monotonic())
        return [wire.Running()] if late[-1] - late[0] > 2.0 else []

    with PlayedTarget(address, {wire.Commit: answer}):
        report = migrate.migrate(busy, address, Options(timeout=1.0, max_rounds=1))
    assert report.status == "completed"
    assert report.total_time > 2000


def test_a_limit_can_be_moved_while_it_goes_on(busy: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--downtime", "1us", "--max-rounds", "1000", "--no-converge")
    until(lambda: _rounds() > 1, "rounds go on", TIMEOUT)
    text = "".join(ended(vmm("migrate", "status", "source")))
    assert re.search(r"; does not converge: .* MB/s can be sent|; converges in about \d+ s", text)
    change("source", Changes(timeout=0.5, on_timeout="force"))
    assert "the guest was stopped for the rest" in "".join(ended(source))
    with receiver.result() as moved:
        goes_on(moved)


def test_the_forecast_is_of_the_cap_there_is_now(busy: Machine, address: str) -> None:
    """Soon after it was lowered, in a round of minutes; and once it was raised, no longer of the lower one."""
    def can_be_sent() -> float | None:
        forecast = load_status("source")["forecast"]
        return None if forecast is None else forecast["rate"]

    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--downtime", "1us", "--max-rounds", "1000", "--no-converge",
                 "--bandwidth", "8MB/s")
    until(lambda: _rounds() > 0 and can_be_sent() is not None, "a round is over", TIMEOUT)
    change("source", Changes(bandwidth=100e3))
    until(lambda: (can_be_sent() or 1.0) <= 0.1, "it is of the lower cap")
    lowered = _rounds()
    change("source", Changes(bandwidth=50e6))
    until(lambda: _rounds() > lowered, "the round has ended for it")
    assert (can_be_sent() or 50.0) > 0.1
    change("source", Changes(downtime=10.0))
    ended(source)
    with receiver.result() as moved:
        goes_on(moved)


def _rounds() -> int:
    with contextlib.suppress(VmmError):
        return len(load_status("source")["rounds"])
    return 0


def test_a_guest_that_dirties_little_converges_and_that_is_said(address: str) -> None:
    """Before it has: in the first round's report, whose end is the only one before the last. (Under a cap, so that
    there is more than one.)"""
    walk = spec("sequential", accel="unicorn", name="source", mib=16, passes=0, spin=3000, timeout=None)
    with Machine.launch(walk) as machine:
        machine.write(4 << 20, bytes(range(1, 256)) * (8 << 12))
        machine.dirty_limit(50)
        receiver = Receiver(address, accel="unicorn")
        said: list[dict[str, Any]] = []

        def meanwhile(report: migrate.Report) -> None:
            if report.forecast is not None and (not said or said[-1] != report.forecast):
                said.append(dict(report.forecast))

        report = migrate.migrate(machine, address, Options(bandwidth=4e6, downtime=0.1), progress=meanwhile)
        assert said[0]["converges"]
        assert said[0]["rate"] == pytest.approx(4, rel=0.5)
        assert len(report.rounds) <= said[0]["rounds"] + 4
        receiver.result().close()


@pytest.mark.parametrize("arguments", [("--timeout", "0"), ("--timeout", "-1s"), ("--on-timeout", "explode"),
                                       ("--stall", "soon")])
def test_limits_that_are_none(arguments: tuple[str, str], address: str) -> None:
    ended(vmm("migrate", "source", address, *arguments), ExitCode.BAD_INPUT)
    assert nothing_left("source")
