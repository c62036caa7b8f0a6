"""``vmm watch`` as a user has it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import vmm, vmm_here

from vmm.consumers import workingset

pytestmark = pytest.mark.watch

#: The name is this test process's own.
PAGES, WRITTEN, NAME = 4096, 300, f"svt-{os.getpid()}"
#: Writes every tenth page of some again and again.
PROGRAM = f"""
import mmap
from ipc.linux.process import set_name
set_name({NAME!r})
memory = mmap.mmap(-1, {PAGES * 4096}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("ready", flush=True)
while True:
    for page in range({WRITTEN}):
        memory[page * 40960] = 1
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == "ready\n"
        yield made
        made.kill()


def test_totals_and_a_recording_are_of_what_the_process_writes(process: subprocess.Popen[str], tmp_path: Path) -> None:
    done = vmm("watch", str(process.pid), "--time", "1s", "--interval", "50ms", "--json", "--output",
               str(tmp_path / "ws.npz"))
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["pid"], told["name"], told["ended"]) == (process.pid, NAME, "")
    most = told["areas"][0]
    assert (most["name"], most["distinct"]) == ("[anonymous]", WRITTEN)
    assert most["size"] >= PAGES * 4096
    recording = workingset.load(tmp_path / "ws.npz")
    assert recording.intervals == told["intervals"]
    slot = max(recording.pages, key=lambda each: len(recording.pages[each]))
    found = np.unique(recording.pages[slot])
    assert len(found) == WRITTEN
    assert set(np.diff(found)) == {10}
    assert int(recording.dirty_pages().max()) == told["most_pages"]


def test_a_line_for_each_interval_and_one_for_all(process: subprocess.Popen[str]) -> None:
    done = vmm("watch", NAME, "--time", "1s", "--interval", "20ms", "--json-lines")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == lines[-1]["intervals"] + 1 >= 2
    assert lines[-1]["areas"][0]["distinct"] == WRITTEN
    assert all(line["working_set"] == sum(a["distinct"] for a in line["areas"]) for line in lines)


