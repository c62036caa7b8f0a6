"""What is around does not get in: modules of the current directory, descriptors, children that the launching
process has forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machines import ACCELS, alive, machine_processes, spec, until
from places import TESTS, TOP

from vmm.client.machine import Machine
from vmm.errors import ExitCode
from vmm.machine.names import belongings
from vmm.machine.spec import MachineSpec

TIMEOUT = 60.0


def idle(accel: str = "unicorn") -> MachineSpec:
    return spec("idle", accel=accel, vcpus=1, mib=4, milliseconds=0, timeout=None)


# --- modules ---------------------------------------------------------------------------------------------------


def test_processes_are_started_in_one_way() -> None:
    """ipc.run.python_module, which keeps the current directory out."""
    others = [str(path.relative_to(TOP)) for package in ("ipc", "workers", "vmm")
              for path in (TOP / package).rglob("*.py") if "sys.executable" in path.read_text()]
    assert others == ["ipc/run.py"]


@pytest.mark.parametrize("accel", ACCELS)
def test_modules_of_the_current_directory_are_not_executed(accel: str, tmp_path: Path) -> None:
    """Of the program's own names, and of those of what it imports."""
    ran = tmp_path / "ran"
    folder = tmp_path / "cwd"
    folder.mkdir()
    for name in ("workers", "ipc", "vmm", "json", "select", "numpy", "msgspec", "zmq", "sitecustomize", "unicorn"):
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"open({str(ran)!r}, 'a').write('{name}\\n')\nraise SystemExit(9)\n")
    config = tmp_path / "hello.yaml"
    config.write_text(f"accel: {accel}\nmemory: [{{size: 4MiB}}]\nguest: {{workload: hello}}\ntimeout: 60s\n")
    done = subprocess.run([str(Path(sys.executable).parent / "vmm"), "launch", str(config)], cwd=folder,
                          capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, ran.exists()) == (ExitCode.OK, False), done.stderr


# --- descriptors -----------------------------------------------------------------------------------------------


def test_no_descriptor_of_the_launching_process_gets_in(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    fd = os.open(secret, os.O_RDWR | os.O_CREAT)
    os.set_inheritable(fd, True)
    try:
        with Machine.launch(idle(), name="clean"):
            processes = machine_processes("clean")
            assert len(processes) >= 3      # keeper, coordinator, worker
            for pid in processes:
                links = [os.readlink(f"/proc/{pid}/fd/{each}") for each in os.listdir(f"/proc/{pid}/fd")]
                assert str(secret) not in links
    finally:
        os.close(fd)


# --- forked children ---------------------------------------------------------------------------------------------


def forked() -> tuple[int, int]:
    """A child that has all that this process has, and lives until the other value, a descriptor, is closed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    return pid, write


def test_closing_does_not_wait_for_a_forked_child() -> None:
    machine = Machine.launch(idle(), name="forked")
    keeper = machine._keeper
    assert keeper is not None
    child, life = forked()
    try:
        machine.close()
        assert keeper.returncode == ExitCode.STOPPED     # in order, not killed
        assert belongings("forked").left() == []
        assert alive(child)
    finally:
        os.close(life)
        os.waitpid(child, 0)


def test_the_end_of_the_launching_process_counts_whatever_children_it_has() -> None:
    code = ("import os, sys; sys.path[:0] = sys.argv[1:]\nfrom test_isolation import forked, idle\n"
            "from vmm.client.machine import Machine\nmachine = Machine.launch(idle(), name='forked')\n"
            "print(forked()[0], flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(TESTS), str(TESTS / "coordinator")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        os.kill(child, signal.SIGSTOP)      # it would see the end of its pipe
        process.kill()
        process.wait(TIMEOUT)
        try:
            until(lambda: not machine_processes("forked") and not belongings("forked").left(), "the machine's end")
            assert alive(child)
        finally:
            os.kill(child, signal.SIGKILL)
