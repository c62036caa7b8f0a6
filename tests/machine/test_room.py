"""Limits of the host are looked at before a machine starts, and told in one line; what fits runs."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from machines import exact, spec, until

from ipc.linux.memory import available_memory, cgroup_left
from ipc.messages import ReplayPhase, ReplaySpec
from ipc.shm import SHM_DIRECTORY, list_segments
from vmm.client.machine import Machine
from vmm.errors import ExitCode
from vmm.machine import room
from vmm.machine.names import machine_prefix
from vmm.machine.spec import MachineSpec

MIB = 1 << 20
V1 = Path("/sys/fs/cgroup/memory")

BASE = spec("idle", accel="unicorn", mib=8, milliseconds=0, timeout=None)
SHAPES = [
    BASE, msgspec.structs.replace(BASE, vcpus=5), msgspec.structs.replace(BASE, tracking="bitmap"),
    msgspec.structs.replace(BASE, verify=exact()),
    msgspec.structs.replace(BASE, reaper=msgspec.structs.replace(BASE.reaper, reapers=4)),
    msgspec.structs.replace(BASE, accel="replay", image="", cmdline="", params=[],
                            replay=ReplaySpec([ReplayPhase("random")], rate=10.0)),
]


def launch(config: Path, *arguments: str, limit: tuple[int, int] | None = None,
           group: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``vmm launch`` under a limit (setrlimit), or in a cgroup."""
    def prepare() -> None:
        if limit is not None:
            resource.setrlimit(limit[0], (limit[1], limit[1]))
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run([sys.executable, "-m", "vmm", "launch", str(config), *arguments], capture_output=True,
                          text=True, timeout=100, preexec_fn=prepare)


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    path = tmp_path / "hello.yaml"
    path.write_text("vcpus: 2\nmemory: [{size: 64MiB}]\nguest: {workload: hello}\ntimeout: 60s\n")
    return path


@pytest.mark.parametrize(("limit", "said"), [
    ((resource.RLIMIT_NOFILE, 24),
     r"hello\.yaml:1:\d+: vcpus: the hard limit of open files is 24, .* needs \d+ \(see ulimit"),
    ((resource.RLIMIT_NOFILE, 100), "the hard limit of open files is 100"),
    ((resource.RLIMIT_AS, 400 * MIB), r"hello\.yaml:2:\d+: memory: the address space limit is 400 MiB, .*see ulimit"),
])
def test_a_limit_that_is_too_low_is_one_line(hello: Path, limit: tuple[int, int], said: str) -> None:
    done = launch(hello, limit=limit)
    assert done.returncode == ExitCode.BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.count("vmm: ") == 1
    assert re.search(said, done.stderr)


