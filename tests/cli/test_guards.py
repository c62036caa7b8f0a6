"""What is refused unless it is meant, or cannot be: said in one line, with nothing changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import ACCELS, spec, until
from terminal import Terminal

from vmm.client.config import load_config
from vmm.client.machine import Machine
from vmm.client.plan import plan
from vmm.errors import VmmError
from vmm.machine.rules import QUOTA_MAX
from vmm.machine.spec import RamSlot
from vmm.outputs import OutputError

PAGE = 4096


def vmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True, timeout=100,
                          check=False)


def asked(*arguments: str) -> Any:
    done = vmm(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def idle() -> Iterator[Machine]:
    slots = [RamSlot(0, 0, 8 << 20), RamSlot(1, 1 << 30, 1 << 20)]
    with Machine.launch(spec("idle", accel="unicorn", slots=slots, milliseconds=0, timeout=None)) as machine:
        yield machine


# --- memory that the guest cannot run without ---------------------------------------------------------------------


def test_the_slot_of_image_and_stacks_is_removed_only_by_force(idle: Machine) -> None:
    done = vmm("memory", "remove", idle.name, "0")
    assert done.returncode == 2
    assert done.stderr == ("vmm: error: slot 0 holds the guest's image or stacks, which it cannot run without "
                           "(--force removes it anyway)\n")
    os.kill(idle.status()["coordinator"]["pid"], signal.SIGKILL)
    until(lambda: idle.status()["coordinator"]["restarts"] == 1, "another coordinator")
    with pytest.raises(VmmError, match="holds the guest's image"):
        idle.memory_remove(0)
    idle.memory_add(2, 2 << 30, PAGE)
    for slot in (1, 2):
        idle.memory_remove(slot)
    idle.memory_add(2, 2 << 30, PAGE)
    idle.pause()        # it would crash
    idle.memory_remove(0, force=True)
    assert [s["id"] for s in idle.status()["slots"]] == [2]
    idle.memory_add(0, 3 << 30, PAGE)       # of that id, and not that slot
    idle.memory_remove(0)


# --- numbers that cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "said"), [
    (["dirty-limit", "set", "t", "20MB/s", "--vcpu", "-1"], "-1"),
    (["dirty-limit", "cancel", "t", "--vcpu", "-1"], "-1"),
    (["dirty-limit", "set", "t", "-5MB/s"], "'-5MB/s' is not a rate"), (["dirty-limit", "set", "t", "1"], "one page"),
    (["dirty-limit", "set", "t", "0MB/s"], "0MB/s is not a limit: vmm dirty-limit cancel NAME removes one"),
    (["dirty-limit", "set", "t", "20MB/s", "--vcpu", "7"], "there is no vCPU 7"),
    (["memory", "add", "t", "5", "٣", "4096"], "is not a size"),
    (["memory", "add", "t", "5", "0", "9" * 5000], "is not a size"),
])
def test_numbers_that_cannot_be(idle: Machine, arguments: list[str], said: str) -> None:
    done = vmm(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert [v["dirty_limit_pages_per_s"] for v in idle.status()["vcpus"]] == [0, 0]
    assert len(idle.status()["slots"]) == 2


def test_programs_are_held_to_the_same(idle: Machine) -> None:
    for pages, vcpu in ((-5, None), (QUOTA_MAX + 1, None), (1 << 64, 0), (100, -1), (100, 2)):
        with pytest.raises(VmmError):
            idle.dirty_limit(pages, vcpu)
    assert [v["dirty_limit_pages_per_s"] for v in idle.status()["vcpus"]] == [0, 0]
    for gpa, size in ((0, -1), (-1, 1), (-PAGE, PAGE), (1 << 70, 1), (0, 1 << 70), (8 << 20, 1)):
        with pytest.raises(VmmError):
            idle.read(gpa, size)
    assert idle.read(0, 0) == b""


# --- what is not over ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accel", ACCELS)
def test_an_unfinished_machine_has_no_exit_code(accel: str) -> None:
    with Machine.launch(spec("pingpong", accel=accel, turns=1), start=False) as machine:
        report = machine.status()
        assert report["exit_code"] is None
        assert {(v["exit_reason"], v["exit_code"]) for v in report["vcpus"]} == {(None, None)}
        assert "none" not in vmm("status", machine.name).stdout.lower()
        machine.start()
        report = machine.wait(60.0)
        assert report["exit_code"] == 0
        assert {(v["exit_reason"], v["exit_code"]) for v in report["vcpus"]} == {("code", 0)}


# --- what cannot be undone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["snapshot", "delete", "{}", "0001"], ["snapshot", "merge", "{}"]])
def test_what_cannot_be_undone_is_asked_or_forced(idle: Machine, tmp_path: Path, arguments: list[str]) -> None:
    words = [each.format(tmp_path / "chain") for each in arguments]
    assert vmm("snapshot", "create", idle.name, str(tmp_path / "chain")).returncode == 0

    def there() -> list[str]:
        return [each["id"] for each in asked("snapshot", "list", str(tmp_path / "chain"))]

    done = vmm(*words)      # nobody can be asked
    assert (done.returncode, done.stdout, there()) == (2, "", ["0001"])
    assert done.stderr.endswith("That cannot be undone: --force does it\n")
    with Terminal(*words, columns=120) as terminal:
        terminal.wait_for("[y/N]: ")
        terminal.type("n\n")
        assert terminal.wait() == 130
    assert there() == ["0001"]
    with Terminal(*words, columns=120) as terminal:
        terminal.wait_for("[y/N]: ")
        terminal.type("y\n")
        assert terminal.wait() == 0
    assert there() == ([] if "delete" in words else ["0001"])


def test_logs_of_all_machines_are_removed_by_force_alone() -> None:
    with Machine.launch(spec("hello", accel="unicorn", lines=1)) as machine:
        machine.wait(60.0)
    done = vmm("gc", "--logs")
    assert done.returncode == 2
    assert "Remove the logs and reports of" in done.stderr
    assert [each["name"] for each in asked("list", "--all")] == ["t"]
    assert vmm("gc", "--logs", "--force").returncode == 0
    assert asked("list", "--all") == []


# --- clients of the dirty log -------------------------------------------------------------------------------------


def test_clients_are_named_and_can_be_dropped(idle: Machine) -> None:
    assert asked("client", "list", idle.name) == []
    assert vmm("client", "list", idle.name).stdout == "t has no dirty-log clients\n"
    asked("sync", idle.name)
    asked("sync", idle.name, "--client", "other")
    idle.register("mine", mine=True)
    assert asked("client", "list", idle.name) == [
        {"client": "cli", "pid": None}, {"client": "mine", "pid": os.getpid()}, {"client": "other", "pid": None}]
    assert f"client       cli, mine (pid {os.getpid()}), other\n" in vmm("status", idle.name).stdout
    assert asked("client", "drop", idle.name, "cli") == {"name": "t", "client": "cli", "done": "drop"}
    assert vmm("client", "drop", idle.name, "other").stdout == "t: client other dropped\n"
    for name, said in (("cli", "has no dirty-log client 'cli'"), ("mine", f"belongs to process {os.getpid()}"),
                       ("../x", "client name")):
        done = vmm("client", "drop", idle.name, name)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert idle.status()["clients"] == ["mine"]


# --- a trace file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "patterns", "said"), [
    ("/nonexistent/ev.log", ["*"], "/nonexistent/ev.log: cannot be written: No such file or directory"),
    ("{}", ["*"], "is a directory"), ("{}/ev.log", [], "no trace event is enabled"),
    ("/dev/fd/5", ["*"], "is a descriptor of this process"), ("a\0b", ["*"], "cannot be written"),
])
def test_a_trace_file_that_cannot_be_is_said_before_the_start(tmp_path: Path, path: str, patterns: list[str],
                                                              said: str) -> None:
    config = tmp_path / "m.yaml"
    config.write_text("memory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    with pytest.raises(VmmError) as caught:
        plan(load_config(config), trace=patterns, trace_file=path.format(tmp_path))
    assert said in str(caught.value)
    assert str(caught.value).isprintable() or isinstance(caught.value, OutputError)
    assert os.listdir(tmp_path) == ["m.yaml"]


def test_a_trace_file_is_added_to(tmp_path: Path) -> None:
    config, path = tmp_path / "m.yaml", tmp_path / "ev.log"
    config.write_text("memory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    path.write_text("before\n")
    plan(load_config(config), trace=["*"], trace_file=str(path))
    assert path.read_text() == "before\n"
