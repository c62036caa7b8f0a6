"""What a machine's actor does on its host, without Ray: its machine, its snapshots, and what it leaves alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import vmm
from machines import nothing_left, runs, spec, until
from test_fleet import ACCEL, fleet_file, granted

from vmm.client.machine import Machine
from vmm.consumers.snapshot import Damaged, Manifest, SnapshotError, list_snapshots, survey
from vmm.errors import ExitCode, VmmError
from vmm.fleet import snapshots as keeping
from vmm.fleet.config import Snapshots, Wanted, load_fleet
from vmm.fleet.lease import Lease
from vmm.fleet.resident import Resident
from vmm.fleet.snapshots import Keeping, NoSnapshot
from vmm.machine.runtime import is_running

NAME = "web-0"


def one(folder: Path, **options: Any) -> Wanted:
    (wanted,) = load_fleet(fleet_file(folder, count=1, **options))
    return wanted


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A user's own, of the name that one of a fleet has."""
    with Machine.launch(spec("random", accel=ACCEL, name=NAME, timeout=None, writes=0, spin=5000)) as found:
        yield found


def test_a_users_own_machine_of_that_name_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    resident = Resident(one(tmp_path), 1, granted)
    with pytest.raises(VmmError, match=f"a machine named '{NAME}' is already running"):
        resident.launch()
    assert resident.status()["report"] is None
    for ask in (resident.ready, resident.keep, resident.handed_over, resident.reclaim, resident.arrive):
        with pytest.raises(VmmError, match="is not at its host") as caught:
            ask()
        assert caught.value.exit_code == ExitCode.NO_MACHINE
    resident.stop()
    assert runs(machine)
    assert not (tmp_path / "chains").exists()       # and a start that failed leaves no snapshots


def test_a_machine_that_has_no_snapshot_is_not_restored(tmp_path: Path) -> None:
    """For good, unless its host has no folder of snapshots: another may have it."""
    resident = Resident(one(tmp_path), 1, granted)
    with pytest.raises(VmmError, match="chains: is not there") as caught:
        resident.restore()
    assert not isinstance(caught.value, NoSnapshot)
    (tmp_path / "chains").mkdir()
    with pytest.raises(NoSnapshot, match="machine 'web-0' has no snapshot"):
        resident.restore()
    resident.stop()


def test_what_goes_wrong_is_said_as_an_error_of_the_fleets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray can carry no others for certain."""
    def broken(config: Any) -> Machine:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(Machine, "launch", broken)
    resident = Resident(one(tmp_path), 1, granted)
    with pytest.raises(VmmError, match="ZeroDivisionError: by") as caught:
        resident.launch()
    assert type(caught.value) is VmmError
    resident.stop()


def test_a_machine_of_a_fleet_is_not_upgraded(tmp_path: Path) -> None:
    """Its new processes would not end with its actor."""
    resident = Resident(one(tmp_path, snapshots=False), 1, granted)
    resident.launch()
    try:
        done = vmm("upgrade", NAME)
        assert done.returncode == 2
        assert "cannot be upgraded: it is a fleet's" in done.stderr
        with Machine.attach(NAME) as machine:
            assert runs(machine)
    finally:
        resident.stop()
    assert nothing_left(NAME)


#: A process that has the machine of the file of a fleet, and its lease until there is another file.
HAS_A_MACHINE = """
import sys, threading
from dataclasses import replace
from pathlib import Path
from vmm.fleet.config import load_fleet
from vmm.fleet.resident import Resident