def test_a_person_sees_mappings_and_ctrl_c_ends_it(process: subprocess.Popen[str]) -> None:
    with subprocess.Popen([sys.executable, "-m", "vmm", "watch", str(process.pid)], stdout=subprocess.PIPE,
                          text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith(f"watching {NAME} ({process.pid}): ")
        while "pages/s" not in watching.stdout.readline():
            assert watching.poll() is None
        watching.send_signal(signal.SIGINT)
        rest = watching.stdout.read()
        assert watching.wait(30) == 0
    assert "[anonymous]" in rest
    assert f"{NAME} ({process.pid}): " in rest
    assert process.poll() is None


def test_that_the_process_ends_is_said(process: subprocess.Popen[str]) -> None:
    with subprocess.Popen([sys.executable, "-m", "vmm", "watch", str(process.pid)], stdout=subprocess.PIPE,
                          text=True) as watching:
        assert watching.stdout is not None
        while "pages/s" not in watching.stdout.readline():
            assert watching.poll() is None
        process.kill()
        rest = watching.stdout.read()
        assert watching.wait(30) == 0
    assert f"process {process.pid} has ended" in rest


def test_a_trace_is_recorded_and_says_which_mapping_a_slot_is(process: subprocess.Popen[str], tmp_path: Path) -> None:
    done = vmm("trace", "record", "--pid", str(process.pid), str(tmp_path / "p.trace"), "--time", "1s", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["complete"]
    told = json.loads(vmm_here("trace", "info", str(tmp_path / "p.trace"), "--json").stdout)
    assert told["lacks"] == ["vcpus", "order"]
    assert max(told["slots"], key=lambda s: s["dirtied"])["dirtied"] == WRITTEN
    assert any(s["mapping"].endswith("[anonymous]") for s in told["slots"])
    text = vmm_here("trace", "info", str(tmp_path / "p.trace")).stdout
    assert "recorded from outside a process: one vCPU stands for all threads" in text


def test_samples_say_how_many_and_how_sure(process: subprocess.Popen[str]) -> None:
    done = vmm("watch", str(process.pid), "--sample", "--pages", "100", "--time", "500ms", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["sampled"] == 100 < told["population"]
    assert told["error_per_s"] > 0      # it is never sure, also where it has seen nothing change
    assert "±" in vmm("watch", str(process.pid), "--sample", "--time", "200ms").stdout


@pytest.mark.parametrize("option", ["--output", "--png", "--html"])
def test_samples_are_no_recording(option: str, tmp_path: Path) -> None:
    done = vmm_here("watch", "1", "--sample", option, str(tmp_path / "x"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [["a"], ["a", "b", "c"], ["--pid", "1", "a", "b"], ["--pid", "1"],
                                       ["a", "b", "--ram"], ["--pid", "1", "a", "--interval", "5ms"]])
def test_a_trace_is_of_a_machine_or_of_a_process(arguments: list[str]) -> None:
    done = vmm_here("trace", "record", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_watcher_that_is_killed_leaves_an_ordinary_process(process: subprocess.Popen[str]) -> None:
    smaps = Path(f"/proc/{process.pid}/smaps")
    with subprocess.Popen([sys.executable, "-m", "vmm", "watch", str(process.pid)], stdout=subprocess.PIPE,
                          text=True) as watching:
        assert watching.stdout is not None
        while "pages/s" not in watching.stdout.readline():
            assert watching.poll() is None
        assert " uw " in smaps.read_text()
        watching.kill()
    assert " uw " not in smaps.read_text()      # its last descriptors were closed before it was reaped
    assert process.poll() is None


UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@pytest.mark.root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_without_privileges_ones_own_processes_can_be_watched_and_no_others(process: subprocess.Popen[str]) -> None:
    command = [*UNPRIVILEGED, sys.executable, "-m", "vmm", "watch", "--time", "200ms"]
    done = subprocess.run([*command, str(process.pid)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "is not this user's to look into: run this as its user, as root, or with CAP_SYS_PTRACE" in done.stderr
    assert done.stderr.count("\n") == 1
    with subprocess.Popen([*UNPRIVILEGED, sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as own:
        assert own.stdout is not None
        assert own.stdout.readline() == "ready\n"
        done = subprocess.run([*command, str(own.pid), "--json"], capture_output=True, text=True, timeout=60,
                              check=False)
        own.kill()
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["areas"][0]["distinct"] == WRITTEN


@pytest.mark.parametrize(("arguments", "line"), [
    (["999999999"], "there is no process 999999999"),
    (["svt-nobody"], "there is no VM or process named 'svt-nobody'"),
    (["2"], "is a kernel thread"),
    (["/dev/null"], "/dev/null: is not the socket of a VM's monitor"),
    ([str(os.getpid()), "--ram"], "--ram: the process runs no VM that is known here"),
    ([str(os.getpid()), "--interval", "1ms"], "1ms is too short: must be at least 10 ms"),
    ([str(os.getpid())], "is this command itself")])
def test_what_is_refused_is_said_in_a_line(arguments: list[str], line: str) -> None:
    if arguments == ["2"] and not Path("/proc/2/stat").read_text().startswith("2 (kthreadd)"):
        pytest.skip("the second process here is no kernel thread")
    done = vmm_here("watch", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_kernel_without_it_is_said_in_a_line(process: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.consumers.watch.attach.watching_missing", lambda: "PAGEMAP_SCAN: Inappropriate ioctl")
    done = vmm_here("watch", str(process.pid))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vmm: error: PAGEMAP_SCAN: Inappropriate ioctl (vmm watch --sample works without it)\n"


def test_a_stopped_process_and_one_under_a_filter_are_refused(process: subprocess.Popen[str], tmp_path: Path) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    done = vmm_here("watch", str(process.pid))
    assert done.returncode == 2
    assert "its thread is stopped by a signal" in done.stderr
    process.send_signal(signal.SIGCONT)
    filtered = ("import pyseccomp, time\nf = pyseccomp.SyscallFilter(pyseccomp.ALLOW)\n"
                "f.add_rule(pyseccomp.KILL_PROCESS, 'userfaultfd')\nf.load()\n"
                "print('ready', flush=True)\ntime.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", filtered], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        for command in (["watch"], ["predict", "--pid"], ["trace", "record", str(tmp_path / "t"), "--pid"]):
            done = vmm_here(*command, str(other.pid))
            assert done.returncode == 2
            assert "under a seccomp filter" in done.stderr
            assert "(vmm watch --sample works without it)" in done.stderr
        assert other.poll() is None
        other.kill()
