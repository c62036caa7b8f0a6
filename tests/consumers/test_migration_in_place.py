"""Machines whose memory is handed over as it lies there, on one host: nothing is copied, and no two run with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machines import ACCELS, nothing_left, replace, runs, spec, until
from migrations import TIMEOUT, WALK, PlayedSource, Receiver, goes_on, receiver_process, spec_of, vmm
from packages import unpacked
from test_handover import Watch, killed

from ipc.shm import SHM_DIRECTORY
from ipc.steps import STEPS
from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import source as source_module
from vmm.consumers.migration import wire
from vmm.consumers.migration.proof import proof
from vmm.errors import ExitCode, VmmError
from vmm.machine.spec import RamSlot, VerifySpec
from vmm.migrate import MigrationError, Options

IN_PLACE = Options(in_place=True)
def inode(machine: Machine) -> int:
    return os.stat(SHM_DIRECTORY / machine.ram_segment(0).removeprefix("/")).st_ino


@pytest.mark.parametrize("target", ACCELS)
def test_a_machine_that_is_handed_on_ends_as_one_that_was_never_moved(accel: str, target: str, address: str) -> None:
    work = spec("random", accel=accel, mib=8, writes=400_000 if accel == "kvm" else 150_000)
    with Machine.launch(work) as machine:
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        expected = machine.ram(0).tobytes()
    receiver = Receiver(address, accel=target)
    with Machine.launch(replace(work, dirty_quota=20)) as machine:
        memory = inode(machine)
        report = migrate.migrate(machine, address, IN_PLACE)
        with receiver.result() as moved:
            assert inode(moved) == memory
            moved.dirty_limit(0)
            assert moved.wait(TIMEOUT)["exit_code"] == 0
            assert moved.ram(0).tobytes() == expected
            assert machine.wait(TIMEOUT)["vcpus"][0]["exit_reason"] == "stopped"
    assert report.status == "completed"
    assert (report.ram.transferred, report.ram.normal, report.rounds) == (0, 0, [])
    assert 0 < report.downtime < report.total_time


def test_a_verified_machine_stays_verified(accel: str, address: str) -> None:
    """The one that it was does not compare memory that another writes to."""
    receiver = Receiver(address, accel=accel)
    with Machine.launch(replace(WALK, accel=accel, verify=VerifySpec(interval=0.05))) as machine:
        until(lambda: machine.status()["verification"]["rounds"] > 1, "it is verified")
        migrate.migrate(machine, address, IN_PLACE)
        with receiver.result() as moved:
            until(lambda: moved.status()["verification"]["rounds"] > 1, "it is verified there")
            moved.stop()
            there, here = moved.wait(TIMEOUT), machine.wait(TIMEOUT)
    assert there["exit_code"] == here["exit_code"] == ExitCode.STOPPED, (there["cause"], here["cause"])
    assert there["verification"]["ok"]
    assert here["verification"]["ok"]


_ELSEWHERE = """
mkdir $1 && cp /dev/shm/shardvmm.*.source.* $1 && mount -t tmpfs none /dev/shm && cp $1/* /dev/shm
exec $0 -m vmm receive $2 --name target --accel unicorn
"""


@pytest.mark.root
def test_segments_of_the_same_names_elsewhere_are_not_the_machines(address: str, tmp_path: Path) -> None:
    """In another container, which has a /dev/shm of its own."""
    with Machine.launch(WALK) as machine:
        process = subprocess.Popen(["unshare", "-m", "sh", "-ec", _ELSEWHERE, sys.executable, str(tmp_path / "copies"),
                                    address], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            assert "waiting at" in process.stderr.readline()
            with pytest.raises(MigrationError, match="has another /dev/shm than the target"):
                migrate.migrate(machine, address, IN_PLACE)
            goes_on(machine)
        finally:
            process.terminate()
            process.wait(TIMEOUT)
            process.stderr.close()


def test_there_and_back_and_copied_in_between(accel: str, runtime_dir: Path) -> None:
    """Under the name that it had before, too: what is left of the first is not in the way."""
    machine, name = Machine.launch(replace(WALK, accel=accel, name="a")), "a"
    for number, (to, options) in enumerate([("b", IN_PLACE), ("a", IN_PLACE), ("c", Options()), ("a", IN_PLACE)]):
        receiver = Receiver(f"ipc://{runtime_dir}/{number}", accel=accel, name=to)
        migrate.migrate(machine, f"ipc://{runtime_dir}/{number}", options)
        moved = receiver.result()
        machine.close()
        until(lambda before=name: nothing_left(before), "nothing is left of the source")
        machine, name = moved, to
        assert runs(machine)
    machine.close()
    assert nothing_left("a")


@pytest.mark.kvm
def test_a_linux_program_goes_on_where_it_was(address: str, tmp_path: Path) -> None:
    shutil.copy(unpacked("busybox-static") / "bin/busybox", tmp_path / "busybox")
    count = "echo ready; i=0; while [ $i -lt 2000000 ]; do i=$((i+1)); done; echo counted $i"
    process = vmm("run", "--root", str(tmp_path), "--name", "source", "--", "/busybox", "sh", "-c", count)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    receiver = receiver_process(address, "--root", str(tmp_path))
    with Machine.attach("source") as machine:
        migrate.migrate(machine, address, IN_PLACE)
    process.communicate(timeout=TIMEOUT)
    out, _ = receiver.communicate(timeout=TIMEOUT)
    assert "counted 2000000" in out
    assert receiver.returncode == 0


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_what_cannot_be_handed_over_in_place_is_one_line(address: str) -> None:
    with Machine.launch(WALK) as machine:
        for where, options, why in (("tcp://127.0.0.1:1", Options(in_place=True, insecure=True), "use ipc://PATH"),
                                    (address, Options(in_place=True, postcopy=True), "leave out the post-copy")):
            with pytest.raises(VmmError, match=why):
                migrate.migrate(machine, where, options)
        goes_on(machine)


FOREIGN = [
    ({0: "/etc/passwd"}, "not a machine's"), ({0: "/../shm/shardvmm.0.0.a.ram0.0"}, "not a machine's"),
    ({1: "/shardvmm.0.00000000.a.ram1.0"}, "other slots"), ({0: "/shardvmm.0.00000000.gone.ram0.0"}, "cannot open"),
    ({0: "OTHER"}, "bytes, expected 4194304"),
]


def test_segments_that_are_not_the_machines_memory_are_refused(address: str) -> None:
    with Machine.launch(WALK) as machine:
        machine.pause()
        receiver = Receiver(address, accel="unicorn")
        for segments, why in FOREIGN:
            if not receiver.is_alive():     # it had begun to make the machine
                receiver = Receiver(address, accel="unicorn")
            with PlayedSource(address) as source, proof("source", source.token) as proven:
                named = {slot: machine.ram_segment(0) if name == "OTHER" else name for slot, name in segments.items()}
                source.offer(replace(spec_of(machine), slots=[RamSlot(0, 0, 4 << 20)]), segments=named,
                             proof=proven)
                assert why in refusal(source)
            refused_or_ended(receiver, why)
        assert machine.status()["state"] == "paused"


def refused_or_ended(receiver: Receiver, why: str) -> None:
    """It goes on with the next, or it had begun to make the machine."""
    until(lambda: why in str(receiver.refused) or not receiver.is_alive(), why, TIMEOUT)
    if why not in str(receiver.refused):
        assert why in receiver.failure()


def refusal(source: PlayedSource) -> str:
    """Whatever else it says before."""
    while True:
        assert source.sock.poll(int(TIMEOUT * 1000))
        answer = wire.decode_answer(source.sock.recv_multipart())
        if isinstance(answer, wire.Refused):
            return answer.error


# --- never two, never none ------------------------------------------------------------------------------------------


# (With a source that is killed: test_handover.py.)


@pytest.mark.parametrize("step", STEPS["migration, its target"])
def test_after_a_receiver_was_killed_the_source_runs_only_with_memory_that_nobody_has_taken(
        step: str, steps: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_NOBODY_PATIENCE", 1.0)
    with Machine.launch(WALK) as machine, Watch():
        (steps / f"kill-{step}").touch()
        process = receiver_process(address, "--accel", "unicorn")
        with pytest.raises(MigrationError, match="was handed over and stays paused here"):
            migrate.migrate(machine, address, IN_PLACE)
        killed(process)
        until(lambda: nothing_left("target"), "the target's machine is gone")
        if step == "receive-commit":
            machine.resume(force=True)
            goes_on(machine)
        else:
            with pytest.raises(VmmError, match=r"its memory has been taken there: it cannot run here again"):
                machine.resume(force=True)
            assert machine.status()["state"] == "paused"
