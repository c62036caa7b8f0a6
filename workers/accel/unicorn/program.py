"""The software CPU of a thread of a Linux program: system calls and exceptions leave the emulation, and are served by
whoever is its ``server``, while `run` goes on.

Its addresses are translated by the page tables of the program's system (paging.py): Unicorn keeps translations, which
are dropped when a page is to be logged again, and when the system says that a page has gone. Code that was looked at is
found by its address, so it is forgotten with the address space, and when a page that it lies in goes or is written to.

No stub runs and no frame is left in memory: a ``syscall`` and an exception stop the emulation.
"""

from __future__ import annotations

import ctypes
from typing import Any

import capstone
import msgspec
import unicorn
from unicorn import unicorn_const as uconst
from unicorn import x86_const as ux
from unicorn.unicorn_py3.unicorn import uclib

from ipc.layout import VcpuControl
from ipc.messages import ExitReason, WorkerSpec
from ipc.programs import EVERYTHING, REGISTERS, SYSCALL_SIZE, SYSTEM_ADDRESS
from ipc.shm import PAGE_SIZE

from ... import msr
from ...memory import GuestMemory
from ...ports import PortBus
from ...state import VcpuSaved
from ..base import AccelError, Exit, ExitKind, ProgramServer
from . import calls
from . import state as soft_state
from .context import FRAME, SEEN_BLOCKS, USER, WRITABLE, Stop
from .cpu import UnicornAccelerator
from .entry import enter, number

__all__ = ["UnicornProgram"]

_RIP, _RFLAGS, _RCX, _R11 = (REGISTERS.index(name) for name in ("rip", "rflags", "rcx", "r11"))
_FLAGS, _FLAGS_ALWAYS = 0x24_0DD5, 0x202        # all that popf can set at CPL 3, and ID; IF, and bit 1
_MSRS = ((msr.STAR, "star"), (msr.LSTAR, "lstar"), (msr.SYSCALL_MASK, "fmask"))
_CR4 = 0x620                                    # OSXMMEXCPT OSFXSR PAE
_INVALID, _PROTECTION, _PAGE_FAULT = 6, 13, 14
_VECTORS = 32
_INT_SIZE = 2                                   # bytes of ``int n``
_OF_IDT = 2                                     # in an error code: it is about an IDT entry
#: Instructions whose #UD is what they are for.
_UNDEFINED = (capstone.x86.X86_INS_UD0, capstone.x86.X86_INS_UD1, capstone.x86.X86_INS_UD2)
_INSTRUCTION_MAX = 15

#: Addresses that a program has nothing at, and nobody else mentions.
_PROBES = (0x5EED_1DEA_B000, 0x6A7E_C0DE_5000)
_ENGINE_WORDS = 512                             # of Unicorn's own structure, which has more

_COUNT = len(REGISTERS)
_Numbers, _Words, _Pointers = ctypes.c_int * _COUNT, ctypes.c_uint64 * _COUNT, ctypes.c_void_p * _COUNT


