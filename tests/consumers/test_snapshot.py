"""Snapshots. The oracle is the guest's own work: after any chain of snapshots and restores, on either
accelerator, it ends with the memory of a run that was never stopped."""

from __future__ import annotations

import base64
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command import vmm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import ACCELS, exact, replace, spec, until

from ipc.shm import list_segments, room
from ipc.steps import STEPS
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.consumers.snapshot import SnapshotError
from vmm.consumers.snapshot.heat import unpacked
from vmm.consumers.snapshot.manifest import write_manifest
from vmm.consumers.snapshot.pagefile import PAGE, PageFileError, PageWriter, compress, read_pages
from vmm.errors import ExitCode, VmmError
from vmm.machine.names import machine_prefix
from vmm.machine.spec import MachineSpec

TIMEOUT = 60.0


# --- page files ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pages=st.integers(1, 200), writes=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 3)), max_size=60),
       packed=st.booleans())
def test_a_page_file_gives_back_what_was_written_last(tmp_path: Path, pages: int,
                                                      writes: list[tuple[int, int]], packed: bool) -> None:
    """Model: a dict. Value 0 is a zero page, also over one that was not."""
    model: dict[int, int] = {}
    memory = np.zeros(pages * PAGE, np.uint8)
    with PageWriter(tmp_path, "f", pages) as writer:
        for page, value in writes:
            if page < pages:
                memory[page * PAGE:(page + 1) * PAGE] = value
                model[page] = value
                writer.write(memory, np.array([page]))
        done = writer.finish()
    (tmp_path / "f.zst").unlink(missing_ok=True)
    if packed:
        compress(tmp_path, "f")
    found = {}
    copy = np.full(pages * PAGE, 9, np.uint8)
    for first, count in read_pages(tmp_path, "f", pages, str(done["checksum"]), copy):
        for page in range(first, first + count):
            assert len(set(copy[page * PAGE:(page + 1) * PAGE])) == 1
            found[page] = copy[page * PAGE]
    assert found == model
    assert done["pages"] == len(model)
    assert done["zero_pages"] == sum(v == 0 for v in model.values())


def test_zero_pages_are_holes(tmp_path: Path) -> None:
    memory = np.zeros(1000 * PAGE, np.uint8)
    memory[500 * PAGE] = 1
    with PageWriter(tmp_path, "f", 1000) as writer:
        writer.write(memory, np.arange(1000))
        writer.finish()
    assert (tmp_path / "f.mem").stat().st_size == 1000 * PAGE
    assert (tmp_path / "f.mem").stat().st_blocks * 512 <= 16 * PAGE


# --- the guest's own work ----------------------------------------------------------------------------------------


def undisturbed(machine_spec: MachineSpec) -> bytes:
    """Slot 0 as this guest leaves it, whenever it is let run: each is run once."""
    return _left_by(msgspec.json.encode(machine_spec))


@functools.cache
def _left_by(machine_spec: bytes) -> bytes:
    with Machine.launch(msgspec.json.decode(machine_spec, type=MachineSpec)) as machine:
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        return machine.ram(0).tobytes()


def ends_as(machine: Machine, expected: bytes) -> None:
    report = machine.wait(TIMEOUT)
    assert report["exit_code"] == 0, report
    assert machine.ram(0).tobytes() == expected


#: Work that takes about a second, for KVM and for the software CPU.
WORK = {
    "random": ({"writes": 600_000, "spin": 20}, {"writes": 120_000, "spin": 50}),
    "counter": ({"increments": 25_000_000, "mode": 0}, {"increments": 3_000_000, "mode": 0}),
    "pingpong": ({"turns": 2000}, {"turns": 2000}),
}


@contextmanager
def caught(work: MachineSpec) -> Iterator[Machine]:
    """A machine that does this work, paused in the middle of it."""
    for _ in range(10):
        with Machine.launch(work) as machine:
            with suppress(VmmError):        # "has ended": this process was not let run meanwhile
                machine.pause()
            if any(v["state"] == "paused" for v in machine.status()["vcpus"]):
                yield machine
                return
    pytest.fail("the work was done before it could be paused")


