"""One vCPU without a machine around it: an accelerator driven in this process, over a few bytes of code."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.layout import SYSTEM_SLOT, DirtyGfn, VcpuControl, control_size, vcpu_control
from ipc.messages import SlotSpec, WorkerSpec
from ipc.shm import PAGE_SIZE, Segment
from vmm.machine import boot
from vmm.machine.names import segment_name
from workers.accel.base import Accelerator, Exit, ExitKind
from workers.accel.registry import capabilities, load
from workers.memory import GuestMemory
from workers.ports import PortBus, PortEventKind

CODE = 0x10_0000            # where the code lies, its own page
DATA = 0x20_0000            # free for the code's use, to the end of the slot less the stack
RAM_SIZE = (4 << 20) + 3 * PAGE_SIZE
EXIT = bytes.fromhex("e7f4")        # out %eax, $0xf4


@dataclass
class Bare:
    """A vCPU at its first instruction, at ``CODE``."""

    spec: WorkerSpec
    control: VcpuControl
    memory: GuestMemory
    ram: NDArray[np.uint8]
    accel: Accelerator
    ring_segment: Segment | None
    console: list[bytes] = field(default_factory=list)

    def run(self) -> Exit:
        """Until something happens that is no kick."""
        while True:
            self.accel.clear_immediate_exit()
            leave = self.accel.run()
            if leave.kind is not ExitKind.KICKED:
                return leave

    def word(self, gpa: int, size: int = 8) -> int:
        return int.from_bytes(self.ram[gpa:gpa + size].tobytes(), "little")

    def ring(self) -> Any:
        """The software ring's entries (DirtyGfn array)."""
        assert self.ring_segment is not None
        return (DirtyGfn * self.spec.ring_entries).from_address(self.ring_segment.address)

    def harvest(self) -> list[int]:
        """Page offsets of the dirty entries from the first not reset, flagged as harvested. Plain Python."""
        found = []
        entries = self.ring()
        first = int(self.control.reset_total)
        for i in range(self.spec.ring_entries):
            entry = entries[(first + i) % self.spec.ring_entries]
            if entry.flags != 1:
                break
            entry.flags = 2
            assert entry.slot == 0
            found.append(int(entry.offset))
        return found


@contextmanager
def bare(accel: str, code: bytes, *, ring: int = 1024, privilege: str = "user", log: bool = True,
         ram_size: int = RAM_SIZE, **registers: int) -> Iterator[Bare]:
    """``code`` at CODE, in slot 0 at GPA 0, with registers as given (else as the guest contract has them)."""
    machine = f"bare{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        def segment(what: str, size: int) -> Segment:
            return stack.enter_context(Segment.create(segment_name(machine, what), size))

        ram, system = segment("ram0", ram_size), segment("system", boot.system_size(1, ram_size))
        control = segment("control", control_size(1))
        rings = segment("ring0", ring * 16) if ring and not capabilities(accel).kernel_ring else None
        logs = segment("vlog0", -(-ram_size // PAGE_SIZE // 64) * 8 + 8) if not ring else None
        view = memoryview(system.buf)
        boot.write_system_slot(view, vcpu_count=1, slots=[boot.BootSlot(0, 0, ram_size, DATA, ram_size)],
                               image_end=CODE + PAGE_SIZE, params=[], cmdline="", stack_size=16384,
                               top_gpa=ram_size)
        view.release()
        array = np.frombuffer(ram.buf, np.uint8)
        array[CODE:CODE + len(code)] = np.frombuffer(code, np.uint8)
        start = boot.boot_registers(0, vcpu_count=1, entry=CODE, stack_top=ram_size, privilege=privilege)
        spec = WorkerSpec(
            machine=machine, belongings=machine, index=0, vcpu_count=1, accel=accel, privilege=privilege,
            ring_entries=ring,
            ring_segment=rings.name if rings else "", control_segment=control.name, request_endpoint="",
            slots=[SlotSpec(id=0, gpa=0, size=ram_size, segment=ram.name, log=log,
                            log_segment=logs.name if logs else "")],
            system_slot=SlotSpec(id=SYSTEM_SLOT, gpa=boot.SYSTEM_GPA, size=system.size, segment=system.name),
            notify_endpoint="", fd_socket="", boot=start | registers)
        block = vcpu_control(control.address, 0)
        memory = GuestMemory()
        stack.callback(memory.close)
        for slot in (*spec.slots, spec.system_slot):
            memory.add(slot)
        console: list[bytes] = []
        made = load(accel)(spec, memory, block, PortBus(console.append))
        stack.callback(made.close)
        yield Bare(spec, block, memory, array, made, rings, console)


#: Puts RAX into XMM5 and 1.0 on the x87 stack, stops for a hypercall; then XMM5 to RBX, and 1.0 to memory at
#: RCX, popped.
STATEFUL = bytes.fromhex("66480f6ee8 d9e8 e7f8 66480f7eeb dd19 31c0".replace(" ", "")) + EXIT
STATEFUL_REGISTERS = {"rax": 0x1122_3344_5566_7788, "r14": 99, "rcx": DATA}


def finish_stateful(vcpu: Bare) -> None:
    """Run STATEFUL from behind its hypercall to its end: what it had in its registers is in their place."""
    leave = vcpu.run()
    assert leave.event is not None
    assert leave.event.kind is PortEventKind.EXIT
    registers = vcpu.accel.registers()
    assert registers["rbx"] == 0x1122_3344_5566_7788
    assert registers["r14"] == 99
    assert vcpu.word(DATA) == 0x3FF0_0000_0000_0000      # 1.0


class NativeCode:
    """Machine code run by the host's own CPU, the best oracle there is (x86-64 hosts)."""

    #: RDI points to six words, RAX, RBX, RCX, RDX, the flags and RSI, which are loaded before the code; all
    #: but RSI are stored after it.
    _BEFORE = bytes.fromhex("53 4989fb 498b03 498b5b08 498b4b10 498b5318 498b7328 41ff7320 9d")
    _AFTER = bytes.fromhex("9c 418f4320 498903 49895b08 49894b10 49895318 5b c3")

    def __init__(self, code: bytes) -> None:
        import mmap

        text = self._BEFORE + code + self._AFTER
        self._memory = mmap.mmap(-1, PAGE_SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._memory[:len(text)] = text
        anchor = ctypes.c_char.from_buffer(self._memory)
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(anchor))
        self._anchor = anchor

    def __call__(self, rax: int, rbx: int, rcx: int, rdx: int, flags: int, rsi: int) -> list[int]:
        words = (ctypes.c_uint64 * 6)(rax, rbx, rcx, rdx, flags, rsi)
        self._function(ctypes.addressof(words))
        return list(words)
