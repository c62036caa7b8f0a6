"""Snapshots, recordings and whole launches on a disk that fails at the n-th use of a file, for every n: once (EIO), or
from there on as a full one does (ENOSPC). The command ends in order and in one line; what was there before is whole,
the machine goes on, and the next snapshot has every page that was written."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from failing_io import Call, FailingRun, run_failing
from machines import ANY, spec
from places import CONFIGS

from ipc.shm import list_segments
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.errors import ExitCode
from vmm.machine.names import machine_prefix
from vmm.machine.tracefile import TraceReader

#: A filter hands the calls over: it needs what the sandbox needs.
pytestmark = pytest.mark.sandbox

TIMEOUT = 60.0

#: Every place in the long set; every so many in the usual one.
STEPS = [13, pytest.param(1, marks=pytest.mark.long)]

Fails = Callable[[int, Call], int]


@pytest.fixture(params=ANY)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Its guest writes to pages at random for ever."""
    with Machine.launch(spec("stamp", accel=str(request.param), name="failing-disk", vcpus=1, mib=2, writes=0,
                             spin=300, timeout=None)) as launched:
        yield launched


def once(at: int) -> Fails:
    return lambda number, call: errno.EIO if number == at else 0


def full(at: int) -> Fails:
    return lambda number, call: errno.ENOSPC if number >= at and call.takes_room else 0


def walk(step: int, command: Callable[[Fails], FailingRun], check: Callable[[FailingRun], None]) -> None:
    """Every ``step``-th place, each way to fail. ``command`` is carried out, then ``check``."""
    calls = command(lambda number, call: 0).calls
    failed = 0
    for at in range(step // 2, len(calls), step):
        for how in (once, full) if calls[at].takes_room else (once,):
            ran = command(how(at))
            failed += bool(ran.failed)
            check(ran)
    assert failed >= len(calls) // step > 0


def ended_in_order(ran: FailingRun) -> None:
    """It says in one line what was wrong, or nothing was."""
    assert ran.code in (ExitCode.OK, ExitCode.BAD_INPUT, ExitCode.OUTPUT), (ran.failed, ran.code, ran.error)
    assert "Traceback" not in ran.error, (ran.failed, ran.error)
    said = re.findall("^vmm: error: .*$", ran.error, re.MULTILINE)
    assert len(said) == (ran.code != ExitCode.OK), (ran.failed, ran.code, ran.error)


def could_not_clear_up(ran: FailingRun) -> bool:
    """It failed in removing what it had made, or in looking what that is."""
    return any(call.name in ("unlink", "unlinkat", "rmdir", "getdents64") or
               (call.name == "openat" and not call.takes_room) for call in ran.failed)


def contents(chain: Path, name: str) -> dict[int, bytes]:
    return {slot: memory.tobytes() for slot, memory in snapshot.read_memory(chain, name).items()}


def check_next(machine: Machine, chain: Path) -> None:
    """One more snapshot is what is in memory: no page that a failed one had taken is missing."""
    with machine.paused("test"):
        snapshot.create(machine, chain, incremental=True)
        for slot, held in snapshot.read_memory(chain).items():
            assert np.array_equal(held, machine.ram(slot)), slot


@pytest.mark.parametrize("step", STEPS)
def test_snapshot_create(machine: Machine, tmp_path: Path, step: int) -> None:
    chain = tmp_path / "chain"
    snapshot.create(machine, chain)
    first = contents(chain, "0001")

    def create(fails: Fails) -> FailingRun:
        return run_failing(["-m", "vmm", "snapshot", "create", machine.name, str(chain), "--incremental"], [tmp_path],
                           fails, TIMEOUT)

    def check(ran: FailingRun) -> None:
        ended_in_order(ran)
        assert could_not_clear_up(ran) or all(re.fullmatch(r"\d{4}", path.name) for path in chain.iterdir()), ran.failed
        assert contents(chain, "0001") == first
        assert machine.status()["state"] == "running"
        check_next(machine, chain)
        shutil.rmtree(chain)        # so that the next one has as much to read
        snapshot.create(machine, chain)
        first.update(contents(chain, "0001"))

    walk(step, create, check)


@pytest.mark.parametrize("step", STEPS)
def test_snapshot_merge(machine: Machine, tmp_path: Path, step: int) -> None:
    original = tmp_path / "original"
    for number in range(3):
        snapshot.create(machine, original, incremental=number > 0)
    newest = contents(original, "0003")
    machine.stop()
    turns = count()

    def merge(fails: Fails) -> FailingRun:
        nonlocal chain
        chain = tmp_path / f"chain{next(turns)}"
        shutil.copytree(original, chain)
        return run_failing(["-m", "vmm", "snapshot", "merge", str(chain), "--force"], [chain], fails, TIMEOUT)

    def check(ran: FailingRun) -> None:
        ended_in_order(ran)
        assert contents(chain, "0003") == newest, ran.failed
        snapshot.merge(chain)       # what is left of a merge is in nobody's way
        assert contents(chain, "0003") == newest, ran.failed
        assert {path.name for path in chain.iterdir()} <= {"0001", "0002", "0003"}, ran.failed
        shutil.rmtree(chain)

    chain = original
    walk(step, merge, check)


def test_trace_record(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.trace"
    path.parent.mkdir()

    def record(fails: Fails) -> FailingRun:
        return run_failing(["-m", "vmm", "trace", "record", machine.name, str(path), "--time", "100ms"], [path.parent],
                           fails, TIMEOUT)

    def check(ran: FailingRun) -> None:
        ended_in_order(ran)
        if ran.code == ExitCode.OK:
            with TraceReader(path) as trace:
                assert sum(len(each.pages) for each in trace)
        path.unlink(missing_ok=True)
        assert could_not_clear_up(ran) or not list(path.parent.iterdir()), ran.failed
        for left in path.parent.iterdir():
            left.unlink()

    walk(1, record, check)


@pytest.mark.parametrize("accel", ANY)
@pytest.mark.parametrize("step", STEPS)
def test_launch(accel: str, tmp_path: Path, step: int) -> None:
    """All processes of a machine: what fails is said, and nothing is left."""
    name = "failing-launch"
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    arguments = ["-m", "vmm", "launch", str(CONFIGS / "quickstart.yaml"), "--name", name, "--set", f"accel={accel}",
                 "--set", "guest.params.writes=100", "--set", "memory.0.size=2MiB"]

    def launch(fails: Fails) -> FailingRun:
        return run_failing(arguments, [tmp_path], fails, TIMEOUT, XDG_RUNTIME_DIR=str(run),
                           XDG_STATE_HOME=str(tmp_path / "state"))

    def check(ran: FailingRun) -> None:
        ended_in_order(ran)
        assert "ended during set-up" not in ran.error
        assert ran.code != ExitCode.OK or "every vCPU ended with code 0" in ran.out
        assert list_segments(machine_prefix(name)) == [], ran.failed
        assert could_not_clear_up(ran) or list(run.iterdir()) == [], ran.failed

    walk(step, launch, check)
