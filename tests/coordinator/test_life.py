"""What ends a machine, what does not, and what can be read of it afterwards.

Real processes and signals; conftest.py sees to it that nothing is left behind. Kills at every step of each verb are
test_crashes.py's and test_steps.py's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from machines import alive, exact, machine_processes, nothing_left, spec, until
from places import TESTS

from ipc.shm import list_segments
from vmm.cli.commands import run
from vmm.client.machine import Machine, list_machines
from vmm.coordinator.keeper import Deaths
from vmm.errors import ExitCode, VmmError
from vmm.machine.log import LogLine, read_log
from vmm.machine.names import machine_prefix, runtime_root
from vmm.machine.records import ended_names, log_path, outcome
from vmm.machine.runtime import is_running, machine_dir
from vmm.machine.spec import MachineSpec

TIMEOUT = 60.0
pytestmark = pytest.mark.kvm


def idle(**changes: Any) -> MachineSpec:
    return spec("idle", accel="kvm", vcpus=1, milliseconds=0, timeout=None, **changes)


def vmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in this process: starting one takes longer than most of them do."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["vmm", *arguments])
        code = run()
    return subprocess.CompletedProcess(arguments, int(code), out.getvalue(), err.getvalue())


def log(name: str = "t") -> list[LogLine]:
    return list(read_log(log_path(name)))


def outcome_of(name: str) -> dict[str, Any]:
    found = outcome(name)
    assert found is not None
    return found


def coordinator(machine: Machine) -> int:
    return int(machine.status()["coordinator"]["pid"])


# --- what does not end it ------------------------------------------------------------------------


def test_an_error_of_the_coordinators_own_is_answered_with_another_one(steps: Path) -> None:
    """Not with the end of the guests; and its traceback can be read."""
    busy = spec("stamp", accel="kvm", writes=50_000, spin=200, verify=exact(0.05))
    with Machine.launch(busy, name="t") as machine:
        workers = [v["pid"] for v in machine.status()["vcpus"]]
        (steps / "fail-turn").write_text("5")
        until(lambda: machine.status()["coordinator"]["restarts"] == 1, "another coordinator")
        assert [v["pid"] for v in machine.status()["vcpus"]] == workers
        report = machine.wait(TIMEOUT)
        assert report["exit_code"] == 0
        assert report["verification"]["lost_pages"] == 0
    lines = log()
    assert any("the coordinator failed" in x.text for x in lines)
    assert any("OSError: [Errno 5]" in x.text for x in lines)
    assert any(x.source == "keeper" and "another one is taking over" in x.text for x in lines)


def test_a_verb_that_fails_fails_alone(steps: Path) -> None:
    """With a full disk, say: the verb says so in one line, and its machine runs on, with the same coordinator."""
    with Machine.launch(idle(), name="t") as machine:
        before = machine.status()["coordinator"]
        (steps / "fail-verb").write_text("28")
        with pytest.raises(VmmError, match=r"Register failed: .*No space left on device") as caught:
            machine.register("c")
        assert caught.value.exit_code is ExitCode.BAD_INPUT
        machine.register("c")
        after = machine.status()["coordinator"]
        assert (after["pid"], after["restarts"]) == (before["pid"], 0)


@pytest.mark.parametrize("step", ["verb", "report-kept"])
def test_a_kill_at_a_step_of_its_life_is_survived(steps: Path, step: str) -> None:
    with Machine.launch(idle(), name="t") as machine:
        (steps / f"kill-{step}").touch()
        machine.stop()
        assert machine.wait(TIMEOUT)["exit_code"] == ExitCode.STOPPED
        assert machine.status()["coordinator"]["restarts"] == 1
    assert nothing_left()


def test_deaths_are_counted_over_time() -> None:
    """Five within a minute are answered, however many there were before."""
    deaths = Deaths(6, 60.0)
    assert not any(deaths.too_many(15.0) for n in range(1000))
    assert [deaths.too_many(0.0) for n in range(4)] == [False, False, True, True]
    deaths = Deaths(6, 60.0)
    assert not deaths.too_many(86400.0)
    assert [deaths.too_many(1.0) for n in range(6)] == [False] * 5 + [True]
    assert not deaths.too_many(60.0)


def test_a_trace_that_cannot_be_written_ends_and_the_guest_runs_on() -> None:
    """Said once, to whoever launched it and in the log."""
    traced = spec("stamp", accel="kvm", writes=20_000, spin=200, verify=exact(0.05), trace=["kvm_dirty_ring_*"],
                  trace_file="/dev/full")
    with Machine.launch(traced, name="t") as machine:
        events = list(machine.events(TIMEOUT))
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        assert machine.status()["coordinator"]["restarts"] == 0
    said = [e["text"] for e in events if e["event"] == "warning"]
    assert said == ["tracing has ended: /dev/full cannot be written: No space left on device"]
    assert [x.text for x in log() if x.level == "warning"] == said


def test_trace_lines_that_nobody_reads_hold_nobody_up(tmp_path: Path) -> None:
    """A launch whose standard error is a pipe that is full: the guest runs to its end all the same."""
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "from machines import spec\nfrom vmm.client.machine import Machine\n"
              "traced = spec('stamp', accel='kvm', writes=20_000, spin=200, trace=['kvm_dirty_ring_*'])\n"
              "with Machine.launch(traced, name='t') as m:\n    print(m.wait(60)['exit_code'], flush=True)\n")
    process = subprocess.Popen([sys.executable, "-c", script, str(TESTS)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.wait(TIMEOUT)
    assert b" kvm_dirty_ring_page " in process.stderr.read()
    process.stdout.close()
    process.stderr.close()


def test_a_machine_without_a_place_for_its_log_runs_and_says_so(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "x"))
    with Machine.launch(idle(), name="t") as machine:
        assert [w for w in machine.warnings if "no log and no report will be kept" in w]
        machine.stop()
        assert machine.wait(TIMEOUT)["exit_code"] == ExitCode.STOPPED
    assert outcome("t") is None
    said = vmm("logs", "t")
    assert (said.returncode, said.stderr) == (ExitCode.NO_MACHINE,
                                              "vmm: error: no machine named 't' (none is running)\n")


# --- what ends it --------------------------------------------------------------------------------


def test_coordinators_that_die_again_and_again_end_the_machine_with_a_reason() -> None:
    """Nobody can take over any more: it is torn down, the launching process and the log are told why."""
    with Machine.launch(spec("idle", accel="kvm", milliseconds=0, timeout=None), name="t") as machine:
        (machine_dir("t") / "image").unlink()
        os.kill(coordinator(machine), signal.SIGKILL)
        report = machine.wait(TIMEOUT)
    assert (report["state"], report["exit_code"]) == ("ended", ExitCode.WORKER_DIED)
    assert "6 coordinators died within 60 s of running time" in report["cause"]
    assert outcome("t") == report
    lines = log()
    assert sum("another one is taking over" in x.text for x in lines) == 5
    assert any(report["cause"] in x.text for x in lines)
    assert any("guest image" in x.text for x in lines)      # what each of them died of
    assert nothing_left()


def test_a_kill_after_the_decision_brings_no_successor(steps: Path) -> None:
    """The machine is being torn down: nobody could carry on."""
    (steps / "kill-done-said").touch()
    with Machine.launch(idle(), name="t") as machine:
        machine.stop()
        assert machine.wait(TIMEOUT)["exit_code"] == ExitCode.STOPPED
        machine.release()
        until(nothing_left, "all of it gone")
    assert not any("taking over" in x.text for x in log())


def test_a_coordinator_that_stands_still_does_not_keep_its_machine(steps: Path) -> None:
    """By force, at once."""
    machine = Machine.launch(idle(), name="t", detach=True)
    os.kill(coordinator(machine), signal.SIGSTOP)
    machine.detach()
    done = vmm("stop", "t", "--force")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "t has ended: ended by force (exit status 8; see vmm status t)\n"
    assert machine._keeper is not None
    machine._keeper.wait(TIMEOUT)
    assert nothing_left()


@pytest.mark.timeout(180)
def test_close_ends_a_machine_whose_coordinator_stands_still() -> None:
    machine = Machine.launch(idle(), name="t")
    os.kill(coordinator(machine), signal.SIGSTOP)
    machine.close()
    assert nothing_left()
    assert any("did not end within" in x.text for x in log())


def test_a_launch_that_fails_late_leaves_nothing(steps: Path) -> None:
    """The machine is ready, its start is not carried out."""
    (steps / "fail-verb").write_text("28")
    with pytest.raises(VmmError, match="Start failed"):
        Machine.launch(idle(), name="t")
    assert nothing_left()


@pytest.mark.parametrize("victim", ["keeper", "coordinator"])
def test_a_kill_during_a_launch_leaves_nothing(victim: str) -> None:
    """As soon as there is something that could be left: before a worker is there, mostly."""
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "from machines import spec\nfrom vmm.client.machine import Machine\n"
              "idle = spec('idle', accel='kvm', vcpus=2, milliseconds=0, timeout=None)\n"
              "Machine.launch(idle, name='t').close()\n")
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, str(TESTS)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            until(lambda: bool(list_segments(machine_prefix("t"))), "segments are being made", 60.0)
            keeper, *rest = machine_processes("t")
            named = [p for p in rest if Path(f"/proc/{p}/comm").read_text().strip() == "vmm-coordinator"]
            os.kill(keeper if victim == "keeper" else named[0], signal.SIGKILL)
        finally:
            process.communicate(timeout=TIMEOUT)
        until(nothing_left, "all of it gone")


def test_a_killed_keepers_machine_leaves_no_directory_either() -> None:
    machine = Machine.launch(idle(), name="t")
    assert machine._keeper is not None
    pid = coordinator(machine)
    os.kill(pid, signal.SIGSTOP)        # it clears up, but not at once
    machine._keeper.kill()
    closing = threading.Thread(target=machine.close)
    closing.start()
    closing.join(0.3)
    waits = closing.is_alive()
    os.kill(pid, signal.SIGCONT)
    closing.join(TIMEOUT)
    assert waits
    assert nothing_left()
    assert outcome_of("t")["exit_code"] == ExitCode.STOPPED


def test_a_detached_machine_belongs_to_its_launch_until_it_runs() -> None:
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "from machines import spec\nfrom vmm.client.machine import Machine\n"
              "idle = spec('idle', accel='kvm', milliseconds=0, timeout=None)\n"
              "m = Machine.launch(idle, name='t', detach=True, start=False)\n"
              "print('ready', flush=True)\nsys.stdin.readline()\nm.start()\n"
              "print('runs', flush=True)\nsys.stdin.readline()\n")

    def launch() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", script, str(TESTS)],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    def kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.communicate(timeout=TIMEOUT)

    kill(launch())
    until(nothing_left, "it was never started: all of it gone")
    assert outcome_of("t")["cause"] == "stopped: the process that launched it has ended, before it was started"
    process = launch()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"runs\n"
    kill(process)
    with Machine.attach("t") as machine:
        assert machine.status()["state"] == "running"
        machine.stop()
        machine.wait(TIMEOUT)
        machine.release()
    until(nothing_left, "all of it gone")


@pytest.mark.parametrize("how", ["removed", "moved", "root moved"])
def test_a_machine_whose_runtime_directory_is_gone_ends(how: str, tmp_path: Path) -> None:
    """Nobody could reach it any more, nor end it."""
    machine = Machine.launch(idle(), name="t", detach=True)
    runtime_root().joinpath("other").mkdir()
    runtime_root().joinpath("other").rmdir()        # somebody else's: that means nothing
    pids = [coordinator(machine), *(v["pid"] for v in machine.status()["vcpus"])]
    machine.detach()
    if how == "removed":
        shutil.rmtree(machine_dir("t"))
    else:
        path = machine_dir("t") if how == "moved" else runtime_root()
        path.rename(path.with_name("moved"))
    until(lambda: not any(alive(p) for p in pids), "its processes gone")
    assert machine._keeper is not None
    machine._keeper.wait(TIMEOUT)
    assert nothing_left()
    assert any("runtime directory was removed" in x.text for x in log())
    assert outcome_of("t")["cause"] == "stopped: its runtime directory was removed"
    if how != "removed":
        shutil.rmtree(path.with_name("moved"))
    with contextlib.suppress(FileNotFoundError):
        runtime_root().rmdir()


# --- idle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", ["auto-left", "owner-of-a-pause-gone", "follower-gone"])
def test_an_idle_machine_idles(situation: str) -> None:
    """The coordinator's loop turns when something has come or is due, and not otherwise. Each of these once had it
    turn for ever: some 10,000 times a second."""
    with Machine.launch(idle(), name="t", start=situation != "owner-of-a-pause-gone") as machine:
        if situation == "auto-left":
            machine.set_tracking("auto")
            machine.register("c")
            machine.unregister("c")
            machine.set_tracking("bitmap")
        elif situation == "owner-of-a-pause-gone":
            child = subprocess.run([sys.executable, "-c", "from vmm.client.machine import Machine\n"
                                                          "Machine.attach('t').paused('a test').__enter__()\n"
                                                          "import os; os._exit(0)"], check=True)
            assert child.returncode == 0
        else:
            with Machine.attach("t") as other:
                assert next(other.events(0.05), None) is None
        while next(machine.events(0.1), None) is not None:
            pass
        before = machine.status()["coordinator"]["turns"]
        # A while in which nothing happens; 5 s after its last client tracking auto would change.
        assert next(machine.events(6.0 if situation == "auto-left" else 1.0), None) is None
        turns = machine.status()["coordinator"]["turns"] - before
    assert turns < 100


# --- what can be read ----------------------------------------------------------------------------


@pytest.fixture
def chatty(tmp_path: Path) -> list[str]:
    """A guest that prints 3,000 lines, as arguments of ``vmm launch``."""
    source, built = tmp_path / "g.s", tmp_path / "g"
    source.write_text("""
        .globl _start