class UnicornProgram(UnicornAccelerator):
    """See workers/accel/base.py for the contract. ``server``: before ``run``."""

    server: ProgramServer
    sees_holes = has_gate = False

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus) -> None:
        self._words = _Words()
        self.registers_now = memoryview(self._words).cast("B").cast("Q")
        size = ctypes.sizeof(ctypes.c_uint64)
        self._numbers = _Numbers(*map(number, REGISTERS))
        self._pointers = _Pointers(*(ctypes.addressof(self._words) + size * at for at in range(_COUNT)))
        #: What Unicorn keeps is dropped before the guest goes on: by the vCPU thread, whose engine it is.
        self._stale = self._stale_code = False
        #: By a block's address and code, of each program that has run here.
        self._decoded: dict[tuple[int, bytes], dict[int, Any]] = {}
        self._vector: int | None = None         # of an exception that has left the emulation
        super().__init__(spec, memory, control, ports)

    @staticmethod
    def sees_host_tsc() -> bool:
        """Unicorn reads it."""
        return True

    # --- set-up -----------------------------------------------------------------------------------------------------

    @property
    def _trampoline(self) -> int:
        slot = self._spec.system_slot
        return slot.gpa + slot.size

    def _fill_context(self) -> None:
        super()._fill_context()
        slot = self._memory.slots[self._spec.system_slot.id]
        c = self._c
        c.tables, c.tables_gpa, c.tables_end = slot.host_address, slot.spec.gpa, slot.spec.gpa + slot.spec.size

    def _make_engine(self) -> Any:
        """With the plainest processor: a program that asks what there is must not find what Unicorn cannot do."""
        engine = unicorn.Uc(uconst.UC_ARCH_X86, uconst.UC_MODE_64)
        engine.ctl_set_cpu_model(ux.UC_CPU_X86_QEMU64)
        for slot in self._memory.slots.values():
            engine.mem_map_ptr(slot.spec.gpa, slot.spec.size, uconst.UC_PROT_ALL, slot.host_address)
        return engine

    def _boot(self) -> None:
        """It comes to CPL 3 before addresses are translated: the descriptors are where they are in memory."""
        engine, boot = self._engine, self._spec.boot
        table = boot["gdt_base"] - SYSTEM_ADDRESS + self._spec.system_slot.gpa
        engine.reg_write(ux.UC_X86_REG_GDTR, (0, table, boot["gdt_limit"], 0))
        engine.reg_write(ux.UC_X86_REG_CR4, _CR4)
        enter(engine, self._trampoline, boot["rip"], boot["rsp"], boot["rflags"], boot["cs"], boot["ss"],
              [boot["ds"]] * 4)
        engine.ctl_set_tlb_mode(uconst.UC_TLB_VIRTUAL)
        for at, name in enumerate(REGISTERS):
            self._words[at] = boot.get(name, 0)

    def _add_hooks(self) -> None:
        self._native_hook(uconst.UC_HOOK_BLOCK, calls.ON_BLOCK, self._address)
        self._native_hook(uconst.UC_HOOK_TLB_FILL, calls.ON_FILL, self._address)
        self._native_hook(uconst.UC_HOOK_INSN, calls.ON_CALL, self._address, insn=ux.UC_X86_INS_SYSCALL)
        self._engine.hook_add(uconst.UC_HOOK_INTR, self._on_exception)
        self._fault_at = _find_fault_address(self._engine)

    # --- the program ------------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        c, control, server = self._c, self._control, self.server
        left = server.begin()
        while left is None:
            if c.ring and (c.overflowed or c.pushed - c.reset >= c.soft_limit):
                return Exit(ExitKind.RING_FULL)
            if c.pushed >= c.push_limit:
                return Exit(ExitKind.KICKED)
            left = server.interrupted() if control.immediate_exit else self._go_on()
        return left

    def _go_on(self) -> Exit | None:
        """In the program, until it wants something, or somebody wants something of it."""
        c = self._c
        self._write_registers()
        while True:
            status = self._emulate()
            stop = Stop(int(c.stop))
            c.stop = 0
            if stop & Stop.CODE_WRITTEN:
                self._forget_code()
            if stop & Stop.CHANGED:
                self._unhook(int(c.block), int(c.block_size))
            if stop & (Stop.UNSEEN | Stop.CHANGED):
                self._look_at(int(c.block), int(c.block_size))
            if status or self._vector is not None or stop & (Stop.CALL | Stop.FAULT | Stop.FULL) \
                    or self._control.immediate_exit:
                break
        self._read_registers()
        if stop & Stop.CALL:
            self._words[_RCX], self._words[_R11] = self._words[_RIP], self._words[_RFLAGS]
            return self.server.call()
        if stop & Stop.FAULT:
            return self.server.fault(int(c.fault_vector), int(c.fault_error), int(c.fault_address))
        if status == uconst.UC_ERR_EXCEPTION:
            address = ctypes.c_uint64.from_address(self._fault_at).value
            return self.server.fault(int(c.fault_vector), int(c.fault_error), address)
        if status:
            return self._failed(status)
        if self._vector is not None:
            vector, self._vector = self._vector, None
            return self._excepted(vector)
        return None

    def _emulate(self) -> int:
        """From where the program is until a hook stops it; Unicorn's error number."""
        begin = ctypes.c_uint64(self._engine.reg_read(ux.UC_X86_REG_RIP))
        with self._inside():
            if self._stale_code:
                self._drop_code()
            if self._stale:
                self._engine.ctl(uconst.UC_CTL_TLB_FLUSH, uconst.UC_CTL_IO_WRITE)
            self._stale = self._stale_code = False
            return int(uclib.uc_emu_start(self._engine._uch, begin, ctypes.c_uint64(0), ctypes.c_uint64(0),
                                          ctypes.c_size_t(0)))

    def _on_exception(self, engine: Any, vector: int, data: Any) -> None:
        """UC_HOOK_INTR. Unicorn keeps the error code to itself: it is 0 but for what follows."""
        self._vector = vector
        engine.emu_stop()

    def _excepted(self, vector: int) -> Exit | None:
        if vector >= _VECTORS or vector == _PAGE_FAULT:     # ``int n``; a page fault comes another way
            self._words[_RIP] -= _INT_SIZE
            return self.server.fault(_PROTECTION, vector << 3 | _OF_IDT, self._words[_RIP])
        return self.server.fault(vector, 0, self._words[_RIP])

    def _failed(self, status: int) -> Exit | None:
        if status != uconst.UC_ERR_INSN_INVALID:
            return self._end(ExitReason.INTERNAL_ERROR, f"software CPU: {unicorn.UcError(status)}")
        rip = self._words[_RIP]
        code = b"".join(self._memory.read(*place) for place in self._places(rip, _INSTRUCTION_MAX))
        known = self._decoder.first(code, rip)
        if known is None or known.id in _UNDEFINED:
            return self.server.fault(_INVALID, 0, rip)
        return self._end(ExitReason.INTERNAL_ERROR, f"the software CPU does not have the instruction at {rip:#x}: "
                         f"{known.mnemonic} {known.op_str}".rstrip())

    def _places(self, address: int, size: int) -> list[tuple[int, int]]:
        """Up to what the program may not look at."""
        places = []
        end = address + size
        while address < end:
            part = min(end, (address | PAGE_SIZE - 1) + 1) - address
            entry = calls.entry_of(self._address, address)
            if not entry & USER:
                break
            places.append((entry & FRAME | address & PAGE_SIZE - 1, part))
            address += part
        return places

    def _look_at(self, address: int, size: int) -> None:
        """What can be written to is translated once its sum is there: what is changed later has another."""
        super()._look_at(address, size)
        if any(calls.entry_of(self._address, at) & WRITABLE for at in (address, address + size - 1)):
            self._engine.ctl_remove_cache(address, address + size)

    def _unhook(self, address: int, size: int) -> None:
        """The instructions there are others now."""
        for at in range(address, address + size):
            if at in self._hooked:
                status = uclib.uc_hook_del(self._engine._uch, ctypes.c_size_t(self._hooked.pop(at)[0]))
                if status:
                    raise unicorn.UcError(status)

    def _mark_code(self, address: int, places: list[tuple[int, int]]) -> bool:
        """A page that can be written to is left as it is: its blocks have sums."""
        marked = []
        for gpa, size in places:
            if not calls.entry_of(self._address, address) & WRITABLE:
                marked.append(self._pages.mark_code(gpa, size))
            address += size
        return any(marked)

    def _decode(self, code: bytes, address: int) -> tuple[dict[int, Any], dict[int, Any]]:
        """At CPL 3 Unicorn does what the rest is to do: an exception, or a call."""
        found = self._decoded.get((address, code))
        if found is None:
            if len(self._decoded) >= SEEN_BLOCKS:
                self._decoded.clear()
            found = self._decoded[address, code] = self._decoder.decode(code, address)[0]
        return found, {}

    # --- what its server changes ------------------------------------------------------------------------------------

    def _write_registers(self) -> None:
        self._words[_RFLAGS] = self._words[_RFLAGS] & _FLAGS | _FLAGS_ALWAYS
        uclib.uc_reg_write_batch(self._engine._uch, self._numbers, self._pointers, ctypes.c_int(_COUNT))

    def _read_registers(self) -> None:
        uclib.uc_reg_read_batch(self._engine._uch, self._numbers, self._pointers, ctypes.c_int(_COUNT))

    def set_registers(self, words: memoryview) -> None:
        """All of them, 18 words."""
        self.registers_now[:] = words

    def set_fs_base(self, address: int) -> None:
        self._engine.reg_write(ux.UC_X86_REG_FS_BASE, address)

    @property
    def fs_base(self) -> int:
        return int(self._engine.reg_read(ux.UC_X86_REG_FS_BASE))

    def set_root(self, address: int) -> None:
        """Nothing is kept of what was there before."""
        self._c.root = address
        self._stale = self._stale_code = True

    def forget_frames(self, runs: list[tuple[int, int]]) -> None:
        with self._outside():
            self._stale = True
            if EVERYTHING in runs or any(self._pages.has_code(first * PAGE_SIZE, count * PAGE_SIZE)
                                         for first, count in runs):
                self._stale_code = True

    def _forget_translations(self) -> None:
        self._stale = True

    def get_xsave(self, area: memoryview) -> None:
        area[:] = soft_state.get_xsave(self._engine)

    def set_xsave(self, area: memoryview) -> None:
        """Of it, what this processor has."""
        soft_state.set_xsave(self._engine, bytes(area))

    # ----------------------------------------------------------------------------------------------------------------

    def registers(self) -> dict[str, int]:
        self._write_registers()
        boot = self._spec.boot
        return {**super().registers(), "cr0": boot["cr0"], "cr3": int(self._c.root), "cr4": boot["cr4"],
                "efer": boot["efer"]}

    def get_state(self) -> VcpuSaved:
        """The system's registers are those that it has on KVM."""
        boot = self._spec.boot
        with self._outside():
            self._write_registers()
            state = soft_state.get_state(self._engine, self._memory)
        regs = state.regs
        if self.server.repeats_call:
            regs = msgspec.structs.replace(regs, rip=regs.rip - SYSCALL_SIZE)
        tr = msgspec.structs.replace(state.segments.tr, base=boot["tss_base"], limit=boot["tss_limit"],
                                     selector=boot["tr_selector"])
        msrs = {str(number): boot[name] for number, name in _MSRS}
        return msgspec.structs.replace(
            state, regs=regs, cr0=boot["cr0"], cr3=int(self._c.root), cr4=boot["cr4"], efer=boot["efer"],
            segments=msgspec.structs.replace(state.segments, tr=tr), msrs={**state.msrs, **msrs},
            gdt=msgspec.structs.replace(state.gdt, base=boot["gdt_base"]),
            idt=msgspec.structs.replace(state.idt, base=boot["idt_base"], limit=boot["idt_limit"]))

    def set_state(self, state: VcpuSaved) -> None:
        """The memory is another than it was: nothing is kept of it."""
        soft_state.check_program(state)
        with self._outside():
            try:
                soft_state.set_program_registers(self._engine, state)
            except unicorn.UcError as exc:
                raise AccelError(f"the software CPU rejected the saved vCPU state: {exc}") from None
            for at, name in enumerate(REGISTERS):
                self._words[at] = getattr(state.regs, name)
            self._c.root = 0
            self._stale = self._stale_code = True

    def close(self) -> None:
        self.registers_now.release()
        super().close()


def _find_fault_address(engine: Any) -> int:
    """Where Unicorn's structure has the address of a fault, which it tells nobody: its hooks are given the page. Raises
    AccelError."""
    found = set(range(_ENGINE_WORDS))
    for probe in _PROBES:
        uclib.uc_emu_start(engine._uch, ctypes.c_uint64(probe), ctypes.c_uint64(0), ctypes.c_uint64(0),
                           ctypes.c_size_t(0))
        words = (ctypes.c_uint64 * _ENGINE_WORDS).from_address(engine._uch.value)
        found &= {at for at, word in enumerate(words) if word == probe}
    if len(found) != 1:
        raise AccelError("this version of Unicorn does not tell where an access has failed: it cannot run programs")
    return int(engine._uch.value) + found.pop() * ctypes.sizeof(ctypes.c_uint64)
