"""A VM of another VMM (QEMU, with KVM): what its guest writes is what is found, by whatever it is named."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import TOP

from ipc.shm import PAGE_SIZE
from vmm.consumers.watch.attach import attach, check_target
from vmm.consumers.watch.blocks import chooser
from vmm.consumers.watch.targets import find_target
from vmm.consumers.watch.watcher import Watcher
from vmm.errors import VmmError

QEMU = "qemu-system-x86_64"
pytestmark = [pytest.mark.watch, pytest.mark.kvm,
              pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")]

NAME, MIB = f"svt-foreign-{os.getpid()}", 64
#: Where the guest (benchmarks/peer/rom.S) is told what to write, and where that begins.
PARAMETERS, RAM_START = 0x1000, 2 << 20
PAGES = ((MIB << 20) - RAM_START) // PAGE_SIZE
WRITTEN = set(range(RAM_START // PAGE_SIZE, RAM_START // PAGE_SIZE + PAGES))


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as other:
        return other.connect_ex(str(path)) == 0


@pytest.fixture(params=["private", "shared"])
def qemu(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Its guest writes each page of its memory from 2 MiB on, again and again."""
    command = [QEMU, "-accel", "kvm", "-machine", "pc", "-cpu", "kvm64", "-m", str(MIB), "-nodefaults", "-nographic",
               "-no-user-config", "-name", f"guest={NAME}", "-bios", str(TOP / "benchmarks" / "peer" / "rom.bin"),
               "-qmp", f"unix:{tmp_path / 'qmp'},server=on,wait=off"]
    if request.param == "shared":
        command += ["-machine", "memory-backend=memory", "-object",
                    f"memory-backend-memfd,id=memory,size={MIB}M,share=on"]
    for at, value in enumerate((RAM_START, PAGES, 0, 0)):
        command += ["-device", f"loader,addr={PARAMETERS + 8 * at:#x},data={value},data-len=8"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as made:
        try:
            deadline = time.monotonic() + 30.0
            while not listens(tmp_path / "qmp"):
                assert made.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield made
        finally:
            made.kill()


def until_written(watching: Watcher) -> set[int]:
    """The pages of the guest that were written from now on until all that it writes are among them."""
    (area,) = watching.areas
    first, deadline, found = area.start // PAGE_SIZE, time.monotonic() + 60.0, set[int]()
    watching.collect()
    while not found >= WRITTEN:
        assert time.monotonic() < deadline
        found |= {int(page) - first for part in watching.collect().pages.values() for page in part}
    return found


def test_what_the_guest_writes_is_found_however_it_is_named(qemu: subprocess.Popen[bytes], tmp_path: Path) -> None:
    for text in (NAME, str(qemu.pid), str(tmp_path / "qmp")):
        target = find_target(text)
        assert (target.pid, target.vmm) == (qemu.pid, True)
        with Watcher(attach(check_target(target.pid)), chooser(None, target.vmm, target.sizes)) as watching:
            (area,) = watching.areas
            assert area.end - area.start == MIB << 20
            until_written(watching)     # at first QEMU itself may be writing the ROM and the parameters
            assert until_written(watching) == WRITTEN
    assert qemu.poll() is None


def test_who_has_its_monitor_keeps_it(qemu: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "qmp"))
        other.recv(1000)
        with pytest.raises(VmmError, match="no monitor answers"):
            find_target(str(tmp_path / "qmp"))
    assert qemu.poll() is None
