"""What a program finds at its first instruction, against what the host's kernel gives it: a native one is stopped at
its exec (ptrace), and its memory, mappings and stack are compared."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from system import System

from workers.linux import program
from workers.linux.space import PAGE, Mapping

ARGUMENTS = [b"name", b"", b"two words", b"x" * 5000]
ENVIRONMENT = [b"PATH=/bin", b"EMPTY=", b"odd=1"]
RANDOM = bytes(range(16))
TRACEME, ADDR_NO_RANDOMIZE = 0, 0x0040000       # ptrace(2), personality(2)

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


@dataclass
class Native:
    """A process that has made no step yet."""

    pid: int
    memory: int

    @property
    def auxiliary(self) -> dict[int, int]:
        return dict(struct.iter_unpack("<QQ", Path(f"/proc/{self.pid}/auxv").read_bytes()))

    def read(self, address: int, count: int) -> bytes:
        return os.pread(self.memory, count, address)

    def mappings(self) -> list[tuple[int, int, int, int, str]]:
        """(start, end, prot, offset, path) of files, in order."""
        found = re.findall(r"^(\w+)-(\w+) (...). (\w+) \S+ \d+ +(/.*)$", Path(f"/proc/{self.pid}/maps").read_text(),
                           re.MULTILINE)
        return [(int(low, 16), int(high, 16), sum(bit for bit, letter in ((1, "r"), (2, "w"), (4, "x"))
                                                  if letter in rights), int(offset, 16), path)
                for low, high, rights, offset, path in found]


@contextmanager
def native(path: str) -> Iterator[Native]:
    pid = os.fork()
    if not pid:
        try:
            libc.personality(ADDR_NO_RANDOMIZE)
            libc.ptrace(TRACEME, 0, None, None)
            os.execve(path, ARGUMENTS, dict(each.split(b"=") for each in ENVIRONMENT))
        finally:
            os._exit(1)
    try:
        assert os.WIFSTOPPED(os.waitpid(pid, 0)[1])
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        try:
            yield Native(pid, memory)
        finally:
            os.close(memory)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def launched(path: str) -> tuple[System, program.Started]:
    system = System(frames=4000, tables=100)

    def opened(name: bytes) -> program.Executable:
        return system.file(Path(os.fsdecode(name)).read_bytes())

    return system, program.start(system.space, opened, os.fsencode(path), ARGUMENTS, ENVIRONMENT, random=RANDOM)


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One with data, and zeros behind it."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("static")
    (folder / "p.c").write_text("int data = 7, zeros[5000]; int main(void) { return data + zeros[3] - 7; }")
    subprocess.run(["cc", "-static", "-no-pie", "-o", folder / "p", folder / "p.c"], check=True, timeout=60)
    return str(folder / "p")


@pytest.mark.parametrize("which", ["static", "dynamic"])
def test_as_the_host_starts_it(which: str, static: str) -> None:
    path = static if which == "static" else os.path.realpath("/bin/true")
    system, started = launched(path)
    with native(path) as there:
        theirs, ours = there.auxiliary, stack_of(system, started)
        names = program._AT
        for name in ("PHDR", "PHENT", "PHNUM", "PAGESZ", "ENTRY", "FLAGS", "UID", "EUID", "GID", "EGID", "CLKTCK",
                     "SECURE"):
            assert ours.auxiliary[names[name]] == theirs[names[name]], name
        assert bool(ours.auxiliary[names["BASE"]]) == bool(theirs[names["BASE"]]) == (which == "dynamic")
        assert system.space.read(ours.auxiliary[names["RANDOM"]], 16) == RANDOM
        assert system.space.text(ours.auxiliary[names["EXECFN"]]) == os.fsencode(path)
        mine = [each for each in system.space.mappings if each.backing and each.start * PAGE < 0x7FFF_0000_0000]
        other = [each for each in there.mappings() if each[4] == path]
        assert [(each.start * PAGE, each.end * PAGE, each.prot, each.offset * PAGE) for each in mine] == [
            each[:4] for each in other]
        for each in other:
            assert system.space.read(each[0], each[1] - each[0]) == there.read(each[0], each[1] - each[0])
        assert zeros(system.space.mappings, mine) == []
    assert ours.arguments == ARGUMENTS
    assert ours.environment == ENVIRONMENT
    assert started.rsp % 16 == 0


def zeros(there: list[Mapping], files: list[Mapping]) -> list[Mapping]:
    """Mappings of the program that are neither its file nor zeros behind it nor a stack."""
    last = files[-1].end
    return [each for each in there if each.start * PAGE < 0x7FFF_0000_0000 and not each.backing and each.start != last]


@dataclass
class Stack:
    """As a program reads it from its stack pointer upwards."""

    arguments: list[bytes]
    environment: list[bytes]
    auxiliary: dict[int, int]


def stack_of(system: System, started: program.Started) -> Stack:
    at = started.rsp

    def word() -> int:
        nonlocal at
        at += 8
        return int.from_bytes(system.space.read(at - 8, 8), "little")

    texts: list[list[bytes]] = []
    count = word()
    for _ in range(2):
        found = []
        while address := word():
            found.append(system.space.text(address, 1 << 17))
        texts.append(found)
    assert len(texts[0]) == count
    auxiliary = {}
    while (key := word()) != 0:
        auxiliary[key] = word()
    return Stack(texts[0], texts[1], auxiliary)


def test_a_script_is_what_its_first_line_says() -> None:
    files = {b"/s": b"#! /t  -x y \nrest", b"/t": b"#!/bin/true", b"/loop": b"#!/loop\n", b"/none": b"#!\n"}
    system = System(frames=4000, tables=100)

    def opened(name: bytes) -> program.Executable:
        return system.file(files.get(name) or Path(os.fsdecode(name)).read_bytes())

    started = program.start(system.space, opened, b"/s", [b"s", b"last"], [], random=RANDOM)
    assert stack_of(system, started).arguments == [b"/bin/true", b"/t", b"-x y", b"/s", b"last"]
    for name, error in ((b"/loop", errno.ELOOP), (b"/none", errno.ENOEXEC)):
        with pytest.raises(OSError, match=r"^\[Errno") as raised:
            program.start(System().space, opened, name, [b"x"], [], random=RANDOM)
        assert raised.value.errno == error


@pytest.mark.parametrize("data", [b"", b"junk", b"\x7fELF", b"\x7fELF\x02\x01\x01" + bytes(57)])
def test_what_is_no_program(data: bytes) -> None:
    system = System()
    with pytest.raises(OSError, match=r"^\[Errno") as raised:
        program.start(system.space, lambda name: system.file(data), b"/x", [b"x"], [], random=RANDOM)
    assert raised.value.errno == errno.ENOEXEC


def test_too_many_arguments() -> None:
    system = System(frames=4000, tables=100)
    with pytest.raises(OSError, match=r"^\[Errno") as raised:
        program.start(system.space, lambda name: system.file(Path(os.fsdecode(name)).read_bytes()), b"/bin/true",
                      [b"x" * 100_000] * 25, [], random=RANDOM)
    assert raised.value.errno == errno.E2BIG