def snapshots_in_the_middle(machine: Machine, directory: Path) -> int:
    """Of a paused machine, which runs on meanwhile: full, live, incremental, compressed, as many as the guest's
    work leaves time for; how many."""
    snapshot.create(machine, directory)
    machine.resume()
    kinds: list[dict[str, Any]] = [{"incremental": True, "live": True},
                                   {"incremental": True, "compression": "zstd"}, {"live": True}]
    done = 1
    with suppress(VmmError):        # "has ended"
        for kind in kinds:
            snapshot.create(machine, directory, **kind)
            done += 1
    return done


@pytest.mark.parametrize("target", ACCELS)
@pytest.mark.parametrize("workload", sorted(WORK))
def test_a_restored_machine_ends_as_one_that_was_never_stopped(accel: str, target: str, workload: str,
                                                               tmp_path: Path) -> None:
    """Snapshots in the middle of the work, restored on either accelerator."""
    work = spec(workload, accel=accel, mib=4, ring=1024, **WORK[workload][accel == "unicorn"])
    expected = undisturbed(work)
    with caught(work) as machine:
        taken = snapshots_in_the_middle(machine, tmp_path / "s")
        ends_as(machine, expected)
    assert len(snapshot.list_snapshots(tmp_path / "s")) == taken
    manifests = snapshot.verify(tmp_path / "s")
    assert manifests[0].pages == (4 << 20) // PAGE + 3
    with snapshot.restore(tmp_path / "s", machine_name="again", accel=target) as machine:
        ends_as(machine, expected)
    if workload == "random" and accel == "kvm" and manifests[-1].id != "0001":
        with snapshot.restore(tmp_path / "s", "0001", machine_name="again", accel=target) as machine:
            ends_as(machine, expected)


@pytest.mark.parametrize(("accel", "vcpus", "ring"), [
    pytest.param("kvm", 1, 65536, marks=pytest.mark.kvm), pytest.param("kvm", 8, 1024, marks=pytest.mark.kvm),
    pytest.param("kvm", 3, 0, marks=pytest.mark.kvm), ("unicorn", 3, 0)])
def test_any_number_of_vcpus_and_any_ring(accel: str, vcpus: int, ring: int, tmp_path: Path) -> None:
    writes = (1_200_000 if accel == "kvm" else 240_000) // vcpus
    work = spec("random", accel=accel, mib=8, vcpus=vcpus, ring=ring, writes=writes, spin=30)
    expected = undisturbed(work)
    with caught(work) as machine:
        snapshots_in_the_middle(machine, tmp_path / "s")
    with snapshot.restore(tmp_path / "s", machine_name="again", accel=accel) as machine:
        ends_as(machine, expected)


def test_a_verified_machine_stays_verified_after_a_restore(accel: str, tmp_path: Path) -> None:
    work = spec("stamp", accel=accel, mib=8, writes=200_000, spin=50, verify=exact(0.05))
    with Machine.launch(work) as machine:
        snapshot.create(machine, tmp_path / "s", live=True)
    with snapshot.restore(tmp_path / "s", accel=accel) as machine:
        result = machine.wait(TIMEOUT)["verification"]
        assert result["rounds"] >= 2
        assert (result["lost_pages"], result["surplus_pages"]) == (0, 0)


@pytest.fixture
def endless(accel: str) -> Iterator[Machine]:
    """Some thousand writes per second, which leave the host's processors to others."""
    busy = spec("random", accel=accel, mib=8, writes=0, timeout=None)
    with Machine.launch(replace(busy, dirty_quota=4000)) as machine:
        yield machine


