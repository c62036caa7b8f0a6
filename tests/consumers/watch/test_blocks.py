"""What of a process is watched, by what it has mapped and what its VMM was told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipc.linux.foreign import Mapping, mappings
from vmm.consumers.watch.blocks import MemorySize, chooser, is_vmm, told_sizes, vm_memory, writable
from vmm.consumers.watch.targets import find_target
from vmm.errors import VmmError

MIB = 1 << 20
ONE = f"svt-one-{os.getpid()}"
MEMFD = "/memfd:guest (deleted)"


def mapping(at: int, mib: int, mode: str = "rw-p", inode: int = 0, name: str = "") -> Mapping:
    return Mapping(at << 32, (at << 32) + mib * MIB, mode, inode, name)


def test_all_that_can_be_written_is_watched_in_as_few_pieces_as_it_has() -> None:
    there = [Mapping(0, 4096, "r-xp", 7, "/bin/x"), Mapping(4096, 8192, "rw-p", 7, "/bin/x"),
             Mapping(8192, 12288, "rw-p", 7, "/bin/x"), Mapping(12288, 16384, "rw-p", 0, "[heap]"),
             Mapping(16384, 20480, "---p", 0, ""), Mapping(20480, 24576, "rw-p", 0, ""),
             Mapping(24576, 28672, "rw-s", 9, "/dev/shm/x"), Mapping(28672, 32768, "rw-s", 3, "anon_inode:kvm-vcpu:0"),
             Mapping(32768, 36864, "rw-p", 0, "[vvar]")]
    assert [(b.start, b.end, b.name, b.sparse) for b in writable(there)] == [
        (4096, 12288, "/bin/x", False), (12288, 16384, "[heap]", True), (20480, 24576, "[anonymous]", True),
        (24576, 28672, "/dev/shm/x", False)]


@pytest.mark.parametrize(("there", "sizes", "found"), [
    ([mapping(1, 512), mapping(2, 1024)], [512], [(1, "ram0")]),
    ([mapping(1, 512), mapping(2, 1024)], [1024, 512], [(1, "ram1"), (2, "ram0")]),
    ([mapping(1, 3072), mapping(2, 64), mapping(4, 1024)], [4096], [(1, "ram0"), (4, "ram0")]),
    ([mapping(1, 3072), mapping(2, 1024, "rw-s", 5, MEMFD)], [4096], [(1, "ram")]),
    ([mapping(1, 64), mapping(2, 256), mapping(3, 128)], [], [(2, "ram")]),
    ([mapping(1, 3072, "rw-s", 5, MEMFD), mapping(2, 64), mapping(3, 1024, "rw-s", 5, MEMFD)], [],
     [(1, "ram"), (3, "ram")]),
    ([mapping(1, 1), mapping(2, 4)], [4], [(2, "ram0")])])
def test_a_vms_memory_is_what_has_its_size_else_the_largest(there: list[Mapping], sizes: list[int],
                                                            found: list[tuple[int, str]]) -> None:
    told = [MemorySize(f"ram{at}", size * MIB) for at, size in enumerate(sizes)]
    assert [(b.start >> 32, b.name) for b in vm_memory(there, told)] == found


def test_there_may_be_none() -> None:
    with pytest.raises(VmmError, match="no mapping has at least 8 MiB"):
        vm_memory([mapping(1, 4)])
    with pytest.raises(VmmError, match="--ram: the process runs no VM"):
        chooser("ram", False, [])


@pytest.mark.parametrize(("words", "sizes"), [
    (["qemu-system-x86_64", "-m", "512"], [("ram", 512)]),
    (["/usr/bin/qemu-system-x86_64", "-m", "size=2G,maxmem=4G"], [("ram", 2048)]),
    (["qemu-system-x86_64", "-m", "1G", "-object", "memory-backend-memfd,id=mem,size=1024M,share=on"], [("ram", 1024)]),
    (["qemu-system-x86_64", "-m", "1G", "-object", "memory-backend-ram,id=a,size=512M", "-object",
      "memory-backend-ram,id=b,size=256M"], [("ram", 1024), ("a", 512), ("b", 256)]),
    (["cloud-hypervisor", "--memory", "size=512M"], [("ram", 512)]),
    (["firecracker", "--id", ONE], []),
    (["qemu-system-x86_64", "-m", "many"], [])])
def test_what_a_vmm_was_told_is_on_its_command_line(words: list[str], sizes: list[tuple[str, int]]) -> None:
    script = "import time; print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([words[0], "-c", script, *words[1:]], executable=sys.executable, stdout=subprocess.PIPE,
                          env={"PYTHONHOME": sys.base_prefix}) as made:
        try:
            assert made.stdout is not None
            assert made.stdout.readline() == b"ready\n"
            assert is_vmm(made.pid)
            assert [(s.name, s.size // MIB) for s in told_sizes(made.pid)] == sizes
            assert find_target(str(made.pid)).vmm
            if "--id" in words:
                assert find_target(ONE).pid == made.pid
        finally:
            made.kill()


def test_what_is_mapped_is_what_the_kernel_says() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        try:
            assert made.stdin is not None
            assert made.stdout is not None
            made.stdin.write(b"\n")
            made.stdin.flush()
            assert made.stdout.readline() == b"\n"       # all that it needs is mapped
            there = mappings(made.pid)
            lines = Path(f"/proc/{made.pid}/maps").read_text().splitlines()
            assert [f"{m.start:08x}-{m.end:08x} {m.mode}" for m in there] == [" ".join(x.split()[:2]) for x in lines]
            assert {m.name for m in there} >= {"[stack]"}
            assert not is_vmm(made.pid)
        finally:
            made.kill()
