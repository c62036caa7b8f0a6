"""What is kept of machines that have ended: bounded, and nothing of those that run."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vmm.errors import ExitCode, VmmError
from vmm.machine import records
from vmm.machine.records import Record, ended_names, log_path, no_machine, outcome, remove_records, write_report
from vmm.machine.runtime import claim, release

REPORT = {"name": "m", "state": "ended", "exit_code": 4, "cause": "vCPU 0: exception", "ended_at": "2026-01-01"}


def ended(name: str, age: float = 0.0) -> None:
    """A machine of that name has run, and ended so many seconds ago."""
    record = Record(name)
    record.log_path.write_text("x\n")
    write_report(name, {**REPORT, "name": name})
    record.close()
    for path in record.directory.iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))


def test_a_report_stays_until_the_next_machine_of_that_name() -> None:
    assert outcome("m") is None
    ended("m")
    assert outcome("m") == REPORT
    assert ended_names() == ["m"]
    assert "is no longer running: vCPU 0: exception" in str(no_machine("m"))
    assert no_machine("m").exit_code is ExitCode.NO_MACHINE
    with_next = Record("m")
    assert not with_next.reported
    assert not log_path("m").exists()
    with_next.close()
    assert outcome("m") is None


def test_it_is_the_owners_alone() -> None:
    ended("m")
    for path in (records.state_root(), log_path("m").parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_machine_that_was_killed_with_all_its_processes_is_lost() -> None:
    record = Record("m")
    record.log_path.write_text("x\n")
    record.close()
    found = outcome("m")
    assert found is not None
    assert (found["state"], found["exit_code"]) == ("lost", ExitCode.WORKER_DIED)


def test_a_damaged_report_is_none() -> None:
    ended("m")
    (log_path("m").parent / "report.json").write_text("{")
    assert outcome("m") is None


def test_a_running_machine_has_not_ended() -> None:
    ended("m")
    taken = claim("m")
    try:
        assert outcome("m") is None
        assert ended_names() == []
    finally:
        release(taken)
    assert ended_names() == ["m"]


def test_the_oldest_go_and_those_that_run_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEPT", 3)
    running = Record("running")
    running.log_path.write_text("x\n")
    os.utime(running.log_path, (0, 0))
    for i in range(6):
        ended(f"m{i}", age=1000.0 * (6 - i))
    ended("ancient", age=86400.0 * (records.KEPT_DAYS + 1))
    Record("new").close()
    assert ended_names() == ["m3", "m4", "m5", "new", "running"]
    assert running.log_path.exists()
    running.close()


def test_age_alone_is_enough() -> None:
    ended("ancient", age=86400.0 * (records.KEPT_DAYS + 1))
    ended("old", age=86400.0 * (records.KEPT_DAYS - 1))
    assert ended_names() == ["old"]


def test_a_keeper_that_was_killed_before_it_had_its_lock_stops_no_other() -> None:
    """All that it leaves is an empty directory."""
    ended("m")
    log_path("t").parent.mkdir()
    Record("new").close()
    assert ended_names() == ["m", "new"]


def test_records_are_removed_when_asked_for_and_not_of_machines_that_run() -> None:
    running = Record("running")
    ended("a")
    ended("b")
    assert remove_records("running") == []
    assert remove_records("a") == [str(log_path("a").parent)]
    assert remove_records() == [str(log_path("b").parent)]
    assert running.directory.is_dir()
    running.close()


def test_machines_of_another_runtime_directory_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended("m")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert outcome("m") is None
    assert ended_names() == []
    ended("m")
    assert len([p for p in records.state_root().iterdir() if p.is_dir()]) == 2


@pytest.mark.parametrize("state", ["relative", ""])
def test_what_is_no_absolute_path_is_ignored(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.state_root() == tmp_path / ".local" / "state" / "shardvmm"


def test_no_path_is_made_of_what_is_no_name() -> None:
    for call in (log_path, Record, outcome, remove_records):
        with pytest.raises(VmmError, match="machine name"):
            call("../m")