def test_a_low_soft_limit_of_descriptors_is_raised(hello: Path) -> None:
    """It is there for programs that use select(2); the hard one counts."""
    code = ("import resource, sys; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))\n"
            "sys.argv = ['vmm', 'launch', sys.argv[1]]; from vmm.cli.main import main; main()")
    done = subprocess.run([sys.executable, "-c", code, str(hello)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")


# --- what is needed, against what is taken -----------------------------------------------------------------


@pytest.mark.parametrize("machine_spec", SHAPES, ids=lambda s: f"{s.accel}-{s.vcpus}-{s.tracking}")
def test_what_is_asked_for_is_what_is_taken(machine_spec: MachineSpec) -> None:
    """Descriptors: not fewer than are open. Shared memory: as much as is there. Address space: not more than is in
    use, or a machine that could run would be refused."""
    with Machine.launch(machine_spec, name="taken") as machine:
        status = machine.status()
        coordinator = status["coordinator"]["pid"]
        open_now = len(os.listdir(f"/proc/{coordinator}/fd"))
        assert open_now <= room.descriptors(machine_spec) - room.CLIENT_DESCRIPTORS
        spaces = [peak(pid) for pid in (coordinator, status["vcpus"][0]["pid"])]
        assert room.address_space(machine_spec) <= max(spaces)
        taken = sum((SHM_DIRECTORY / name[1:]).stat().st_blocks * 512
                    for name in list_segments(machine_prefix("taken")))
        assert 0 <= taken - room.shared_memory(machine_spec) < 4 * MIB      # the system slot, and whole pages


def peak(pid: int) -> int:
    """Bytes of address space that a process has had at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak:")) << 10


# --- memory cgroups -----------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup of our own (version 1), without a limit."""
    path = V1 / f"shardvmm-test-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"no memory cgroup of version 1 can be made: {exc.strerror}")
    yield path
    # Who waits for the end of a machine may see it a moment before its last process has left the system.
    until(lambda: not (path / "cgroup.procs").read_text(), "no process is left in the cgroup")
    path.rmdir()


def test_a_machine_beyond_its_cgroup_is_one_line_and_one_within_runs(hello: Path, group: Path) -> None:
    (group / "memory.limit_in_bytes").write_text(str(180 * MIB))
    refused = launch(hello, "--set", "memory.0.size=256MiB", group=group)
    assert refused.returncode == ExitCode.BAD_INPUT
    assert f"hello.yaml:2:1: memory: the memory cgroup {group} is too small" in refused.stderr
    assert refused.stderr.count("vmm: ") == 1
    (group / "below").mkdir()       # the limit of one above counts
    refused = launch(hello, "--set", "memory.0.size=256MiB", group=group / "below")
    (group / "below").rmdir()
    assert f"the memory cgroup {group} is too small" in refused.stderr
    (group / "memory.limit_in_bytes").write_text(str(1024 * MIB))
    runs = launch(hello, group=group)
    assert (runs.returncode, runs.stderr) == (ExitCode.OK, "")


def test_memory_is_not_plugged_in_beyond_the_cgroup(hello: Path, group: Path) -> None:
    (group / "memory.limit_in_bytes").write_text(str(1024 * MIB))
    try:
        config = hello.parent / "idle.yaml"
        config.write_text("memory: [{size: 16MiB}]\nguest: {workload: idle, params: {milliseconds: 0}}\n")
        assert launch(config, "--detach", group=group).returncode == 0
        done = subprocess.run([sys.executable, "-m", "vmm", "memory", "add", "idle", "1", "1GiB", "2GiB"],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == ExitCode.BAD_INPUT
        assert f"the memory cgroup {group} is too small" in done.stderr
    finally:
        subprocess.run([sys.executable, "-m", "vmm", "stop", "idle"], capture_output=True, timeout=60, check=True)


def cgroup(tmp_path: Path, line: str, mount: str, files: dict[str, dict[str, Any]]) -> Path:
    """A /proc/self of a process in a hierarchy of these directories and files."""
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    (proc / "mountinfo").write_text(f"22 1 0:1 / / rw - ext4 /dev/x rw\n{mount.format(tmp_path / 'top')}\n")
    for directory, contents in files.items():
        at = tmp_path / "top" / directory
        at.mkdir(parents=True, exist_ok=True)
        for name, content in {"memory.stat": "anon 0", **contents}.items():
            (at / name).write_text(f"{content}\n")
    return proc


V2 = "30 23 0:26 / {} rw - cgroup2 cgroup2 rw"


def test_the_least_of_a_cgroup_and_those_above_it(tmp_path: Path) -> None:
    no_swap = {"memory.swap.max": 0, "memory.swap.current": 0}
    proc = cgroup(tmp_path, "0::/user/me", V2, {
        "": {}, "user": {"memory.max": 900, "memory.current": 800, "memory.stat": "anon 5\ninactive_file 300",
                         **no_swap},
        "user/me": {"memory.max": 1000, "memory.current": 100, **no_swap}})
    assert cgroup_left(proc) == (400, tmp_path / "top" / "user")


def test_a_container_sees_its_own_part(tmp_path: Path) -> None:
    """Mounted from below the real top, by a process that reads its path from there."""
    files = {"": {"memory.max": 5000, "memory.current": 4000, "memory.swap.max": 0}}
    proc = cgroup(tmp_path, "0::/docker/abc", "30 23 0:26 /docker/abc {} rw - cgroup2 cgroup2 rw", files)
    assert cgroup_left(proc) == (1000, tmp_path / "top")


@pytest.mark.parametrize("files", [
    {"": {}}, {"": {"memory.max": "max", "memory.current": 5}}, {"": {"memory.max": "nonsense"}},
])
def test_without_a_limit_there_is_none(files: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert cgroup_left(cgroup(tmp_path, "0::/", V2, files)) is None


def test_a_host_without_cgroups(tmp_path: Path) -> None:
    assert cgroup_left(tmp_path) is None
    assert available_memory() > 0
