"""A processor for one thread, in this process: Unicorn over the frames, page by page as the tables say. Slow, and
without a machine; it is there to try the system by real programs."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from system import FIRST
from twice import Launcher

from workers.linux.calls import Blocked, Ended
from workers.linux.frames import Frames, Run
from workers.linux.program import Started
from workers.linux.space import PAGE, SegmentationFault
from workers.linux.system import System
from workers.linux.tables import FRAME, NO_EXECUTE, PRESENT, WRITE, Tables
from workers.linux.vfs import FileSystem

unicorn = pytest.importorskip("unicorn")
x86 = pytest.importorskip("unicorn.x86_const")


class Ram:
    """Frames in one piece of memory."""

    def __init__(self, frames: int) -> None:
        self.map = mmap.mmap(-1, frames * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.view = memoryview(self.map)

    def at(self, frame: int) -> int:
        return (frame - FIRST) * PAGE

    def read(self, frame: int, offset: int, count: int) -> bytes:
        return bytes(self.view[self.at(frame) + offset:self.at(frame) + offset + count])

    def write(self, frame: int, offset: int, data: bytes | memoryview) -> None:
        self.view[self.at(frame) + offset:self.at(frame) + offset + len(data)] = data

    def copy(self, source: int, target: int) -> None:
        self.write(target, 0, self.read(source, 0, PAGE))

    def clear(self, runs: list[Run], visitors: Iterable[int] = ()) -> None:
        for first, count in runs:
            self.view[self.at(first):self.at(first) + count * PAGE] = bytes(count * PAGE)


@dataclass
class Terminal:
    """What was typed, and what was printed."""

    terminal = False
    tty = None
    typed: bytes = b""
    printed: bytearray = field(default_factory=bytearray)

    def read(self, count: int) -> bytes | None:
        found, self.typed = self.typed[:count], self.typed[count:]
        return found

    def ready(self) -> bool:
        return True

    def write(self, data: bytes, *, error: bool) -> int:
        self.printed += data
        return len(data)

    def writable(self) -> bool:
        return True

    def ioctl(self, thread: Any, request: int, argument: int) -> int:
        raise OSError(25, "")


class _Launcher(Launcher):
    def __init__(self, ram: Ram) -> None:
        self._ram = ram

    def host_address(self, frame: int, offset: int) -> int:
        return self._ram.address + self._ram.at(frame) + offset


@dataclass
class Ran:
    """``code`` as wait(2) gives it."""

    code: int
    printed: bytes
    system: System


_ARGUMENTS = [f"UC_X86_REG_{name}" for name in ("RDI", "RSI", "RDX", "R10", "R8", "R9")]


class Machine:
    """One process of one thread."""

    def __init__(self, *, frames: int = 8192, typed: bytes = b"", fill: Any = None) -> None:
        self.ram = Ram(frames)
        self.pool = Frames(FIRST, frames)
        self.tables = Tables(memoryview(bytearray(256 * PAGE)).cast("Q"), 1 << 40)
        self.terminal = Terminal(typed)
        files = FileSystem(self.ram, self.pool, clock=time.time_ns, random=bytes, blocks=frames)
        if fill is not None:
            fill(files)
        self.system = System(self.ram, self.pool, self.tables, files, self.terminal, realtime=time.time_ns,
                             monotonic=time.monotonic_ns)
        self.system.launcher = _Launcher(self.ram)
        self.mapped: dict[int, int] = {}        # page: entry, as this processor has it

    def run(self, path: bytes, arguments: list[bytes], environment: list[bytes], *, seconds: float = 60.0) -> Ran:
        self.thread, started = self.system.spawn(path, arguments, environment)
        self.space = self.thread.process.space
        self.ending: int | None = None
        self.uc = uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.hook_add(unicorn.UC_HOOK_INSN, self._syscall, None, 1, 0, x86.UC_X86_INS_SYSCALL)
        uc.hook_add(unicorn.UC_HOOK_MEM_INVALID, self._fault)
        self._go(started, seconds)
        assert self.ending is not None
        return Ran(self.ending, bytes(self.terminal.printed), self.system)

    def _go(self, started: Started, seconds: float) -> None:
        self.uc.reg_write(x86.UC_X86_REG_RSP, started.rsp)
        deadline, at = time.monotonic() + seconds, started.rip
        while self.ending is None:
            assert time.monotonic() < deadline, "the program does not end"
            self.error: BaseException | None = None
            try:
                self.uc.emu_start(at, 0, timeout=int(seconds * 1e6))
            except unicorn.UcError:
                if self.ending is None and self.error is None:
                    raise
            if self.error is not None:
                raise self.error
            at = self.uc.reg_read(x86.UC_X86_REG_RIP)

    def _syscall(self, uc: Any, data: Any) -> None:
        number = uc.reg_read(x86.UC_X86_REG_RAX)
        arguments = [uc.reg_read(getattr(x86, name)) for name in _ARGUMENTS]
        try:
            while True:
                try:
                    result = self.system.call(self.thread, number, arguments)
                    break
                except Blocked as blocked:
                    if blocked.deadline is None:
                        raise AssertionError("nobody could wake it") from None
                    time.sleep(max(0.0, (blocked.deadline - time.monotonic_ns()) / 1e9))
        except Ended:
            self.ending = self.thread.process.code
            uc.emu_stop()
            return
        except BaseException as error:
            self.error = error
            uc.emu_stop()
            return
        if self.thread.fs_base is not None:
            uc.reg_write(x86.UC_X86_REG_FS_BASE, self.thread.fs_base)
        uc.reg_write(x86.UC_X86_REG_RAX, result & 0xFFFF_FFFF_FFFF_FFFF)
        self._refresh()

    def _refresh(self) -> None:
        """What the tables have changed is forgotten."""
        for page, entry in list(self.mapped.items()):
            if self.tables.get(self.space.root, page) != entry:
                self.uc.mem_unmap(page * PAGE, PAGE)
                del self.mapped[page]
        self.space.take_stale()

    def _fault(self, uc: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        error = {unicorn.UC_MEM_WRITE_UNMAPPED: 6, unicorn.UC_MEM_WRITE_PROT: 7, unicorn.UC_MEM_FETCH_UNMAPPED: 20,
                 unicorn.UC_MEM_FETCH_PROT: 21}.get(access, 4)
        try:
            for page in {address // PAGE, (address + max(size, 1) - 1) // PAGE}:
                self.space.fault(page * PAGE, error)
                self._show(page)
        except SegmentationFault as fault:
            self.ending = 7 if fault.bus else 11
            return False
        return True

    def _show(self, page: int) -> None:
        entry = self.tables.get(self.space.root, page)
        assert entry & PRESENT
        rights = unicorn.UC_PROT_READ | (unicorn.UC_PROT_WRITE if entry & WRITE else 0) | (
            0 if entry & NO_EXECUTE else unicorn.UC_PROT_EXEC)
        if page in self.mapped:
            self.uc.mem_unmap(page * PAGE, PAGE)
        self.uc.mem_map_ptr(page * PAGE, PAGE, rights, self.ram.address + self.ram.at((entry & FRAME) >> 12))
        self.mapped[page] = entry
