"""``vmm upgrade``: new processes, the same memory and name; never two, never none, whoever is killed where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from machines import end, nothing_left, replace, spec, until
from migrations import TIMEOUT, WALK, ended, vmm
from test_handover import AFTER, BEFORE, Watch, killed, works

from ipc.shm import SHM_DIRECTORY
from ipc.steps import STEPS
from vmm.cli.run import follow_machine
from vmm.client.machine import Machine
from vmm.consumers.migration.upgrade import upgrade
from vmm.errors import ExitCode, VmmError
from vmm.machine.names import between_name
from vmm.machine.runtime import collect_garbage, is_running
from vmm.machine.spec import VerifySpec
from vmm.version import VERSION

BETWEEN = between_name("source")
#: Pages of WALK that its two vCPUs walk over; each adds 1 to the first word of one page after the other.
FIRST, LAST = 257, 2042


def walked(machine: Machine) -> None:
    """Each vCPU has gone on from where it was: no page was passed twice in a round, and none left out."""
    machine.pause()
    words = machine.ram(0).view(np.uint64).reshape(-1, 512)[FIRST:LAST + 1, 0].astype(np.int64)
    for share in np.split(words, 2):
        most, least, rises = int(share.max()), int(share.min()), int((np.diff(share) > 0).sum())
        assert (most > 0, most - least <= 1, rises) == (True, True, 0), (most, least, rises)
    machine.resume()


def goes_on_in(keeper: int | None) -> int:
    """The machine is called source and runs as it should, in other processes than this keeper's; nothing is left of the
    one in between. Its keeper; it has ended when this returns."""
    until(lambda: not is_running(BETWEEN) and is_running("source"), "it has its name", TIMEOUT)
    until(lambda: nothing_left(BETWEEN), "nothing is left of the machine in between", TIMEOUT)
    with Machine.attach("source") as machine:
        until(lambda: machine.status()["state"] == "running", "it runs", TIMEOUT)
        works(machine)
        walked(machine)
        pid = owner()
        assert pid != keeper
        machine.stop()
    until(lambda: nothing_left("source"), "nothing is left", TIMEOUT)
    return pid


def owner() -> int:
    from vmm.machine.names import belongings

    pid = belongings("source").owner_pid()
    assert pid is not None
    return pid


@pytest.fixture
def walking() -> Iterator[int]:
    """The machine ``source`` walks, by itself; its keeper's pid."""
    Machine.launch(replace(WALK, linger=False), detach=True).detach()
    yield owner()
    for name in (BETWEEN, "source"):
        end(name)
        collect_garbage(name)


def memory(machine: Machine) -> int:
    return os.stat(SHM_DIRECTORY / machine.ram_segment(0).removeprefix("/")).st_ino


# --- what goes on ---------------------------------------------------------------------------------------------------


def test_it_ends_as_one_that_was_never_upgraded(accel: str) -> None:
    """Twice, while it counts; whoever waits for it, and has launched it, is told its real end."""
    work = spec("random", accel=accel, name="source", mib=8, writes=2_000_000 if accel == "kvm" else 400_000)
    with Machine.launch(work) as machine:
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        expected = machine.ram(0).tobytes()
    with Machine.launch(replace(work, dirty_quota=20, verify=VerifySpec(interval=0.1))) as machine:
        place, keeper = memory(machine), owner()
        for _ in range(2):
            done = upgrade("source")
            assert (done.name, done.before, done.after) == ("source", VERSION, VERSION)
            assert 0 < done.downtime < done.seconds * 1000
            assert owner() != keeper
            keeper = owner()
        with Machine.attach("source") as moved:
            assert memory(moved) == place
            assert {v["dirty_limit_pages_per_s"] for v in moved.status()["vcpus"]} == {20}
            moved.dirty_limit(0)
            ram = moved.ram(0)
            report = machine.wait(TIMEOUT)
            assert report["exit_code"] == 0
            assert report["verification"]["ok"]
            assert ram.tobytes() == expected
            del ram
    until(lambda: nothing_left("source"), "nothing is left")


def test_clients_that_are_attached_stay_so(walking: int) -> None:
    """What was dirtied before and has not been told is told after it; events go on; the time goes on, and the log."""
    with Machine.attach("source") as machine:
        machine.register("kept")
        until(lambda: machine.sync("kept").pages > 100, "pages are dirtied")
        machine.pause()
        machine.sync("kept")
        machine.write(4096 * 1000 + 8, b"x")
        machine.write(4096 * 1500 + 8, b"x")
        before = machine.status()
        upgrade("source")
        after = machine.status()
        assert after["state"] == "paused"
        assert after["clients"] == before["clients"] == ["kept"]
        assert after["elapsed_s"] > before["elapsed_s"]
        assert after["coordinator"]["pid"] != before["coordinator"]["pid"]
        assert machine.sync("kept").slots == {0: [(1000, 1), (1500, 1)]}
        assert machine.sync("kept").pages == 0
        machine.resume()
        works(machine)
    out, _ = ended(vmm("logs", "source"))
    assert out.count("vCPUs (unicorn) are ready") == 2
    assert goes_on_in(walking)


def test_whoever_launched_it_in_the_foreground_stays_with_it() -> None:
    launch = launched_in_foreground()
    out, _ = ended(vmm("upgrade", "source"))
    assert f"source was upgraded from {VERSION} to {VERSION}" in out
    assert launch.stderr is not None
    assert "was upgraded; it goes on" in launch.stderr.readline()
    assert json.loads(ended(vmm("upgrade", "source", "--json"))[0])["name"] == "source"
    assert "was upgraded; it goes on" in launch.stderr.readline()
    launch.terminate()
    out, err = launch.communicate(timeout=TIMEOUT)
    assert launch.returncode == 128 + 15, (out, err)
    assert json.loads(out)["cause"] == "stopped on request"
    until(lambda: nothing_left("source"), "nothing is left")