def memory_of(directory: Path, name: str | None = None) -> bytes:
    """Slot 0 as the chain has it."""
    memory = np.zeros(0, np.uint8)
    for manifest in snapshot.chain(directory, name):
        slot = manifest.slots[0]
        memory = memory if len(memory) else np.zeros(slot.size, np.uint8)
        for _ in read_pages(directory / manifest.id, "slot0", slot.size // PAGE, slot.checksum, memory):
            pass
    return memory.tobytes()


def test_the_chain_is_the_memory_and_nobody_elses_pages_are_taken(endless: Machine, tmp_path: Path) -> None:
    endless.register("other")
    endless.pause()
    before = endless.ram(0).copy()
    endless.sync("other")
    endless.resume()
    for i in range(4):
        snapshot.create(endless, tmp_path / "s", incremental=i > 0, live=i == 2)
    endless.pause()
    snapshot.create(endless, tmp_path / "s", incremental=True)
    after = endless.ram(0).copy()
    assert memory_of(tmp_path / "s") == after.tobytes()
    assert endless.status()["state"] == "paused"        # somebody had paused it: it stays so
    dirty = {p for first, n in endless.sync("other").slots[0] for p in range(first, first + n)}
    changed = set(np.flatnonzero((before.reshape(-1, PAGE) != after.reshape(-1, PAGE)).any(axis=1)).tolist())
    assert changed <= dirty
    assert len([c for c in endless.status()["clients"] if c.startswith("snap")]) == 1


@pytest.mark.parametrize("live", [False, True])
def test_what_the_host_writes_while_a_snapshot_is_taken_is_in_it_or_in_the_next(endless: Machine, tmp_path: Path,
                                                                                live: bool) -> None:
    """From the progress callback: after each piece that is copied, before it and behind it."""
    directory = tmp_path / "s"
    size = len(endless.ram(0))
    with Machine.attach(endless.name) as host:
        def write(done: int, total: int) -> None:
            for at in (64 * PAGE, size - PAGE):     # copied at once; the guest does not use them
                host.write(at, f"HOST {done} of {total}".encode())

        for incremental in (False, True):
            snapshot.create(endless, directory, live=live, incremental=incremental, progress=write)
    endless.pause()
    snapshot.create(endless, directory, incremental=True)
    assert endless.read(size - PAGE, 5) == b"HOST "
    assert memory_of(directory) == endless.ram(0).tobytes()


def test_a_live_snapshot_writes_no_page_while_the_guest_stands_still(endless: Machine, tmp_path: Path) -> None:
    """What is copied last goes to memory first."""
    states = []
    with Machine.attach(endless.name) as other:
        for incremental in (False, True):
            snapshot.create(endless, tmp_path / "s", live=True, incremental=incremental,
                            progress=lambda done, total: states.append(other.status()["state"]))
    assert set(states) == {"running"}
    endless.pause()
    snapshot.create(endless, tmp_path / "s", incremental=True)
    assert memory_of(tmp_path / "s") == endless.ram(0).tobytes()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_one_that_is_interrupted_leaves_nothing(endless: Machine, tmp_path: Path, live: bool, at: int) -> None:
    """Ctrl-C, when it has told how far it is for the n-th time, if it does so as often."""
    directory = tmp_path / "s"
    snapshot.create(endless, directory)
    told = iter(range(100))

    def interrupt(done: int, total: int) -> None:
        if next(told) == at:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        snapshot.create(endless, directory, live=live, progress=interrupt)
        assert next(told) <= at
    assert [n for n in os.listdir(directory) if n.startswith(".")] == []
    assert endless.status()["state"] == "running"
    assert len([c for c in endless.status()["clients"] if c.startswith("snap")]) == 1
    endless.pause()
    snapshot.create(endless, directory, incremental=True)
    assert memory_of(directory) == endless.ram(0).tobytes()


def test_ctrl_c_on_the_command_line_leaves_nothing_either(endless: Machine, tmp_path: Path) -> None:
    directory = tmp_path / "s"
    command = subprocess.Popen([sys.executable, "-m", "vmm", "snapshot", "create", endless.name, str(directory),
                                "--live", "--working-set", "100s"], stderr=subprocess.PIPE, text=True)
    until(lambda: any(c.startswith("snapwatch") for c in endless.status()["clients"]), "it has begun")
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=TIMEOUT)
    assert (command.returncode, err.strip()) == (128 + signal.SIGINT, ""), err
    assert os.listdir(directory) == []
    assert endless.status()["state"] == "running"
    assert [c for c in endless.status()["clients"] if c.startswith("snap")] == []
    assert [h for h in endless.status()["holders"] if h["pid"]] == []


