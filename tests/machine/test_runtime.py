"""Runtime directories and claims, with real machines: whoever launches, ends or clears a name takes nothing from
another, however the two meet."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from machines import alive, exact, spec, until
from places import TESTS

from ipc.shm import list_segments
from vmm.client.machine import Machine
from vmm.errors import ExitCode, VmmError
from vmm.machine.names import belongings, machine_prefix, runtime_root, scope_prefix
from vmm.machine.runtime import collect_garbage, is_running, leftovers, machine_names
from vmm.machine.spec import MachineSpec

TIMEOUT = 60.0


def idle(vcpus: int = 1) -> MachineSpec:
    return spec("idle", accel="unicorn", vcpus=vcpus, mib=4, milliseconds=0, timeout=None)


def pids(machine: Machine) -> tuple[int, int, list[int]]:
    """Keeper, coordinator, workers."""
    assert machine._keeper is not None
    status = machine.status()
    return machine._keeper.pid, status["coordinator"]["pid"], [v["pid"] for v in status["vcpus"]]


def all_there(machine: Machine) -> bool:
    """Its memory can be opened and its dirty log taken by somebody who comes now."""
    with Machine.attach(machine.name) as other:
        other.register("late")
        other.ram(0)
        return list(other.sync("late").slots) == [0]


def vmm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True,
                          timeout=TIMEOUT, env={**os.environ, **environment})


# --- names that begin alike -----------------------------------------------------------------------------


def test_a_machine_is_not_harmed_by_one_whose_name_it_begins_with() -> None:
    with Machine.launch(idle(), name="web-2") as machine:
        before = list_segments(machine_prefix("web-2"))
        with Machine.launch(idle(), name="web"):
            assert machine_names() == ["web", "web-2"]
        assert collect_garbage("web") == []
        assert collect_garbage() == []
        assert list_segments(machine_prefix("web-2")) == before
        assert all_there(machine)


# --- who is first ------------------------------------------------------------------------------------------


def test_of_two_launches_of_one_name_one_runs_and_the_other_is_told() -> None:
    """And what clears left-overs meanwhile leaves the one alone."""
    launched: list[Machine] = []
    errors: list[str] = []
    over = threading.Event()

    def launch() -> None:
        try:
            launched.append(Machine.launch(idle(), name="twice"))
        except VmmError as exc:
            errors.append(str(exc))

    def clear() -> None:
        while not over.is_set():
            collect_garbage()
            is_running("twice")

    clearer = threading.Thread(target=clear)
    clearer.start()
    launchers = [threading.Thread(target=launch) for _ in range(3)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join()
    over.set()
    clearer.join()
    assert len(launched) == 1
    with launched[0] as machine:
        assert len(errors) == 2
        assert all("'twice' is already running" in error for error in errors)
        assert all_there(machine)


def test_orphans_take_nothing_from_a_machine_that_has_their_name_by_now() -> None:
    """Keeper and coordinator killed at once, and a machine of the same name launched while the old workers still
    wait for somebody to end them: they go, and the new machine keeps all it has."""
    old = Machine.launch(idle(vcpus=2), name="again")
    keeper, coordinator, workers = pids(old)
    for pid in (keeper, *workers):      # so that it cannot start another coordinator, and they do not go too soon
        os.kill(pid, signal.SIGSTOP)
    os.kill(coordinator, signal.SIGKILL)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not is_running("again"), "the name is free")
    with Machine.launch(idle(), name="again") as new:
        assert all(alive(pid) for pid in workers)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        until(lambda: not any(alive(pid) for pid in workers), "the old workers have gone")
        assert all_there(new)
        old.close()
        assert all_there(new)
    assert not belongings("again").left()


@pytest.mark.parametrize("moment", ["", "control", "ram0", "log0"])
def test_a_keeper_that_is_killed_during_a_launch_leaves_nothing(moment: str) -> None:
    """At its claim, and as soon as this segment is there."""
    code = ("import sys; sys.path[:0] = sys.argv[1:]\nfrom test_runtime import idle\n"
            "from vmm.client.machine import Machine\nMachine.launch(idle(vcpus=4), name='early').close()")
    with subprocess.Popen([sys.executable, "-c", code, str(TESTS), str(TESTS / "machine")],
                          stderr=subprocess.DEVNULL) as process:
        owned = belongings("early")
        wanted = f"/{owned.prefix}{moment}" if moment else f"/{owned.name}"

        def begun() -> bool:
            return owned.owner_pid() is not None and any(name.startswith(wanted) for name in owned.left())

        until(begun, "begun")
        keeper = owned.owner_pid()
        assert keeper is not None       # 0 would be this process and all around it
        assert b"vmm.coordinator.keeper" in Path(f"/proc/{keeper}/cmdline").read_bytes().split(b"\0")
        os.kill(keeper, signal.SIGKILL)
        process.wait(TIMEOUT)
    if moment:      # else there may be nobody yet who could have cleared up
        until(lambda: not owned.left(), "everything gone")
    until(lambda: not is_running("early"), "ended")
    collect_garbage("early")
    assert leftovers() == {}


# --- the root ----------------------------------------------------------------------------------------------


def test_a_machine_is_the_same_however_its_directory_is_spelled(runtime_dir: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(runtime_dir)
    with Machine.launch(idle(), name="spelled"):
        for spelling in (f"{runtime_dir}/", str(link), f"{link}//.", f"/tmp/../{runtime_dir}"):
            done = vmm("sync", "spelled", XDG_RUNTIME_DIR=spelling)
            assert (done.returncode, done.stderr) == (0, "")
            assert "spelled" not in vmm("gc", XDG_RUNTIME_DIR=spelling).stdout
            done = vmm("gc", "spelled", XDG_RUNTIME_DIR=spelling)
            assert (done.returncode, "is running" in done.stderr) == (ExitCode.BAD_INPUT, True)


def test_another_root_is_another_world(runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines of one name under two roots know nothing of each other."""
    with Machine.launch(idle(), name="twin") as machine:
        prefix = scope_prefix()
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("XDG_RUNTIME_DIR", str(tmp_path))
            assert scope_prefix() != prefix
            assert machine_names() == []
            with Machine.launch(idle(), name="twin"):
                assert machine_names() == ["twin"]
            assert collect_garbage() == []
        assert all_there(machine)


