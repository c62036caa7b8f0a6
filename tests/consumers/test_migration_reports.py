"""What is kept of a migration at both ends, and what is told of it while it goes on. The oracles are the other end,
and the machine's own figures."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from machines import nothing_left, until
from migrations import (
    TIMEOUT,
    WALK,
    PlayedSource,
    PlayedTarget,
    Receiver,
    ended,
    goes_on,
    receiver_process,
    touched,
    vmm,
)

from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.consumers.migration.pages import PAGE
from vmm.consumers.migration.status import load_status
from vmm.errors import ExitCode, VmmError
from vmm.migrate import Options


def status(name: str) -> dict[str, Any]:
    """As ``vmm migrate status`` prints it."""
    return dict(json.loads(ended(vmm("migrate", "status", name, "--json"))[0]))


#: Of a round, what both ends know alike.
ALIKE = ("pages", "zero", "transferred")
#: Of all of it.
COUNTED = ("total", "remaining", "transferred", "duplicate", "normal", "normal_bytes", "resent", "dirty_sync_count",
           "postcopy_requests", "postcopy_pages")
#: Of the downtime, one after the other.
PARTS = ["pause", "sync", "pages", "state", "hand_over", "start"]


@pytest.mark.parametrize("postcopy", [pytest.param(False, id="precopy"),
                                      pytest.param(True, id="postcopy", marks=pytest.mark.postcopy)])
def test_both_ends_have_the_report_afterwards_and_agree(postcopy: bool, running: Machine, address: str) -> None:
    """While the machines run, and when both have ended."""
    receiver = Receiver(address, accel="unicorn")
    with touched("source"):
        report = migrate.migrate(running, address, Options(
            postcopy=postcopy, downtime=1e-6, max_rounds=3, keep_source=True), migration_id="abc")
    with receiver.result() as moved:
        there, here = status("target"), status("source")
        moved.stop()
    running.stop()
    running.close()
    until(lambda: nothing_left("source") and nothing_left("target"), "both have gone")
    assert (status("target"), status("source")) == (there, here)
    assert (here["direction"], there["direction"]) == ("outgoing", "incoming")
    assert here == json.loads(json.dumps(report.as_dict()))
    for found in (here, there):
        assert found["id"] == "abc"
        assert found["status"] == "completed"
        assert found["began_at"] <= found["ended_at"]
        assert len(found["rounds"]) == found["ram"]["dirty_sync_count"] == (1 if postcopy else 4)
        assert sum(each["pages"] for each in found["rounds"]) >= WALK.slots[0].pages - here["ram"]["duplicate"]
    for one, other in zip(here["rounds"], there["rounds"], strict=True):
        assert [one[key] for key in ALIKE] == [other[key] for key in ALIKE]
        assert one["pages"] * PAGE >= one["transferred"] - one["pages"] * 64    # and what numbers and headers take
    assert (there["machine"], there["source"]) == ("target", "source")
    for what in COUNTED:
        assert there["ram"][what] == here["ram"][what], what
    assert (there["downtime"], there["downtime_parts"]) == (here["downtime"], here["downtime_parts"])
    text = ended(vmm("migrate", "status", "target"))[0]
    assert f"target from source at {there['target']}" in text
    assert "dirtied MB/s" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == [
        str(n) for n in range(1, len(here["rounds"]) + 1)]


@pytest.mark.parametrize("in_place", [False, True])
def test_when_it_is_over_nothing_remains_and_the_downtime_has_parts(in_place: bool, running: Machine,
                                                                    address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    migrate.migrate(running, address, Options(in_place=in_place))
    with receiver.result():
        there, here = status("target"), status("source")
        text = ended(vmm("migrate", "status", "target"))[0]
    for found in (here, there):
        parts, ram = found["downtime_parts"], found["ram"]
        assert list(parts) == [part for part in PARTS if not (in_place and part in ("sync", "pages"))]
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(found["downtime"])
        assert found["setup_time"] + found["downtime"] <= here["total_time"]
        assert ram["remaining"] == 0
        assert ram["mbps"] == pytest.approx(ram["transferred"] * 8 / 1000 / (found["total_time"] - found["setup_time"]))
        assert bool(ram["mbps"]) == (not in_place)
    stopped = sum(each["seconds"] for each in here["rounds"] if each["left"] is None)
    assert here["downtime_parts"].get("pages", 0) >= stopped * 1000 - 0.1      # the round's is rounded
    assert "100 % of memory is there, 0 MiB left" in text
    assert f"start {there['downtime_parts']['start']:,.1f} ms" in text


def test_a_target_that_is_slow_is_found_in_the_parts_of_the_downtime(running: Machine, address: str) -> None:
    """Where it is slow is where the time is."""
    def slow(seconds: float, answer: wire.Wire) -> Any:
        return lambda message: (time.sleep(seconds), [answer])[1]

    with PlayedTarget(address, {wire.State: slow(0.3, wire.Prepared()), wire.Commit: slow(0.2, wire.Running())}):
        parts = migrate.migrate(running, address).downtime_parts
    assert parts["state"] >= 300
    assert parts["start"] >= 200


def test_the_guest_does_not_stand_still_for_a_machine_that_is_still_being_made(running: Machine, address: str) -> None:
    states: list[str] = []

    def late(message: wire.Wire) -> list[wire.Wire]:
        with Machine.attach("source") as source:
            states.append(source.status()["state"])
        return [wire.Ready()]

    with PlayedTarget(address, {wire.WhenReady: late}):
        migrate.migrate(running, address)
    assert states == ["running"]


def test_rounds_say_what_was_dirtied_and_what_was_left(running: Machine, address: str) -> None:
    """What one leaves the next sends; while the guest stands still nothing is left."""
    receiver = Receiver(address, accel="unicorn")
    with touched("source"):
        report = migrate.migrate(running, address, Options(downtime=1e-6, max_rounds=4, converge=False))
    *before, last = report.rounds
    for one, following in itertools.pairwise(before):
        assert one.left == following.pages
    assert all(each.dirtied is not None for each in before)
    assert any(each.dirtied for each in before)
    assert last.left is None
    assert last.pages >= before[-1].left > 0
    receiver.result().close()


def test_a_migration_that_failed_is_known_at_both_ends_and_the_next_replaces_it(running: Machine,
                                                                                address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "1MB/s")
    until(lambda: _state("target") == "active", "it is arriving, and says so", TIMEOUT)
    _, err = ended(vmm("migrate", "cancel", "target"), ExitCode.BAD_INPUT)
    assert "is arriving here: cancel that where it comes from" in err
    ended(vmm("migrate", "cancel", "source"))
    ended(source, 128 + signal.SIGINT)
    why = receiver.failure()
    assert status("source")["status"] == "cancelled"
    there = status("target")
    assert (there["status"], there["error"]) == ("failed", why)
    again = Receiver(address, accel="unicorn")
    migrate.migrate(running, address)
    with again.result() as moved:
        goes_on(moved)
        assert status("target")["status"] == status("source")["status"] == "completed"
        _, err = ended(vmm("migrate", "cancel", "target"), ExitCode.BAD_INPUT)
        assert "it came here from" in err


def _state(name: str) -> str:
    with contextlib.suppress(VmmError):
        return str(load_status(name)["status"])
    return ""


def test_a_receiver_that_is_killed_is_a_migration_that_failed(running: Machine, address: str) -> None:
    process = receiver_process(address, "--accel", "unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "100kB/s")
    until(lambda: _state("source") == "active" and load_status("source")["ram"]["transferred"] > 0, "pages are sent",
          TIMEOUT)
    assert _state("target") == "active"
    process.kill()
    process.communicate()
    ended(source, ExitCode.MIGRATION_FAILED)
    with contextlib.suppress(VmmError):     # gone with its machine, or kept
        assert load_status("target")["status"] == "failed"
    goes_on(running)


def test_what_a_source_calls_itself_is_shown_in_one_line(address: str) -> None:
    """It is a stranger's text, and goes to a terminal."""
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as one:
        one.offered(WALK, id="a\x1b[2J\n" * 100)
        found = load_status("target")
        assert found["id"].isprintable()
        assert len(found["id"]) < 100
        one.say(wire.Abort("that is all"))
    receiver.failure()