@pytest.mark.parametrize("how", ["live", "watched"])
def test_what_was_in_use_is_in_the_snapshot_and_stays_there(accel: str, how: str, tmp_path: Path) -> None:
    """Two vCPUs, each of which writes to the first pages of its share only; and so do its incremental successors, the
    merged one, and no snapshot of a guest that stood still."""
    directory = tmp_path / "s"
    busy = spec("random", accel=accel, mib=32, vcpus=1, pages=256, writes=0, timeout=None)
    with Machine.launch(replace(busy, dirty_quota=4000)) as machine:
        def used(taken: snapshot.Manifest) -> list[int]:
            return np.flatnonzero(unpacked(taken.slots[0].working_set, taken.slots[0].size // PAGE)).tolist()

        machine.register("oracle")
        first = snapshot.create(machine, directory, live=how == "live", working_set=0.4 if how == "watched" else 0.0)
        seen = {page // 64 for start, count in machine.sync("oracle").slots[0] for page in range(start, start + count)}
        assert set(used(first)) <= seen
        assert len(seen) < 16
        assert used(first) or how == "live"     # of which nothing was dirtied while it was copied
        second = snapshot.create(machine, directory, incremental=True, working_set=0.4)
        assert 0 < len(used(second)) < 16
        machine.pause()
        assert used(snapshot.create(machine, directory, incremental=True)) == []
    snapshot.merge(directory, "0002")
    assert used(snapshot.chain(directory, "0002")[-1]) == used(second)


@pytest.mark.parametrize("text", ["x", "eA==", base64.b64encode(zlib.compress(bytes(31))).decode(),
                                  base64.b64encode(zlib.compress(bytes(1 << 24))).decode()])
def test_a_working_set_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with Machine.launch(spec("idle", accel="unicorn", mib=8, milliseconds=0, timeout=None)) as machine:
        taken = snapshot.create(machine, tmp_path / "s")
    slots = [msgspec.structs.replace(taken.slots[0], working_set=text)]
    write_manifest(tmp_path / "s" / taken.id, msgspec.structs.replace(taken, slots=slots))
    with pytest.raises(SnapshotError, match="working set is invalid") as caught:
        snapshot.restore(tmp_path / "s", machine_name="again")
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(("at", "how"), [*((at, "kill") for at in STEPS["snapshot create"]),
                                         *((at, "fail") for at in STEPS["snapshot create"][:-1])])
def test_a_snapshot_that_ends_at_any_step_has_lost_nothing(endless: Machine, tmp_path: Path, at: str,
                                                           how: str) -> None:
    directory, steps = tmp_path / "s", tmp_path / "steps"
    steps.mkdir()
    snapshot.create(endless, directory)
    (steps / f"{how}-{at}").write_text(str(errno.ENOSPC))
    done = subprocess.run([sys.executable, "-m", "vmm", "snapshot", "create", endless.name, str(directory),
                           "--incremental"], env={**os.environ, "VMM_STEPS": str(steps)}, capture_output=True,
                          text=True, timeout=60, check=False)
    assert not list(steps.iterdir()), done.stderr
    assert (done.returncode, done.stderr.count("\n")) == ((-9, 0) if how == "kill" else (2, 1)), done.stderr
    snapshot.verify(directory)
    until(lambda: endless.status()["state"] == "running", "the pause goes with its process")
    endless.pause()
    snapshot.create(endless, directory, incremental=True)
    assert memory_of(directory) == endless.ram(0).tobytes()
    snapshot.verify(directory)
    assert [n for n in os.listdir(directory) if n.startswith(".")] == []
    until(lambda: len([c for c in endless.status()["clients"] if c.startswith("snap")]) == 1, "one epoch is left")


def test_merge_keeps_the_contents_and_the_successors(endless: Machine, tmp_path: Path) -> None:
    for i in range(4):
        snapshot.create(endless, tmp_path / "s", incremental=i > 0, compression="zstd" if i % 2 else "none")
    third, fourth = memory_of(tmp_path / "s", "0003"), memory_of(tmp_path / "s")
    merged = snapshot.merge(tmp_path / "s", "0003")
    assert merged.parent is None
    assert [m.id for m in snapshot.list_snapshots(tmp_path / "s")] == ["0003", "0004"]
    snapshot.verify(tmp_path / "s")
    assert memory_of(tmp_path / "s", "0003") == third
    assert memory_of(tmp_path / "s") == fourth
    with pytest.raises(SnapshotError, match="needed by 0004"):
        snapshot.delete(tmp_path / "s", "0003")
    snapshot.create(endless, tmp_path / "s", incremental=True)      # the epoch goes on
    snapshot.delete(tmp_path / "s", "0005")
    assert [m.id for m in snapshot.list_snapshots(tmp_path / "s")] == ["0003", "0004"]


def test_hotplugged_slots_are_in_the_chain(endless: Machine, tmp_path: Path) -> None:
    """Added, removed, and another one of the same id, place and size: the old contents must not come back."""
    directory = tmp_path / "s"
    snapshot.create(endless, directory)
    endless.memory_add(5, 0x1000_0000, 16 * PAGE)
    endless.write(0x1000_0000, b"first")
    endless.write(0x1000_3000, b"gone")
    snapshot.create(endless, directory, incremental=True)
    endless.memory_remove(5)
    endless.memory_add(5, 0x1000_0000, 16 * PAGE)
    endless.write(0x1000_0000, b"second")
    snapshot.create(endless, directory, incremental=True)
    name = endless.name
    endless.stop()
    endless.wait(TIMEOUT)
    with snapshot.restore(directory, machine_name=f"{name}2", start=False) as machine:
        assert machine.read(0x1000_0000, 6) == b"second"
        assert machine.read(0x1000_3000, 4) == b"\0" * 4
        machine.stop()


#: vCPU 0 ends with code 7 at once. The others count up the word at 0x200000 until the host writes to the one behind
#: it, and end with code 9.
ONE_ENDS = bytes.fromhex(
    "85ff 7507 b807000000 e7f4  48ff042500002000 833c250800200000 74ee b809000000 e7f4".replace(" ", ""))


@pytest.mark.parametrize("target", ACCELS)
def test_a_vcpu_that_had_ended_stays_so(accel: str, target: str, tmp_path: Path) -> None:
    """It is not entered again, with its registers of then or any others, and its exit code is not forgotten."""
    image = tmp_path / "one-ends.bin"
    image.write_bytes(ONE_ENDS)

    def counted(of: Machine) -> int:
        return int.from_bytes(of.read(0x20_0000, 8), "little")

    one_ends = spec("", accel=accel, mib=4, image=image, load_address=0x10_0000, params=[], timeout=None)
    with Machine.launch(one_ends) as machine:
        until(lambda: machine.status()["vcpus"][0]["state"] == "exited", "vCPU 0 has ended")
        until(lambda: counted(machine) > 0, "vCPU 1 counts")
        snapshot.create(machine, tmp_path / "s")
    with snapshot.restore(tmp_path / "s", machine_name="again", accel=target) as machine:
        before = counted(machine)
        until(lambda: counted(machine) > before, "vCPU 1 counts on")
        until(lambda: machine.status()["vcpus"][0]["state"] == "exited", "vCPU 0 says how it had ended")
        first = machine.status()["vcpus"][0]
        assert (first["state"], first["exit_reason"], first["exit_code"]) == ("exited", "code", 7)
        machine.write(0x20_0008, b"\1")
        report = machine.wait(TIMEOUT)
    assert [(v["exit_reason"], v["exit_code"]) for v in report["vcpus"]] == [("code", 7), ("code", 9)]
    assert report["vcpus"][0]["guest_entries"] == 0
    assert report["exit_code"] == ExitCode.GUEST_FAILED


def test_a_machine_that_has_ended_has_no_snapshot(accel: str, tmp_path: Path) -> None:
    with Machine.launch(spec("hello", accel=accel, vcpus=2, lines=1)) as machine:
        machine.wait(TIMEOUT)
        with pytest.raises(VmmError, match="has ended"):
            snapshot.create(machine, tmp_path / "s")
    assert not list((tmp_path / "s").iterdir())


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_an_incremental_one_without_its_base_is_refused(endless: Machine, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="contains no snapshot to build on"):
        snapshot.create(endless, tmp_path / "s", incremental=True)
    assert not (tmp_path / "s").exists()
    snapshot.create(endless, tmp_path / "s")
    with (Machine.launch(spec("idle", accel="unicorn", name="other", mib=4)) as second,
          pytest.raises(SnapshotError, match="has no record of what was dirtied since")):
        snapshot.create(second, tmp_path / "s", incremental=True)


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.postcopy)])
def test_the_chain_goes_on_after_a_restore(endless: Machine, tmp_path: Path, lazy: bool) -> None:
    """From whatever snapshot, and for each machine from its own, while the others go on too."""
    directory, accel = tmp_path / "s", endless.status()["accelerator"]
    for number in range(2):
        snapshot.create(endless, directory, incremental=number > 0)
    with (snapshot.restore(directory, "0001", machine_name="one", accel=accel, lazy=lazy) as one,
          snapshot.restore(directory, "0002", machine_name="two", accel=accel, lazy=lazy) as two):
        taken = []
        for number, machine in enumerate((one, endless, two, one)):
            until(lambda machine=machine: all(h["what"] != "lease" for h in machine.status()["holders"]), "it is there")
            machine.pause()
            taken.append(snapshot.create(machine, directory, incremental=True))
            assert memory_of(directory) == machine.ram(0).tobytes()
            assert taken[-1].pages < taken[-1].slots[0].size // PAGE
            assert len([c for c in machine.status()["clients"] if c.startswith("snap")]) == 1
            assert number or not machine.resume()
    assert [m.parent for m in taken] == ["0001", "0002", "0002", "0003"]


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.postcopy)])
def test_many_machines_are_restored_from_one_snapshot(endless: Machine, tmp_path: Path, lazy: bool) -> None:
    """Each has the memory for itself, and goes on with the chain for itself."""
    directory, accel = tmp_path / "s", endless.status()["accelerator"]
    snapshot.create(endless, directory)
    endless.pause()
    snapshot.create(endless, directory, incremental=True, compression="zstd")
    expected = endless.ram(0).tobytes()
    machines = snapshot.restore_many(directory, count=3, machine_name="many", accel=accel, start=False, lazy=lazy)
    try:
        assert [each.name for each in machines] == ["many-0", "many-1", "many-2"]
        for each in machines:
            until(lambda each=each: all(h["what"] != "lease" for h in each.status()["holders"]), "it is there")
        for number, each in enumerate(machines):
            assert each.ram(0).tobytes() == expected
            each.write(PAGE, bytes([number]) * PAGE)
        for number, each in enumerate(machines):
            assert each.read(PAGE, PAGE) == bytes([number]) * PAGE
            each.start()
            each.pause()
            taken = snapshot.create(each, directory, incremental=True)
            assert taken.parent == "0002"
            assert memory_of(directory) == each.ram(0).tobytes()
    finally:
        for each in machines:
            each.close()


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.postcopy)])
def test_of_many_machines_all_are_there_or_none(tmp_path: Path, lazy: bool) -> None:
    """The second name is taken; or there is no room."""
    with Machine.launch(spec("idle", accel="unicorn", mib=1 + (room().free // 900 >> 20))) as machine:
        snapshot.create(machine, tmp_path)
    with Machine.launch(spec("idle", accel="unicorn", name="many-1", mib=4, timeout=None, milliseconds=0)):
        with pytest.raises(VmmError, match="many-1"):
            snapshot.restore_many(tmp_path, count=3, machine_name="many", accel="unicorn", lazy=lazy)
        assert not list_segments(machine_prefix("many-0"))
        assert not list_segments(machine_prefix("many-2"))
    with pytest.raises(VmmError, match="the 1000 machines needs"):
        snapshot.restore_many(tmp_path, count=1000, machine_name="many", accel="unicorn", lazy=lazy)
    with pytest.raises(VmmError, match="the count must be from 1 to 1000"):
        snapshot.restore_many(tmp_path, count=0)


def test_the_command_restores_many(tmp_path: Path) -> None:
    with Machine.launch(spec("idle", accel="unicorn", mib=4, timeout=None, milliseconds=0)) as machine:
        snapshot.create(machine, tmp_path)
    refused = vmm("snapshot", "restore", str(tmp_path), "--accel", "unicorn", "--count", "2")
    assert (refused.returncode, refused.stderr.count("\n")) == (ExitCode.BAD_INPUT, 1)
    done = vmm("snapshot", "restore", str(tmp_path), "--accel", "unicorn", "--count", "2", "--detach", "--name", "m",
               "--json")
    assert json.loads(done.stdout) == {"names": ["m-0", "m-1"]}
    for name in ("m-0", "m-1"):
        assert vmm("stop", name).returncode == 0


def test_a_moved_chain_goes_on_and_leaves_no_epoch_behind(endless: Machine, tmp_path: Path) -> None:
    snapshot.create(endless, tmp_path / "s")
    os.rename(tmp_path / "s", tmp_path / "t")
    endless.pause()
    assert snapshot.create(endless, tmp_path / "t", incremental=True).parent == "0001"
    assert memory_of(tmp_path / "t") == endless.ram(0).tobytes()
    assert len([c for c in endless.status()["clients"] if c.startswith("snap")]) == 1


@pytest.mark.postcopy
@pytest.mark.parametrize("lazy", [False, True])
def test_a_chain_that_is_changed_while_a_machine_is_restored_from_it(endless: Machine, tmp_path: Path,
                                                                     lazy: bool) -> None:
    """By snapshots, a merge and deletions, from when its files are open: neither harms the other."""
    directory = tmp_path / "s"
    for number in range(2):
        snapshot.create(endless, directory, incremental=number > 0)
    expected, restored = memory_of(directory), []

    def change() -> None:
        snapshot.create(endless, directory, incremental=True)
        snapshot.merge(directory)
        snapshot.create(endless, directory, incremental=True)

    def once(done: int, total: int) -> None:
        if not restored:
            restored.append(done)
            change()

    with snapshot.restore(directory, machine_name="again", start=False, lazy=lazy,
                          progress=(lambda done, total: None) if lazy else once) as machine:
        if lazy:
            change()
        until(lambda: all(h["what"] != "lease" for h in machine.status()["holders"]), "it is there")
        assert machine.ram(0).tobytes() == expected
    snapshot.verify(directory)
    endless.pause()
    snapshot.create(endless, directory, incremental=True)
    assert memory_of(directory) == endless.ram(0).tobytes()


@pytest.mark.parametrize(("damage", "said"), [
    ("slot0.mem", "slot0: is damaged"), ("slot0.map", "slot0"), ("manifest.json", "manifest.json: is damaged"),
    ("system.mem", "system: is damaged"), ("image", "image"),
])
def test_damage_is_found_and_refused(tmp_path: Path, damage: str, said: str) -> None:
    directory = tmp_path / "s"
    with Machine.launch(spec("random", accel="unicorn", mib=4, writes=0, timeout=None)) as machine:
        until(lambda: machine.ram(0)[2 << 20:].any(), "the guest writes")
        snapshot.create(machine, directory)
    path = directory / "0001" / damage
    data = bytearray(path.read_bytes())
    at = next(i for i in range(len(data) // 2, len(data)) if data[i])
    data[at] ^= 0x10
    path.write_bytes(data)
    with pytest.raises((SnapshotError, PageFileError), match=said):
        snapshot.verify(directory)
    with pytest.raises((SnapshotError, PageFileError), match=said):
        snapshot.restore(directory, machine_name="again", accel="unicorn")
    assert not list_segments(machine_prefix("again"))


def test_missing_and_foreign_snapshots_are_one_line(tmp_path: Path) -> None:
    for directory, said in ((tmp_path / "none", "is not a directory"), (tmp_path, "contains no snapshots")):
        with pytest.raises(SnapshotError, match=said):
            snapshot.restore(directory)
    folder = tmp_path / "0001"
    folder.mkdir()
    with pytest.raises(SnapshotError, match="no snapshot 0001; it contains no snapshots"):
        snapshot.restore(tmp_path, "0001")
    for name in ("0002", "0003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    with pytest.raises(SnapshotError, match=r"no snapshot 0009; there are 0002, 0003$"):
        snapshot.restore(tmp_path, "0009")
    with pytest.raises(SnapshotError, match=r"0002/manifest\.sum: cannot be read"):
        snapshot.restore(tmp_path, "0002")


KILLED = """
import sys
from vmm import Machine, snapshot
from pathlib import Path
with Machine.attach(sys.argv[1]) as machine:
    print("go", flush=True)
    while True:
        snapshot.create(machine, Path(sys.argv[2]), incremental=True, live=sys.argv[3] == "live")
"""


@pytest.mark.parametrize("kind", ["live", "stopped"])
def test_a_kill_at_any_moment_leaves_the_chain_whole_and_the_machine_running(endless: Machine, tmp_path: Path,
                                                                             kind: str) -> None:
    directory = tmp_path / "s"
    snapshot.create(endless, directory)
    for i in range(6):
        process = subprocess.Popen([sys.executable, "-c", KILLED, endless.name, str(directory), kind],
                                   stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(0.013 * i + 0.001)       # not to synchronise: to be killed somewhere else each time
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        snapshot.verify(directory)
        deadline = time.monotonic() + 10
        while endless.status()["state"] != "running":
            assert time.monotonic() < deadline
    endless.pause()
    snapshot.create(endless, directory, incremental=True)
    assert memory_of(directory) == endless.ram(0).tobytes()     # nothing was lost by those that were killed
    snapshot.verify(directory)
    assert not list(directory.glob(".*"))
    assert len([c for c in endless.status()["clients"] if c.startswith("snap")]) == 1