@pytest.mark.parametrize("kind", ["open", "link", "file", "foreign"])
@pytest.mark.parametrize("xdg", [True, False])
def test_a_root_that_others_could_write_to_is_refused(kind: str, xdg: bool, runtime_dir: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """By every verb: whoever owns it could stand in for any machine."""
    if kind == "foreign" and os.getuid() != 0:
        pytest.skip("only root can make what is another user's")
    root = runtime_dir / "shardvmm"
    if not xdg:
        monkeypatch.setattr("vmm.machine.names._FALLBACK", str(tmp_path / "fallback-{}"))
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        root = tmp_path / f"fallback-{os.getuid()}"
    if kind == "file":
        root.touch()
    elif kind == "link":
        (tmp_path / "target").mkdir(mode=0o700)
        root.symlink_to(tmp_path / "target")
    else:
        root.mkdir(mode=0o777 if kind == "open" else 0o700)
        if kind == "open":
            root.chmod(0o777)
        else:
            os.chown(root, 12345, 12345)
    calls = [lambda: is_running("x"), machine_names, leftovers, collect_garbage, lambda: Machine.attach("x")]
    if xdg:     # the other root is moved in this process only
        calls.append(lambda: Machine.launch(idle(), name="x"))
    for call in calls:
        with pytest.raises(VmmError, match="the runtime directory") as caught:
            call()
        assert caught.value.exit_code is ExitCode.BAD_INPUT
        remedy = "chmod 700" if kind == "open" else "remove" if xdg else "set XDG_RUNTIME_DIR"
        assert remedy in str(caught.value)
    if root.is_dir() and not root.is_symlink():
        root.rmdir()
    else:
        root.unlink()


@pytest.mark.parametrize("base", ["relative", "", "/nonexistent"])
def test_an_xdg_runtime_dir_that_is_none_is_not_used(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    assert runtime_root() == Path(f"/tmp/shardvmm-{os.getuid()}")


# --- what others remove ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["directory", "root", "lock"])
def test_a_machine_that_nobody_can_reach_any_more_ends(what: str, runtime_dir: Path) -> None:
    """Its directory removed, all of them (a logout), its lock: it ends in order, and all of it is gone. While it
    does, its name is taken, and its memory nobody's left-over."""
    verified = msgspec.structs.replace(idle(), verify=exact())
    machine = Machine.launch(verified, name="lost")
    keeper, coordinator, workers = pids(machine)
    owned = belongings("lost")
    os.kill(coordinator, signal.SIGSTOP)        # for as long as is looked at it
    if what == "lock":
        owned.lock_path.unlink()
    else:
        shutil.rmtree(owned.directory if what == "directory" else owned.directory.parent)
        assert is_running("lost")
        assert collect_garbage() == []
        with pytest.raises(VmmError, match="is already running"):
            Machine.launch(idle(), name="lost")
    os.kill(coordinator, signal.SIGCONT)
    until(lambda: not any(alive(pid) for pid in [keeper, coordinator, *workers]), "everybody has gone")
    assert owned.left() == []
    report = machine.wait(TIMEOUT)
    assert report["exit_code"] == ExitCode.STOPPED
    machine.close()