(wanted,) = load_fleet(Path(sys.argv[1]))
wanted = replace(wanted, snapshots=replace(wanted.snapshots, lease=4.0))
Resident(wanted, 1, lambda name, generation, timeout: not Path(sys.argv[2]).exists()).launch()
threading.Event().wait()
"""


def test_a_machine_whose_lease_is_over_ends_at_once(tmp_path: Path) -> None:
    """Even when it cannot end in order."""
    over = tmp_path / "over"
    with subprocess.Popen([sys.executable, "-c", HAS_A_MACHINE, fleet_file(tmp_path, count=1), over]) as process:
        try:
            until(lambda: is_running(NAME), "it is there", 60.0)
            with Machine.attach(NAME) as machine:
                until(lambda: runs(machine), "it runs")
                pid = machine.status()["coordinator"]["pid"]
            os.kill(pid, signal.SIGSTOP)
            over.touch()
            assert process.wait(30.0) == 1
            until(lambda: not is_running(NAME), "it has ended", 10.0)       # a keeper gives it 20 s to end in order
            until(nothing_left_of_it, "nothing is left")
        finally:
            process.kill()


def nothing_left_of_it() -> bool:
    return nothing_left(NAME)


def test_a_request_for_a_lease_that_hangs_leaves_time_for_others() -> None:
    over, hung, renewed = threading.Event(), threading.Event(), threading.Event()

    def ask(timeout: float) -> bool:
        if lease_begun.is_set() and not hung.is_set():
            hung.set()
            threading.Event().wait(timeout)
            raise TimeoutError
        if hung.is_set():
            renewed.set()
        lease_begun.set()
        return True

    lease_begun = threading.Event()
    lease = Lease(2.0, ask, over.set)
    try:
        assert renewed.wait(30.0)
        assert not over.is_set()
    finally:
        lease.give_up()


# --- snapshots ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(machine: Machine, tmp_path: Path) -> Iterator[Callable[[], Keeping]]:
    """Begins to take snapshots of it, into the folder ``chain``; each ends with the test."""
    began = []

    def begin() -> Keeping:
        began.append(Keeping(NAME, Snapshots(tmp_path / "chain", 0.1, 50, 10.0), threading.Lock()))
        return began[-1]

    yield begin
    for each in began:
        each.end()


def test_a_whole_snapshot_takes_the_place_of_a_chain_that_is_damaged(
        kept: Callable[[], Keeping], tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    first = kept()
    until(lambda: chain.exists() and len(list_snapshots(chain)) >= 2, "snapshots")
    first.end()
    (chain / survey(chain)[-1].id / "manifest.json").write_text("{")
    damaged = survey(chain)[-1]
    assert isinstance(damaged, Damaged)
    kept()
    until(lambda: survey(chain)[0].id > damaged.id, "another chain")
    found = survey(chain)
    assert all(isinstance(each, Manifest) for each in found)
    assert [each.parent is None for each in found if isinstance(each, Manifest)].count(True) == 1


def test_a_snapshot_that_cannot_be_written_is_no_reason_for_a_whole_one(
        kept: Callable[[], Keeping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = tmp_path / "chain"
    first = kept()
    until(lambda: chain.exists() and bool(list_snapshots(chain)), "a snapshot")
    first.end()
    asked: list[bool] = []

    def full(machine: Machine, directory: Path, *, incremental: bool = False, live: bool = False) -> Manifest:
        asked.append(incremental)
        raise SnapshotError("no space")

    monkeypatch.setattr(keeping, "create", full)
    again = kept()
    until(lambda: len(asked) >= 3, "it was tried")
    assert all(asked)
    assert again.last["error"] == "no space"


def test_whatever_goes_wrong_with_a_snapshot_the_next_is_taken(
        kept: Callable[[], Keeping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Manifest:
        raise KeyError("slots")

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "create", broken)
        snapshots = kept()
        until(lambda: snapshots.last["error"] == "KeyError: 'slots'", "it is said")
    until(lambda: snapshots.last["id"] is not None and not snapshots.last["error"], "a snapshot")


def test_no_snapshot_is_begun_before_a_migration(kept: Callable[[], Keeping], tmp_path: Path) -> None:
    snapshots = kept()
    until(lambda: snapshots.last["id"] is not None, "a snapshot")
    snapshots.hold(60.0)
    last = snapshots.last["id"]
    assert not threading.Event().wait(1.0)
    assert snapshots.last["id"] == last
    snapshots.go_on()
    until(lambda: snapshots.last["id"] != last, "another")


def test_a_chain_is_merged_while_its_machine_may_migrate(
        kept: Callable[[], Keeping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merging, go = threading.Event(), threading.Event()
    monkeypatch.setattr(keeping, "chain", lambda directory: [None] * 100)

    def merge(directory: Path) -> None:
        merging.set()
        go.wait(30.0)

    monkeypatch.setattr(keeping, "merge", merge)
    snapshots = kept()
    assert merging.wait(30.0)
    try:
        snapshots.hold(0.0)     # it is ready for one
        assert not go.is_set()
    finally:
        go.set()