def test_json_lines_are_progress_then_rounds_then_the_report(running: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    with touched("source"):
        out, _ = ended(vmm("migrate", "source", address, "--json-lines", "--bandwidth", "20MB/s", "--downtime", "1us",
                           "--max-rounds", "3", "--keep-source"))
    lines = [json.loads(line) for line in out.splitlines()]
    end = lines.pop()
    assert end.pop("event") == "end"
    assert end == status("source")
    rounds = [line for line in lines if line["event"] == "round"]
    assert [line["round"] for line in rounds] == list(range(len(end["rounds"])))
    assert {line["event"] for line in lines} == {"progress", "round"}
    progress = [line for line in lines if line["event"] == "progress"]
    assert "rounds" not in progress[0]
    sent = [line["ram"]["transferred"] for line in progress]
    assert sent == sorted(sent)
    assert sent[-1] > 0
    receiver.result().close()


@pytest.mark.parametrize("how", ["gone", "never reads"])
def test_who_does_not_read_the_progress_holds_nothing_up(how: str, running: Machine, address: str) -> None:
    """Neither before nor after the hand-over; a pipe holds far less than what is said."""
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--json-lines", "--bandwidth", "5MB/s", "--downtime", "1us",
                 "--max-rounds", "5", "--no-converge")
    assert source.stdout is not None
    if how == "gone":
        assert source.stdout.readline()
        source.stdout.close()
    with touched("source"), receiver.result() as moved:
        goes_on(moved)
    until(lambda: running.status()["state"] == "ended", "the source has ended")
    ended(source)


def test_a_migration_that_is_refused_leaves_the_report_of_the_one_that_has_the_machine(running: Machine, address: str,
                                                                                       runtime_dir: Path) -> None:
    receiver = Receiver(address, accel="unicorn")
    seen: list[str] = []

    def meanwhile(report: migrate.Report) -> None:
        if report.status == "active" and not seen:
            with Machine.attach("source") as other, pytest.raises(VmmError, match="is being migrated"):
                migrate.migrate(other, f"ipc://{runtime_dir}/other", migration_id="second")
            seen.append(load_status("source")["id"])

    migrate.migrate(running, address, migration_id="first", progress=meanwhile)
    assert seen == ["first"]
    assert load_status("source")["id"] == "first"
    receiver.result().close()
