"""Machines in the background: what their guests have printed, and print; and being with one until it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import vmm
from machines import until

from vmm.client.machine import Machine, list_machines
from vmm.errors import ExitCode

NAME = "talks"
VMM = [sys.executable, "-m", "vmm"]
HELLO = [f"[vcpu {vcpu}] hello from vCPU {vcpu} of 2" for vcpu in range(2)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a machine that prints, and ends when it is told to."""
    path = tmp_path / "m.yaml"
    path.write_text("name: talks\nvcpus: 2\naccel: unicorn\nmemory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    return path


@pytest.fixture
def waits(config: Path) -> Iterator[Path]:
    """And one that prints nothing, and goes on until it is stopped."""
    config.write_text(config.read_text().replace("workload: hello", "workload: idle, params: {milliseconds: 0}"))
    assert vmm("launch", str(config), "--detach").returncode == 0
    yield config
    if list_machines():
        vmm("stop", "--force", NAME)


def test_what_was_printed_before_by_a_machine_that_has_ended(config: Path) -> None:
    assert vmm("launch", str(config), "--detach").returncode == 0
    assert vmm("wait", NAME, "--timeout", "60s").returncode == 0
    for arguments in ([], ["--no-follow"]):
        done = vmm("console", NAME, *arguments)
        assert done.returncode == 0
        assert sorted(set(done.stdout.splitlines())) == HELLO
    lines = [json.loads(line) for line in vmm("console", NAME, "--json").stdout.splitlines()]
    assert {line["text"] for line in lines} == {line.partition("] ")[2] for line in HELLO}


def test_console_and_attach_follow_until_the_machine_ends(waits: Path) -> None:
    console = subprocess.Popen([*VMM, "console", NAME], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    attach = subprocess.Popen([*VMM, "attach", NAME, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True)
    left = subprocess.Popen([*VMM, "attach", NAME], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with Machine.attach(NAME) as machine:
        until(lambda: all(_listens(each) for each in (attach, left)), "both have attached")
        left.send_signal(signal.SIGINT)
        _, said = left.communicate(timeout=60)
        assert left.returncode == 128 + signal.SIGINT
        assert said == f"vmm: {NAME} keeps running: vmm attach {NAME}, vmm stop {NAME}\n"
        assert machine.status()["state"] == "running"
        machine.stop()
    out, err = attach.communicate(timeout=60)
    assert (attach.returncode, err) == (ExitCode.STOPPED, "")
    assert json.loads(out)["state"] == "ended"
    assert console.communicate(timeout=60) == ("", "")
    assert console.returncode == 0


def _listens(process: subprocess.Popen[str]) -> bool:
    """It has its handler of SIGINT (proc_pid_status(5), SigCgt), and has imported what it needs to follow."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("verb", ["attach", "console"])
def test_nobody_there(verb: str) -> None:
    done = vmm(verb, "nobody")
    assert (done.returncode, done.stderr) == (7, "vmm: error: no machine named 'nobody' (none is running)\n")


def test_a_file_of_several_machines_is_launched_in_the_background(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("vcpus: 2\naccel: unicorn\nmemory: [{size: 4MiB}]\n"
                    "guest: {workload: idle, params: {milliseconds: 0}}\nmachines:\n  one: {}\n  two: {vcpus: 1}\n")
    refused = vmm("launch", str(path))
    assert refused.returncode == 2
    assert "several machines (one, two): launch all of them with --detach, or one with --machine" in refused.stderr
    try:
        done = vmm("launch", str(path), "--detach", "--json")
        assert json.loads(done.stdout) == {"names": ["one", "two"]}, done.stderr
        assert {m["name"]: len(m["vcpus"]) for m in list_machines()} == {"one": 2, "two": 1}
        assert vmm("stop", "two").returncode == 0
        again = vmm("launch", str(path), "--detach")        # one is there already: then nothing is launched
        assert again.returncode == 2
        assert "'one' is already running" in again.stderr
        assert [m["name"] for m in list_machines()] == ["one"]
        assert vmm("launch", str(path), "--detach", "--machine", "two").returncode == 0
    finally:
        for each in list_machines():
            vmm("stop", each["name"])
    assert list_machines() == []


def test_short_options_of_launch(config: Path) -> None:
    done = vmm("launch", str(config), "--vcpus", "1", "--memory", "8MiB", "--accel", "unicorn", "--json")
    report = json.loads(done.stdout)
    assert (len(report["vcpus"]), report["slots"][0]["size"]) == (1, 8 << 20)
    refused = vmm("launch", str(config), "--vcpus", "0")
    assert refused.stderr == "vmm: error: --vcpus 0: input should be greater than or equal to 1 (got 0)\n"
