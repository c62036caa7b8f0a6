"""The software CPU: Unicorn (QEMU's TCG as a library) with dirty logging, kicks and real atomics.

It logs as KVM does: a ring entry at the first store to a page since the page was last reset. The ring
lies in shared memory; a byte a page says whether the page needs an entry. What runs at guest speed is in
workers/accel/unicorn/hooks.py, this is what happens around it.

The guest stands still whenever pages are re-protected: the service thread raises ``hold``, the next
block's hook leaves the emulation, and the vCPU thread waits at the turnstile. Between two blocks no store
is under way, so a page whose flag is cleared has its last value in memory already. Page flags are changed by
whoever holds the gate, and by nobody else: a bit that another thread writes back is a page that is never logged
again.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import unicorn
from numpy.typing import NDArray
from unicorn import unicorn_const as uconst
from unicorn import x86_const as ux
from unicorn.unicorn_py3.unicorn import uclib

from ipc.layout import RING_RESERVE, Tracking, VcpuControl
from ipc.messages import ExitReason, SlotSpec, WorkerSpec
from ipc.shm import PAGE_SIZE, Segment, SegmentError

from ... import msr
from ...faults import describe
from ...memory import GuestMemory
from ...ports import PortBus, PortEventKind, UnknownPort
from ...state import VcpuSaved
from ..base import AccelError, Exit, ExitKind
from . import calls
from . import state as soft_state
from .context import CONTEXT, PAGE_CODE, PAGE_LOGGED, SEEN, SEEN_BLOCKS, SLOT, Stop
from .decode import Decoder, PortAccess, Special

__all__ = ["UnicornAccelerator"]

_TRAMPOLINE = 0xFF_F000             # behind the system slot, in the area that no RAM may be in
_TRAMPOLINE_CODE = bytes.fromhex("8ed8 8ec3 8ee1 8eea 48cf")     # mov to ds, es, fs, gs from eax to edx; iretq
_TRAMPOLINE_INSTRUCTIONS = 5
_EFER_SCE = 1
_NO_LIMIT = (1 << 64) - 1
_DF = 1 << 10
_UD, _DF_VECTOR, _GP, _PF = 6, 8, 13, 14
_IDT_GATE = 16

_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15", "rip", "rflags")
_ENTERED = ("rip", "rsp", "rflags")
_REPORTED = (*_GENERAL, "cr0", "cr2", "cr3", "cr4", "cs", "ss", "fs_base", "gs_base")
_ACCUMULATOR = {1: ux.UC_X86_REG_AL, 2: ux.UC_X86_REG_AX, 4: ux.UC_X86_REG_RAX}  # a 4-byte IN clears the rest
_ACCESS = {uconst.UC_MEM_READ_UNMAPPED: "read", uconst.UC_MEM_WRITE_UNMAPPED: "write",
           uconst.UC_MEM_FETCH_UNMAPPED: "fetch"}


def _number(register: str) -> int:
    return int(getattr(ux, f"UC_X86_REG_{register.upper()}"))


class _Slot:
    """A RAM slot here: where its memory is, and its page flags."""

    def __init__(self, spec: SlotSpec, host: int, logged: bool) -> None:
        self.spec = spec
        self.host = host
        self.flags: NDArray[np.uint8] = np.zeros(spec.size // PAGE_SIZE, np.uint8)
        self.log(logged)

    def log(self, on: bool) -> None:
        if on:
            self.flags &= 0xFF ^ PAGE_LOGGED
        else:
            self.flags |= PAGE_LOGGED


class UnicornAccelerator:
    """See workers/accel/base.py for the contract."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus) -> None:
        self.vcpu_fd = -1
        self.kvm_run_size = 0
        self._spec = spec
        self._memory = memory
        self._control = control
        self._ports = ports
        self._turnstile = threading.Lock()
        self._gate = threading.Lock()       # held while the guest runs, or by who must not have it run
        self._slots: dict[int, _Slot] = {}
        self._fault: Exit | None = None
        self._ring: Segment | None = None
        self._context: NDArray[Any] = np.zeros(1, CONTEXT)
        self._c: Any = self._context.view(np.recarray)[0]
        self._table: NDArray[Any] = np.zeros(0, SLOT)
        self._seen: NDArray[Any] = np.zeros(SEEN_BLOCKS, SEEN)
        self._seen_count = 0
        self._address = int(self._context.ctypes.data)
        self._decoder = Decoder(self._address)
        #: {address: (hook handle, what the hook points to or what the run loop is to do)}
        self._hooked: dict[int, tuple[int, Any]] = {}
        self._fill_context()
        for slot in memory.slots.values():
            if slot.spec.id != spec.system_slot.id:
                self._slots[slot.spec.id] = _Slot(slot.spec, slot.host_address, self._logs(slot.spec))
        self._write_table()
        try:
            if spec.ring_entries:
                self._use_ring(Segment.open(spec.ring_segment))
            self._engine = self._make_engine()
            self._load_boot(spec.boot)
            self._add_hooks()
        except unicorn.UcError as exc:
            self.close()
            raise AccelError(f"the software CPU cannot be set up: {exc}") from None
        except BaseException:
            self.close()
            raise

    # --- set-up ----------------------------------------------------------------------------------

    def _fill_context(self) -> None:
        c = self._c
        for name in ("emu_stop", "reg_read", "reg_write"):
            c[name] = ctypes.cast(getattr(uclib, f"uc_{name}"), ctypes.c_void_p).value
        block = ctypes.addressof(self._control)
        c.immediate_exit = block + VcpuControl.immediate_exit.offset
        c.pushed_total = block + VcpuControl.pushed_total.offset
        c.seen = self._seen.ctypes.data
        c.cr3 = self._spec.boot["cr3"]
        c.push_limit = _NO_LIMIT

    def _logs(self, slot: SlotSpec) -> bool:
        """The hooks log this slot: with a ring or in bitmap mode. (Otherwise it is as if every page had its entry
        already; the hooks stay, for the code that the guest may write.)"""
        return slot.log and self._spec.mode in (Tracking.RING, Tracking.BITMAP)

    def _use_ring(self, ring: Segment | None) -> None:
        if self._ring is not None:
            self._ring.close()
        self._ring = ring
        entries = 0 if ring is None else self._spec.ring_entries
        self._c.ring, self._c.entries = 0 if ring is None else ring.address, entries
        self._c.soft_limit = max(0, entries - RING_RESERVE)

    def _make_engine(self) -> Any:
        engine = unicorn.Uc(uconst.UC_ARCH_X86, uconst.UC_MODE_64)
        for slot in self._memory.slots.values():
            engine.mem_map_ptr(slot.spec.gpa, slot.spec.size, uconst.UC_PROT_ALL, slot.host_address)
        return engine

    def _write_table(self) -> None:
        """Tell the hooks of the slots. The guest stands still."""
        rows = [(s.spec.gpa, s.spec.gpa + s.spec.size, s.host, s.flags.ctypes.data, s.spec.id)
                for s in self._slots.values()]
        self._table = np.array(rows, SLOT)
        self._c.slots, self._c.slot_count, self._c.last_slot = self._table.ctypes.data, len(rows), 0

    def _load_boot(self, boot: Mapping[str, int]) -> None:
        engine = self._engine
        engine.reg_write(ux.UC_X86_REG_GDTR, (0, boot["gdt_base"], boot["gdt_limit"], 0))
        engine.reg_write(ux.UC_X86_REG_IDTR, (0, boot["idt_base"], boot["idt_limit"], 0))
        engine.reg_write(ux.UC_X86_REG_TR, (boot["tr_selector"], boot["tss_base"], boot["tss_limit"], 0x8B00))
        engine.reg_write(ux.UC_X86_REG_CR3, boot["cr3"])
        engine.reg_write(ux.UC_X86_REG_CR4, boot["cr4"])
        engine.msr_write(msr.EFER, boot["efer"])
        engine.msr_write(msr.LSTAR, boot["lstar"])
        engine.reg_write(ux.UC_X86_REG_CR0, boot["cr0"])
        self._enter(boot["rip"], boot["rsp"], boot["rflags"], boot["cs"], boot["ss"], [boot["ds"]] * 4)
        for name in _GENERAL:
            if name in boot and name not in _ENTERED:
                engine.reg_write(_number(name), boot[name])

    def _enter(self, rip: int, rsp: int, rflags: int, cs: int, ss: int, data: list[int]) -> None:
        """Load DS, ES, FS and GS (``data``) and go there with IRETQ, as an operating system would: told to set
        a selector, Unicorn does, but neither loads its descriptor nor changes the privilege level.

        The general registers are not kept."""
        engine = self._engine
        page = self._spec.system_slot.gpa + _TRAMPOLINE
        engine.mem_map(page, PAGE_SIZE)
        frame = page + PAGE_SIZE // 2
        engine.mem_write(page, _TRAMPOLINE_CODE)
        engine.mem_write(frame, b"".join(v.to_bytes(8, "little") for v in (rip, cs, rflags, rsp, ss)))
        engine.reg_write(ux.UC_X86_REG_RSP, frame)
        for register, selector in zip(("rax", "rbx", "rcx", "rdx"), data, strict=True):
            engine.reg_write(_number(register), selector)
        engine.emu_start(page, rip, count=_TRAMPOLINE_INSTRUCTIONS)
        engine.mem_unmap(page, PAGE_SIZE)
        # From now on no address ends the emulation. (Unicorn would also look each one up in the guest's page
        # tables after every stop, and take the page fault for a first one of two.)
        engine.ctl_exits_enabled(True)
        engine.ctl_set_exits([])
        if engine.reg_read(ux.UC_X86_REG_CS) != cs or engine.reg_read(ux.UC_X86_REG_RIP) != rip:
            raise AccelError("the software CPU cannot be set up: it did not enter the guest's privilege level")

    def _add_hooks(self) -> None:
        engine = self._engine
        self._native_hook(uconst.UC_HOOK_MEM_WRITE, calls.ON_WRITE, self._address)
        self._native_hook(uconst.UC_HOOK_BLOCK, calls.ON_BLOCK, self._address)
        engine.hook_add(uconst.UC_HOOK_INTR, self._on_exception)
        engine.hook_add(uconst.UC_HOOK_MEM_UNMAPPED, self._on_unmapped)

    def _native_hook(self, kind: int, callback: int, data: int, begin: int = 1, end: int = 0) -> int:
        """A hook without Python in between (the binding's own take a Python callable)."""
        handle = ctypes.c_size_t()
        status = uclib.uc_hook_add(self._engine._uch, ctypes.byref(handle), kind,
                                   ctypes.c_void_p(callback), ctypes.c_void_p(data),
                                   ctypes.c_uint64(begin), ctypes.c_uint64(end))
        if status:
            raise unicorn.UcError(status)
        return int(handle.value)

    # --- the guest -------------------------------------------------------------------------------

    def clear_immediate_exit(self) -> None:
        self._control.immediate_exit = 0

    def interrupt(self) -> None:
        self._control.immediate_exit = 1

    def run(self) -> Exit:
        c = self._c
        while True:
            if c.ring and (c.overflowed or c.pushed - c.reset >= c.soft_limit):
                return Exit(ExitKind.RING_FULL)
            if self._control.immediate_exit or c.pushed >= c.push_limit:
                return Exit(ExitKind.KICKED)
            status = self._emulate()
            stop = Stop(int(c.stop))
            c.stop = 0
            if self._fault is not None or status:
                return self._ended(status)
            if stop & Stop.CODE_WRITTEN:
                self._forget_code()
            if stop & Stop.UNSEEN:
                self._look_at(int(c.block), int(c.block_size))
            if stop & Stop.SPECIAL:
                leave = self._carry_out(int(c.special))
                if leave is not None:
                    return leave

    def _emulate(self) -> int:
        """Until a hook stops it; Unicorn's error number."""
        begin = self._engine.reg_read(ux.UC_X86_REG_RIP)
        with self._inside():
            return int(uclib.uc_emu_start(self._engine._uch, ctypes.c_uint64(begin), ctypes.c_uint64(0),
                                          ctypes.c_uint64(0), ctypes.c_size_t(0)))

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Nobody re-protects a page meanwhile. For the vCPU thread."""
        with self._turnstile:       # whoever wants the guest out goes first
            self._gate.acquire()
        try:
            yield
        finally:
            self._gate.release()

    @contextlib.contextmanager
    def _outside(self) -> Iterator[None]:
        """The guest is outside the emulation, between two instructions. For the service thread."""
        with self._turnstile:
            self._c.hold = 1
            with self._gate:
                self._c.hold = 0
                yield

    # --- blocks and their special instructions ------------------------------------------------------

    def _look_at(self, address: int, size: int) -> None:
        """A block is about to run for the first time: hook what it must not be left alone with."""
        if self._seen_count >= SEEN_BLOCKS // 2:
            self._forget_code()
        try:
            code = self._memory.read(address, size)
        except KeyError:
            code = b""      # not fetched from RAM: the fetch itself will say so
        locked, special = self._decoder.decode(code, address)
        fresh = False
        for at, record in locked.items():
            if at not in self._hooked:
                handle = self._native_hook(uconst.UC_HOOK_CODE, calls.ON_LOCKED, record.ctypes.data, at, at)
                self._hooked[at] = (handle, record)
                fresh = True
        for at, what in special.items():
            if at not in self._hooked:
                handle = self._native_hook(uconst.UC_HOOK_CODE, calls.ON_SPECIAL, self._address, at, at)
                self._hooked[at] = (handle, what)
                fresh = True
        if fresh:   # it was translated without the hooks
            self._engine.ctl_remove_cache(address, address + size)
        with self._inside():
            self._mark_code(address, size)
        calls.remember(self._address, address, size)
        self._seen_count += 1

    def _mark_code(self, address: int, size: int) -> None:
        for slot in self._slots.values():
            first, last = address - slot.spec.gpa, address + size - 1 - slot.spec.gpa
            if first < slot.spec.size and last >= 0:
                slot.flags[max(first, 0) // PAGE_SIZE:last // PAGE_SIZE + 1] |= PAGE_CODE

    def _forget_code(self) -> None:
        """The guest has overwritten code: every block is looked at again."""
        with self._inside():
            self._drop_code()

    def _drop_code(self) -> None:
        """The gate is held."""
        for handle, _ in self._hooked.values():
            status = uclib.uc_hook_del(self._engine._uch, ctypes.c_size_t(handle))
            if status:
                raise unicorn.UcError(status)
        self._engine.ctl_flush_tb()
        self._hooked.clear()
        self._seen[:] = 0
        self._seen_count = 0
        for slot in self._slots.values():
            slot.flags &= 0xFF ^ PAGE_CODE

    def _carry_out(self, address: int) -> Exit | None:
        what = self._hooked[address][1]
        name = getattr(what, "name", "locked")
        if name == "port":
            return self._port(what.access, address, what.next)
        if name == "hlt":
            if self._engine.reg_read(ux.UC_X86_REG_CS) & 3:
                return self._exception(_GP)
            self._engine.reg_write(ux.UC_X86_REG_RIP, what.next)
            return self._end(ExitReason.HALT, "")
        if name == "cr3":
            return self._load_cr3(what)
        if name == "locked":
            return self._end(ExitReason.INTERNAL_ERROR, "the software CPU cannot make a locked instruction "
                             "atomic under page tables of the guest's own")
        if name == "syscall" and self._engine.msr_read(msr.EFER) & _EFER_SCE:
            return self._end(ExitReason.INTERNAL_ERROR, "the software CPU does not carry out syscall")
        return self._exception(_UD if name == "syscall" else _GP)

    def _load_cr3(self, what: Special) -> Exit | None:
        """Unicorn sets accessed and dirty bits in page tables, and calls no hook for that: in the machine's tables
        they are all set, but tables in RAM would change in no log."""
        engine = self._engine
        value = engine.reg_read(what.source)
        if engine.reg_read(ux.UC_X86_REG_CS) & 3:
            return self._exception(_GP)
        if not soft_state.is_boot_cr3(value, self._spec.boot["cr3"]):
            return self._end(ExitReason.INTERNAL_ERROR, "the software CPU cannot log what it writes into page "
                             f"tables of the guest's own (CR3 {value:#x})")
        engine.reg_write(ux.UC_X86_REG_CR3, value)
        engine.reg_write(ux.UC_X86_REG_RIP, what.next)
        return None

    def _port(self, access: PortAccess, address: int, after: int) -> Exit | None:
        """IN, OUT, INS, OUTS, the repeated ones to their end."""
        engine = self._engine
        port = access.port if access.port is not None else engine.reg_read(ux.UC_X86_REG_DX)
        count = engine.reg_read(ux.UC_X86_REG_RCX) if access.repeated else 1
        while count:
            try:
                event = self._port_once(access, port)
            except UnknownPort as exc:
                return self._end(ExitReason.UNKNOWN_PORT, str(exc))
            except KeyError as exc:
                return self._end(ExitReason.BAD_ADDRESS, f"port access: {exc.args[0]}")
            count -= 1
            if access.repeated:
                engine.reg_write(ux.UC_X86_REG_RCX, count)
            if count == 0:
                engine.reg_write(ux.UC_X86_REG_RIP, after)
            if event is not None:
                return Exit(ExitKind.PORT, event=event)
        engine.reg_write(ux.UC_X86_REG_RIP, after)
        return None

    def _port_once(self, access: PortAccess, port: int) -> Any:
        """One value. Raises UnknownPort, and KeyError for memory outside RAM."""
        engine, size = self._engine, access.size
        pointer = ux.UC_X86_REG_RSI if access.write else ux.UC_X86_REG_RDI
        at = engine.reg_read(pointer) if access.string else 0
        event = None
        if access.write:
            value = (int.from_bytes(self._memory.read(at, size), "little") if access.string
                     else engine.reg_read(ux.UC_X86_REG_RAX) & (1 << 8 * size) - 1)
            event = self._ports.write(port, size, value)
            if event is not None and event.kind is PortEventKind.FAULT:
                raise UnknownPort(port, size, write=True)   # the stubs' port: here no stub ever runs
        else:
            value = self._ports.read(port, size)
            if access.string:
                host = self._memory.host_address(at, size)
                with self._inside():    # were the page reset between the two, its new contents would be in no log
                    calls.log_write(self._address, at, size)
                    ctypes.memmove(host, value.to_bytes(size, "little"), size)
            else:
                engine.reg_write(_ACCUMULATOR[size], value)
        if access.string:
            step = -size if engine.reg_read(ux.UC_X86_REG_RFLAGS) & _DF else size
            engine.reg_write(pointer, (at + step) % (1 << 64))
        return event

    def hypercall_args(self) -> tuple[int, int, int]:
        read = self._engine.reg_read
        return read(ux.UC_X86_REG_EAX), read(ux.UC_X86_REG_RDI), read(ux.UC_X86_REG_RSI)

    def set_hypercall_result(self, value: int) -> None:
        self._engine.reg_write(ux.UC_X86_REG_RAX, value)

    # --- how a guest ends ------------------------------------------------------------------------------

    def _on_exception(self, engine: Any, vector: int, data: Any) -> None:
        """UC_HOOK_INTR. Unicorn delivers no exception to the guest, and keeps the error code to itself."""
        if self._fault is None:
            self._fault = self._exception(vector)
        engine.emu_stop()

    def _on_unmapped(self, engine: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        kind = _ACCESS.get(access, "access")
        self._fault = self._end(ExitReason.BAD_ADDRESS, f"{kind} of {size} bytes at {address:#x}, outside RAM")
        return False

    def _exception(self, vector: int) -> Exit:
        if vector > 31:
            vector = _GP    # int n: the boot IDT ends there
        _, _, limit, _ = self._engine.reg_read(ux.UC_X86_REG_IDTR)
        if limit < vector * _IDT_GATE + _IDT_GATE - 1 and limit < _DF_VECTOR * _IDT_GATE + _IDT_GATE - 1:
            return self._end(ExitReason.TRIPLE_FAULT, "an exception without an IDT to take it")
        reason, detail = describe(vector, None, self._engine.reg_read(ux.UC_X86_REG_CR2))
        return self._end(reason, detail)

    def _ended(self, status: int) -> Exit:
        if self._fault is not None:
            return self._fault
        if status == uconst.UC_ERR_INSN_INVALID:
            return self._exception(_UD)
        return self._end(ExitReason.INTERNAL_ERROR, f"software CPU: {unicorn.UcError(status)}")

    def _end(self, reason: ExitReason, detail: str) -> Exit:
        return Exit(ExitKind.END, reason=reason, detail=detail, registers=self.registers())

    def registers(self) -> dict[str, int]:
        found = {name: int(self._engine.reg_read(_number(name))) for name in _REPORTED}
        found["efer"] = int(self._engine.msr_read(msr.EFER))
        return found

    # --- ring, dirty log, slots: by the service thread ----------------------------------------------------

    def pushed(self) -> int:
        return int(self._c.pushed)

    def limit_pushes(self, count: int | None) -> None:
        self._c.push_limit = _NO_LIMIT if count is None else int(self._c.pushed) + count

    def reset_ring(self, expected: int) -> int:
        if not self._c.ring:
            return 0
        with self._outside():
            if self._c.overflowed:
                return 0    # it has lost count: the coordinator is to see that and ask for a new one
            return calls.reset(self._address)

    def rebuild_ring(self) -> None:
        with self._outside():
            assert self._ring is not None
            ctypes.memset(self._ring.address, 0, self._spec.ring_entries * 16)
            self._restart_log()

    def _restart_log(self) -> None:
        """Nothing is in the log, every page that is logged is logged at its next write. The guest stands still."""
        self._c.pushed = self._c.reset = self._c.overflowed = 0
        for slot in self._slots.values():
            slot.log(self._logs(slot.spec))

    def set_tracking(self, spec: WorkerSpec) -> None:
        try:
            ring = Segment.open(spec.ring_segment) if spec.ring_entries else None
        except SegmentError as exc:
            raise AccelError(f"vCPU {spec.index}: dirty tracking cannot be changed: {exc}") from None
        with self._outside():
            self._spec = spec
            self._use_ring(ring)
            if ring is not None:
                ctypes.memset(ring.address, 0, spec.ring_entries * 16)
            self._restart_log()

    def get_dirty_log(self, slot_id: int) -> int:
        """Bitmap mode. The guest may run: what it dirties behind this is in the next log."""
        dirty = (self._slots[slot_id].flags & PAGE_LOGGED).astype(bool)
        self._log_buffer(slot_id)[:] = np.packbits(dirty, bitorder="little")
        return int(dirty.sum())

    def clear_dirty_log(self, slot_id: int) -> None:
        """The next write to the pages set in the log buffer is logged again."""
        slot = self._slots[slot_id]
        bits = np.unpackbits(self._log_buffer(slot_id), bitorder="little", count=len(slot.flags))
        with self._outside():
            slot.flags[bits.astype(bool)] &= 0xFF ^ PAGE_LOGGED

    def _log_buffer(self, slot_id: int) -> NDArray[np.uint8]:
        size = -(-len(self._slots[slot_id].flags) // 8)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._memory.slots[slot_id].log_address))

    def set_memslot(self, slot: SlotSpec) -> None:
        with self._outside():
            known = self._slots.get(slot.id)
            if known is not None:
                if known.spec.log != slot.log:
                    known.log(self._logs(slot))
                known.spec = slot
                return
            host = self._memory.slots[slot.id].host_address
            try:
                self._engine.mem_map_ptr(slot.gpa, slot.size, uconst.UC_PROT_ALL, host)
            except unicorn.UcError as exc:
                raise AccelError(f"slot {slot.id} cannot be added: {exc}") from None
            self._slots[slot.id] = _Slot(slot, host, self._logs(slot))
            self._write_table()

    def remove_memslot(self, slot_id: int) -> None:
        with self._outside():
            slot = self._slots.pop(slot_id)
            self._drop_code()
            self._engine.mem_unmap(slot.spec.gpa, slot.spec.size)
            self._write_table()

    # --- state -------------------------------------------------------------------------------------------

    def get_state(self) -> VcpuSaved:
        with self._outside():
            return soft_state.get_state(self._engine, self._memory)

    def set_state(self, state: VcpuSaved) -> None:
        """In a fresh engine: the old one may have translated what is no longer in memory."""
        soft_state.check(state, self._spec.boot["cr3"])
        with self._outside():
            regs, segments = state.regs, state.segments
            self._hooked.clear()
            self._seen[:] = 0
            self._seen_count = 0
            try:
                self._engine = self._make_engine()
                soft_state.set_system_registers(self._engine, state)
                self._enter(regs.rip, regs.rsp, regs.rflags, segments.cs.selector, segments.ss.selector,
                            [one.selector for one in (segments.ds, segments.es, segments.fs, segments.gs)])
                soft_state.set_registers(self._engine, state)
                self._add_hooks()
            except unicorn.UcError as exc:
                raise AccelError(f"the software CPU refuses the saved vCPU state: {exc}") from None

    def close(self) -> None:
        """Idempotent."""
        self._engine = None     # the binding closes it with its last reference
        self._c = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None