def test_whoever_follows_it_is_told_though_the_last_event_was_not_heard(walking: int,
                                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """The connection was lost before that: of one that was attached to, its new processes are the next to answer."""
    said: list[str] = []

    def told() -> bool:
        said.append(capsys.readouterr().err)
        return "source' was upgraded; it goes on" in "".join(said)

    with Machine.attach("source") as machine:
        assert machine.status()["state"] == "running"
        machine._client.close()
        upgrade("source")
        follower = threading.Thread(target=follow_machine, args=(machine, False))
        follower.start()
        until(told, "it is said", TIMEOUT)
        with Machine.attach("source") as other:
            other.stop()
        follower.join(TIMEOUT)
        assert not follower.is_alive()
    told()
    assert "".join(said).count("was upgraded") == 1


def launched_in_foreground() -> subprocess.Popen[str]:
    config = ("{vcpus: 2, accel: unicorn, memory: [{size: 8MiB}], guest: {workload: sequential, "
              "params: {passes: 0, spin: 50}}}")
    launch = subprocess.Popen([sys.executable, "-m", "vmm", "launch", "-", "--name", "source", "--json"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launch.stdin is not None
    launch.stdin.write(config)
    launch.stdin.close()
    launch.stdin = None
    until(lambda: is_running("source"), "it is launched", TIMEOUT)
    with Machine.attach("source") as machine:
        until(lambda: machine.status()["state"] == "running", "it runs", TIMEOUT)
    return launch


def test_what_cannot_be_upgraded_is_one_line(walking: int) -> None:
    with pytest.raises(VmmError, match="no machine named 'gone'"):
        upgrade("gone")
    with Machine.attach("source") as machine, machine.lease("snapshot", "of a test"), \
            pytest.raises(VmmError, match="a snapshot is being taken"):
        upgrade("source")
    assert owner() == walking


# --- never two, never none ------------------------------------------------------------------------------------------


#: Of whoever upgrades, in the first of the two hand-overs: the old machine is back, or the new one goes on.
UNTOUCHED = [*BEFORE, "migrate-handed-over", "migrate-commit", "receive-commit"]
TAKEN = ["receive-started", *(step for step in AFTER if step not in UNTOUCHED), "upgrade-between"]


@pytest.mark.parametrize("step", UNTOUCHED)
def test_killed_before_its_new_processes_run_it_it_goes_on_in_the_old(step: str, steps: Path, walking: int) -> None:
    with Watch(BETWEEN):
        (steps / f"kill-{step}").touch()
        killed(vmm("upgrade", "source"))
        until(lambda: nothing_left(BETWEEN), "nothing is left of the machine in between", TIMEOUT)
        with Machine.attach("source") as machine:
            until(lambda: machine.status()["state"] == "running", "it runs on", TIMEOUT)
            works(machine)
            walked(machine)
        if owner() != walking:      # Commit was on its way
            assert step == "migrate-commit"
        assert "was upgraded" in ended(vmm("upgrade", "source"))[0]
    assert goes_on_in(walking)


@pytest.mark.parametrize("step", TAKEN)
def test_killed_once_they_run_it_it_gets_its_name_back(step: str, steps: Path, walking: int) -> None:
    with Watch(BETWEEN):
        (steps / f"kill-{step}").touch()
        killed(vmm("upgrade", "source"))
        assert goes_on_in(walking)
    assert not list(steps.iterdir())


@pytest.fixture
def half_way(steps: Path, walking: int) -> int:
    """It runs in new processes without its name, and nobody is at work to change that."""
    (steps / "kill-upgrade-between").touch()
    (steps / "fail-upgrade-guard").touch()
    killed(vmm("upgrade", "source"))
    until(lambda: not list(steps.iterdir()), "the process that was to finish it has failed", TIMEOUT)
    until(lambda: nothing_left("source"), "the old processes have gone", TIMEOUT)
    return walking


@pytest.mark.parametrize("step", [*BEFORE, *AFTER, *STEPS["migration, its target"], "upgrade-named"])
def test_the_second_hand_over_is_finished_whoever_is_killed(step: str, steps: Path, half_way: int) -> None:
    with Watch(BETWEEN):
        (steps / f"kill-{step}").touch()
        killed(vmm("upgrade", "source"))
        assert goes_on_in(half_way)
    assert not list(steps.iterdir())


@pytest.mark.parametrize("step", [*STEPS["start"], *STEPS["lease"], *STEPS["hand over"], *STEPS["freeze"]])
def test_coordinators_that_are_killed_are_replaced(step: str, steps: Path, walking: int) -> None:
    """The old machine's, or the one's in between."""
    with Watch(BETWEEN):
        (steps / f"kill-{step}").touch()
        assert "was upgraded" in ended(vmm("upgrade", "source"))[0]
        assert not list(steps.iterdir()), "nobody was killed"
    assert goes_on_in(walking)


def test_a_name_that_is_to_come_back_is_not_given_away(half_way: int) -> None:
    with pytest.raises(VmmError, match="is being upgraded"):
        Machine.launch(WALK)
    status = vmm("wait", "source", "--timeout", "100ms")
    assert status.wait(TIMEOUT) != ExitCode.OK
    assert "was upgraded" in ended(vmm("upgrade", "source"))[0]
    assert goes_on_in(half_way)


def test_the_version_that_is_said_is_that_of_the_package() -> None:
    assert metadata.version("shardvmm") == VERSION