_start: mov $0x3f8, %edx
        mov $3000, %ecx
1:      mov %ecx, %ebx
        mov $8, %esi
2:      rol $4, %ebx
        mov %ebx, %eax
        and $15, %eax
        add $'a', %eax
        out %al, %dx
        dec %esi
        jnz 2b
        mov $10, %al
        out %al, %dx
        dec %ecx
        jnz 1b
        xor %eax, %eax
        out %eax, $0xf4
""")
    for command in (["as", source, "-o", tmp_path / "g.o"],
                    ["ld", "-Ttext", "0x200000", "-static", "-o", built, tmp_path / "g.o"]):
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            pytest.skip(f"'{command[0]}' is not installed (Debian: apt install binutils)")
    (tmp_path / "g.yaml").write_text(f"vcpus: 1\nmemory: [{{size: 8MiB}}]\nguest: {{image: {built}}}\n"
                                     "timeout: 50s\n")
    return ["launch", str(tmp_path / "g.yaml"), "--name", "t"]


def wanted() -> list[str]:
    """What that guest prints."""
    return ["".join(chr(97 + (n >> shift & 15)) for shift in range(28, -1, -4)) for n in range(3000, 0, -1)]


def test_a_launch_that_stands_still_for_a_while_misses_no_line(chatty: list[str], tmp_path: Path) -> None:
    """Nor the end: it was not told of it meanwhile."""
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "vmm", *chatty], stdout=out, stderr=subprocess.STDOUT)
        until(lambda: is_running("t"), "launched", 60.0)
        until(lambda: (tmp_path / "out").stat().st_size > 0 or process.poll() is not None, "the first line", 60.0)
        process.send_signal(signal.SIGSTOP)
        until(lambda: process.poll() is not None or all(m["state"] == "ended" for m in list_machines()),
              "the guest has ended meanwhile", 60.0)
        process.send_signal(signal.SIGCONT)
        assert process.wait(TIMEOUT) == 0
    text = (tmp_path / "out").read_text()
    assert [line.removeprefix("[vcpu 0] ") for line in text.splitlines() if line.startswith("[vcpu")] == wanted()


def test_a_detached_machines_output_and_outcome_can_be_read(chatty: list[str]) -> None:
    assert vmm(*chatty, "--detach").returncode == 0
    followed = vmm("logs", "t", "--follow", "--console")
    assert followed.returncode == 0
    assert [line.removeprefix("[vcpu 0] ") for line in followed.stdout.splitlines()] == wanted()
    assert vmm("wait", "t").returncode == 0
    assert vmm("logs", "t", "--console").stdout == followed.stdout
    lines = [json.loads(line) for line in vmm("logs", "t", "--json").stdout.splitlines()]
    assert [x["text"] for x in lines if x["source"] == "vcpu0"] == wanted()
    assert {"keeper", "coordinator"} <= {x["source"] for x in lines}


@pytest.fixture
def crash(tmp_path: Path) -> Path:
    """A machine whose guest crashes at once: there is nothing but zeros at its entry, which is a store to address
    RAX."""
    (tmp_path / "zeros").write_bytes(bytes(4096))
    (tmp_path / "c.yaml").write_text(f"vcpus: 1\nmemory: [{{size: 8MiB}}]\ntimeout: 50s\n"
                                     f"guest: {{image: {tmp_path / 'zeros'}, address: 0x200000}}\n")
    return tmp_path / "c.yaml"


def test_a_detached_guest_that_crashed_at_once_is_found_out(crash: Path) -> None:
    assert vmm("launch", str(crash), "--name", "t", "--detach").returncode == 0
    waited = vmm("wait", "t", "--json", "--timeout", "50s")
    report = json.loads(waited.stdout)
    assert waited.returncode == report["exit_code"] == ExitCode.GUEST_CRASHED
    assert report["state"] == "ended"
    assert report["cause"].startswith("vCPU 0: ")
    until(lambda: not is_running("t"), "its keeper has gone")
    assert vmm("wait", "t").returncode == ExitCode.GUEST_CRASHED    # once more: it has ended already
    assert json.loads(vmm("status", "t", "--json").stdout) == report
    shown = vmm("status", "t")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert report["cause"] in shown.stdout
    assert vmm("list").stdout == "no machine is running\n"
    listed = vmm("list", "--all")
    assert "ended (4)" in listed.stdout
    assert json.loads(vmm("list", "--all", "--json").stdout) == [report]
    paused = vmm("pause", "t")
    assert paused.returncode == ExitCode.NO_MACHINE
    assert report["cause"] in paused.stderr
    assert "vmm logs t" in paused.stderr
    assert len(paused.stderr.splitlines()) == 1
    assert vmm("gc", "t").stdout == "nothing was left behind\n"
    assert ended_names() == ["t"]
    assert vmm("gc", "--logs", "t").returncode == 0
    assert ended_names() == []


def test_stopping_says_how_it_ended_and_waiting_has_an_end() -> None:
    machine = Machine.launch(idle(), name="t", detach=True)
    try:
        waited = vmm("wait", "t", "--timeout", "100ms")
        assert (waited.returncode, waited.stderr) == (ExitCode.TIMEOUT,
                                                      "vmm: error: machine 't' is still running after 0.1 s\n")
        os.kill(machine.status()["vcpus"][0]["pid"], signal.SIGSTOP)    # (it is killed when it does not end)
    finally:
        os.kill(machine.status()["vcpus"][0]["pid"], signal.SIGCONT)
        machine.detach()
        stopped = vmm("stop", "t")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout == "t has ended: stopped on request (exit status 8; see vmm status t)\n"
    assert machine._keeper is not None
    assert machine._keeper.wait(TIMEOUT) == ExitCode.STOPPED
    again = vmm("stop", "t")
    assert again.returncode == ExitCode.NO_MACHINE
    assert "is no longer running: stopped on request" in again.stderr
    assert vmm("stop", "--force", "t").returncode == ExitCode.NO_MACHINE


def test_a_dead_vcpu_is_seen_in_the_list() -> None:
    with Machine.launch(spec("idle", accel="kvm", milliseconds=0, timeout=None), name="t") as machine:
        assert "dead" not in vmm("list").stdout
        os.kill(machine.status()["vcpus"][1]["pid"], signal.SIGKILL)
        until(lambda: machine.status()["vcpus"][1]["state"] == "dead", "death seen")
        assert "running (1 vCPU dead)" in vmm("list").stdout


def test_a_program_that_only_syncs_keeps_no_events(chatty: list[str]) -> None:
    """And one that reads them later has all that are kept, and is told of the rest."""
    from vmm.client.config import load_config

    with Machine.launch(load_config(chatty[1]), name="t") as machine:
        machine.register("c")
        while machine.status()["state"] != "ended":
            if machine.status()["state"] == "running":
                machine.take("c")
            assert len(machine._client._events) == 0
        lines = [e for e in machine.events(TIMEOUT) if e["event"] in ("console", "dropped")]
    text = "".join(e["data"] for e in lines if e["event"] == "console")
    assert text.splitlines() == wanted()
