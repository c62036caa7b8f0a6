"""Lazy restore: the guest runs before its memory is there. The oracles are the guest's own work, and the memory of the
machine that the snapshot was taken of, as that had it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import vmm
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import ACCELS, exact, nothing_left, replace, spec, until

from ipc.shm import PAGE_SIZE, data_extents, open_fd
from ipc.steps import STEPS
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.consumers.snapshot.layers import SlotPages
from vmm.consumers.snapshot.lazy import Order
from vmm.consumers.snapshot.pagefile import PageWriter
from vmm.errors import ExitCode, VmmError
from vmm.machine.spec import MachineSpec

pytestmark = pytest.mark.postcopy

TIMEOUT = 60.0


def all_there(machine: Machine) -> None:
    """And whoever has brought it has let the machine go."""
    def there() -> bool:
        status = machine.status()
        return not status["incoming"] and all(holder["what"] != "lease" for holder in status["holders"])

    until(there, "all of the memory is there")


def work(accel: str, **changes: Any) -> MachineSpec:
    """A guest that goes through all of its memory for a second or so, and ends."""
    writes = 400_000 if accel == "kvm" else 80_000
    return replace(spec("random", accel=accel, mib=16, writes=writes, spin=20), **changes)


@pytest.mark.parametrize("target", ACCELS)
def test_the_guest_ends_as_one_that_was_never_stopped(accel: str, target: str, tmp_path: Path) -> None:
    """What it had touched when it ended, if it ended before the rest was there."""
    with Machine.launch(work(accel)) as machine:
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        expected = machine.ram(0).copy()
    with Machine.launch(work(accel)) as machine:
        snapshot.create(machine, tmp_path)
        with suppress(VmmError):        # "has ended"
            snapshot.create(machine, tmp_path, incremental=True, live=True, compression="zstd")
    for name in [manifest.id for manifest in snapshot.list_snapshots(tmp_path)]:
        with snapshot.restore(tmp_path, name, machine_name="again", accel=target, lazy=True) as machine:
            report = machine.wait(TIMEOUT)
            assert report["exit_code"] == 0, report
            if not report["incoming"]:
                assert np.array_equal(machine.ram(0), expected)


def test_a_verified_machine_stays_verified(accel: str, tmp_path: Path) -> None:
    verified = spec("stamp", accel=accel, mib=8, writes=100_000, spin=50, verify=exact(0.05))
    with Machine.launch(verified) as machine:
        snapshot.create(machine, tmp_path)
    with snapshot.restore(tmp_path, accel=accel, lazy=True) as machine:
        result = machine.wait(TIMEOUT)["verification"]
    assert (result["lost_pages"], result["surplus_pages"]) == (0, 0)


@contextmanager
def endless(accel: str, **changes: Any) -> Iterator[Machine]:
    busy = spec("random", accel=accel, mib=8, writes=0, timeout=None)
    with Machine.launch(replace(busy, dirty_quota=4000, **changes)) as machine:
        yield machine


def chain_of(accel: str, directory: Path) -> bytes:
    """Three snapshots, the last of the memory that is returned."""
    with endless(accel) as machine:
        for number in range(3):
            snapshot.create(machine, directory, incremental=number > 0, compression="zstd" if number == 1 else "none")
        machine.pause()
        machine.write(7 * PAGE_SIZE, bytes(PAGE_SIZE))      # zero now, and not in the first
        snapshot.create(machine, directory, incremental=True)
        return machine.ram(0).tobytes()


def test_memory_is_what_the_chain_has_and_is_reserved(accel: str, tmp_path: Path) -> None:
    """Of a guest that has not begun."""
    expected = chain_of(accel, tmp_path)
    with snapshot.restore(tmp_path, machine_name="again", accel=accel, lazy=True, start=False) as machine:
        all_there(machine)
        fd = open_fd(machine.ram_segment(0))
        try:
            status = os.fstat(fd)
            zero = status.st_size - sum(end - start for start, end in data_extents(fd, status.st_size))
        finally:
            os.close(fd)
        assert status.st_blocks * 512 >= status.st_size
        assert zero > 0     # there was something to reserve
        assert machine.ram(0).tobytes() == expected


def test_afterwards_it_is_like_any_other(accel: str, tmp_path: Path) -> None:
    chain_of(accel, tmp_path)
    with snapshot.restore(tmp_path, machine_name="again", accel=accel, lazy=True) as machine:
        all_there(machine)
        snapshot.create(machine, tmp_path, live=True)
        machine.memory_add(3, 1 << 30, PAGE_SIZE)
    snapshot.verify(tmp_path)


# --- what goes wrong -----------------------------------------------------------------------------------------------


def damaged(directory: Path) -> str:
    """In the last page of slot 0 that has anything in it, which the guest may never touch; what the file is called."""
    path = directory / "0001" / "slot0.mem"
    content = bytearray(path.read_bytes())
    at = max(np.flatnonzero(np.frombuffer(content, np.uint8)).tolist())
    content[at] ^= 1
    path.write_bytes(content)
    return str(directory / "0001" / "slot0")


def test_a_damaged_page_ends_the_machine_with_the_reason(accel: str, tmp_path: Path) -> None:
    with endless(accel) as machine:
        snapshot.create(machine, tmp_path / "s")
    path = damaged(tmp_path / "s")
    with snapshot.restore(tmp_path / "s", machine_name="again", accel=accel, lazy=True) as machine:
        report = machine.wait(TIMEOUT)
    assert report["exit_code"] == ExitCode.STOPPED
    assert report["cause"].startswith(f"stopped: its memory could not be restored: {path}: is damaged")
    with pytest.raises(VmmError, match="slot0: is damaged") as caught:
        snapshot.restore(tmp_path / "s", machine_name="again", accel=accel, lazy=True, detach=True)
    assert caught.value.exit_code == ExitCode.STOPPED
    assert nothing_left("again")


@pytest.mark.parametrize("detach", [False, True])
def test_the_command_says_what_was_damaged(tmp_path: Path, detach: bool) -> None:
    with endless("unicorn") as machine:
        snapshot.create(machine, tmp_path / "s")
    path = damaged(tmp_path / "s")
    done = vmm("snapshot", "restore", str(tmp_path / "s"), "--name", "again", "--accel", "unicorn", "--lazy",
               *(["--detach"] if detach else []))
    assert done.returncode == ExitCode.STOPPED
    said = (done.stdout + done.stderr).replace("\n", " ")
    assert f"{path}: is damaged".replace(" ", "") in said.replace(" ", "")
    if detach:
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("at", STEPS["lazy restore"])
@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_restore_that_ends_at_any_step(accel: str, at: str, how: str, tmp_path: Path, steps: Path) -> None:
    """The machine has ended then, and says why."""
    with endless(accel) as machine:
        snapshot.create(machine, tmp_path / "s")
    (steps / f"{how}-{at}").write_text(str(errno.EIO))
    done = vmm("snapshot", "restore", str(tmp_path / "s"), "--name", "again", "--accel", accel, "--lazy", "--detach")
    assert not list(steps.iterdir())
    until(lambda: nothing_left("again"), "it has ended")
    report = vmm("status", "again", "--json").stdout
    if how == "kill":
        assert done.returncode == -signal.SIGKILL
        assert "the process that fills in this machine's memory ended before all of it had arrived" in report
    else:
        assert (done.returncode, done.stderr.count("\n")) == (ExitCode.STOPPED, 1), done.stderr
        assert "its memory could not be restored: lazy restore: [Errno 5]" in report


def test_it_can_be_ended_before_all_is_there(accel: str, tmp_path: Path, steps: Path) -> None:
    """By whoever restores it: at once, and with nothing left."""
    with endless(accel, slots=spec("idle", accel=accel, mib=64).slots) as machine:
        machine.pause()
        machine.ram(0, writable=True)[1 << 20:63 << 20] = 7
        snapshot.create(machine, tmp_path)
    for _ in range(3):
        snapshot.restore(tmp_path, machine_name="again", accel=accel, lazy=True).close()
        assert nothing_left("again")


def test_a_coordinator_that_dies_meanwhile(accel: str, tmp_path: Path) -> None:
    """Its successor has the guest go on, and what the chain holds comes."""
    expected = chain_of(accel, tmp_path)
    with snapshot.restore(tmp_path, machine_name="again", accel=accel, lazy=True, start=False) as machine:
        os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
        all_there(machine)
        assert machine.status()["coordinator"]["restarts"] == 1
        assert machine.ram(0).tobytes() == expected
        machine.start()
        machine.pause()
        snapshot.create(machine, tmp_path, incremental=True)
        assert snapshot.read_memory(tmp_path)[0].tobytes() == machine.ram(0).tobytes()


@pytest.mark.root
def test_where_userfaultfd_is_missing(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        pytest.skip("userfaultfd is everybody's here")
    script = ("import os, sys\nfrom pathlib import Path\nfrom vmm import snapshot, VmmError\nsnapshot.restore\n"
              "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
              "try:\n    snapshot.restore(Path(sys.argv[1]), lazy=True)\nexcept VmmError as exc:\n    print(exc)\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.stdout.startswith("a lazy restore is not possible here: userfaultfd: "), done.stderr
    assert done.stdout.count("\n") == 1


# --- the order -----------------------------------------------------------------------------------------------------


PAGES = 400


@settings(max_examples=25, deadline=None)
@given(layers=st.lists(st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 2), max_size=40),
                       min_size=1, max_size=4), asked=st.lists(st.integers(0, PAGES - 1), max_size=20),
       heat=st.lists(st.integers(0, 255), min_size=7, max_size=7))
def test_every_page_that_is_not_zero_comes_once(tmp_path_factory: pytest.TempPathFactory,
                                                layers: list[dict[int, int]], asked: list[int],
                                                heat: list[int]) -> None:
    """Three threads and one that asks for pages. The model is a dict of what each page was last."""
    folder, files, model = tmp_path_factory.mktemp("o"), [], {}
    for number, pages in enumerate(layers):
        with PageWriter(folder, str(number), PAGES) as writer:
            for page, value in pages.items():
                writer.put(page, np.full(PAGE_SIZE, value, np.uint8))
            files.append((folder, str(number), str(writer.finish()["checksum"])))
        model |= pages
    got: list[int] = []
    with SlotPages(files, PAGES) as slot:
        order = Order({5: slot}, {5: np.array(heat, np.uint8)})

        def take(block: Any) -> None:
            got.extend(block.number * 64 + bit for bit in range(64) if slot.mask(block) >> bit & 1)

        def read() -> None:
            while (found := order.next()) is not None:
                assert found[0] == 5
                take(found[1])

        threads = [threading.Thread(target=read) for _ in range(3)]
        for each in threads:
            each.start()
        for page in asked:
            before = len(got)
            if (block := order.take(5, page)) is not None:
                take(block)
                assert page in got[before:]
        for each in threads:
            each.join()
    assert sorted(got) == sorted(page for page, value in model.items() if value)


def test_what_was_dirtied_last_comes_first_and_then_what_is_behind_a_page_that_is_wanted(tmp_path: Path) -> None:
    files = []
    for name, pages in (("old", range(640)), ("new", [130, 500])):
        with PageWriter(tmp_path, name, 640) as writer:
            for page in pages:
                writer.put(page, np.full(PAGE_SIZE, 1, np.uint8))
            files.append((tmp_path, name, str(writer.finish()["checksum"])))
    with SlotPages(files, 640) as slot:
        order = Order({0: slot}, {0: np.zeros(10, np.uint8)})
        assert [order.next() for _ in range(3)] == [(0, (0, 2)), (0, (0, 7)), (0, (1, 0))]
        assert order.take(0, 64 * 6 + 3) == (1, 6)
        assert order.take(0, 64 * 6 + 5) is None
        rest = [found[1].number for found in iter(order.next, None)]
    assert rest == [7, 8, 9, 1, 2, 3, 4, 5]


def test_what_was_in_use_comes_before_everything_else(tmp_path: Path) -> None:
    """Block 6 most, then 2 and 3 (in the order of the file), then 8, of which two pages are in the newer file."""
    files = []
    for name, pages in (("old", range(640)), ("new", [130, 512, 575])):
        with PageWriter(tmp_path, name, 640) as writer:
            for page in pages:
                writer.put(page, np.full(PAGE_SIZE, 1, np.uint8))
            files.append((tmp_path, name, str(writer.finish()["checksum"])))
    heat = np.array([0, 0, 40, 41, 0, 0, 200, 0, 1, 0], np.uint8)
    with SlotPages(files, 640) as slot:
        order = Order({0: slot}, {0: heat})
        assert order.next() == (0, (1, 6))
        assert order.take(0, 64 * 3 + 3) == (1, 3)      # it is wanted
        rest = [found[1] for found in iter(order.next, None)]
    assert rest[:4] == [(0, 2), (1, 2), (0, 8), (1, 8)]
    assert rest[4:] == [(1, 4), (1, 5), (1, 7), (1, 9), (1, 0), (1, 1)]
