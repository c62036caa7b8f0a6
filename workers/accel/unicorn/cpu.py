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
from collections.abc import Iterator
from typing import Any

import numpy as np
import unicorn
from numpy.typing import NDArray
from unicorn import unicorn_const as uconst
from unicorn import x86_const as ux
from unicorn.unicorn_py3.unicorn import uclib

from ipc.layout import VcpuControl
from ipc.messages import ExitReason, SlotSpec, WorkerSpec
from ipc.shm import Segment, SegmentError

from ... import msr
from ...faults import describe
from ...memory import GuestMemory
from ...ports import PortBus, PortEventKind, UnknownPort
from ...state import VcpuSaved
from ..base import AccelError, Exit, ExitKind
from . import calls
from . import state as soft_state
from .context import CONTEXT, SEEN, SEEN_BLOCKS, Stop
from .decode import Decoder, PortAccess, Special
from .entry import GENERAL, enter, load_boot, number
from .pages import LoggedPages

__all__ = ["UnicornAccelerator"]

_TRAMPOLINE = 0xFF_F000             # behind the system slot, in the area that no RAM may be in
_EFER_SCE = 1
_NO_LIMIT = (1 << 64) - 1
_DF = 1 << 10
_UD, _DF_VECTOR, _GP, _PF = 6, 8, 13, 14
_IDT_GATE = 16

_REPORTED = (*GENERAL, "cr0", "cr2", "cr3", "cr4", "cs", "ss", "fs_base", "gs_base")
_ACCUMULATOR = {1: ux.UC_X86_REG_AL, 2: ux.UC_X86_REG_AX, 4: ux.UC_X86_REG_RAX}  # a 4-byte IN clears the rest
_ACCESS = {uconst.UC_MEM_READ_UNMAPPED: "read", uconst.UC_MEM_WRITE_UNMAPPED: "write",
           uconst.UC_MEM_FETCH_UNMAPPED: "fetch"}


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
        self._fault: Exit | None = None
        self._context: NDArray[Any] = np.zeros(1, CONTEXT)
        self._c: Any = self._context.view(np.recarray)[0]
        self._seen: NDArray[Any] = np.zeros(SEEN_BLOCKS, SEEN)
        self._address = int(self._context.ctypes.data)
        self._decoder = Decoder(self._address)
        #: {address: (hook handle, what the hook points to or what the run loop is to do)}
        self._hooked: dict[int, tuple[int, Any]] = {}
        self._fill_context()
        self._pages = LoggedPages(spec, memory, self._c)
        try:
            self._engine = self._make_engine()
            self._boot()
            self._add_hooks()
        except unicorn.UcError as exc:
            self.close()
            raise AccelError(f"the software CPU cannot be set up: {exc}") from None
        except BaseException:
            self.close()
            raise

    # --- set-up ----------------------------------------------------------------------------------

    @property
    def _trampoline(self) -> int:
        return self._spec.system_slot.gpa + _TRAMPOLINE

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

    def _make_engine(self) -> Any:
        engine = unicorn.Uc(uconst.UC_ARCH_X86, uconst.UC_MODE_64)
        for slot in self._memory.slots.values():
            engine.mem_map_ptr(slot.spec.gpa, slot.spec.size, uconst.UC_PROT_ALL, slot.host_address)
        return engine

    def _boot(self) -> None:
        """Raises AccelError, UcError."""
        load_boot(self._engine, self._spec.boot, self._trampoline)

    def _add_hooks(self) -> None:
        engine = self._engine
        self._native_hook(uconst.UC_HOOK_MEM_WRITE, calls.ON_WRITE, self._address)
        self._native_hook(uconst.UC_HOOK_BLOCK, calls.ON_BLOCK, self._address)
        engine.hook_add(uconst.UC_HOOK_INTR, self._on_exception)
        engine.hook_add(uconst.UC_HOOK_MEM_UNMAPPED, self._on_unmapped)

    def _native_hook(self, kind: int, callback: int, data: int, begin: int = 1, end: int = 0, *, insn: int = 0) -> int:
        """A hook without Python in between (the binding's own take a Python callable)."""
        handle = ctypes.c_size_t()
        status = uclib.uc_hook_add(self._engine._uch, ctypes.byref(handle), kind,
                                   ctypes.c_void_p(callback), ctypes.c_void_p(data),
                                   ctypes.c_uint64(begin), ctypes.c_uint64(end), ctypes.c_int(insn))
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
            # Where the code was forgotten meanwhile, it is met again, as what it is by then.
            if stop & Stop.SPECIAL and int(c.special) in self._hooked:
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
        if self._c.seen_count >= SEEN_BLOCKS // 2:
            self._forget_code()
        calls.remember(self._address, address, size)
        places = self._places(address, size)
        try:
            code = b"".join(self._memory.read(*place) for place in places)
        except KeyError:
            places, code = [], b""      # not fetched from RAM: the fetch itself will say so
        locked, special = self._decode(code, address)
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
            if self._mark_code(address, places):
                self._forget_translations()

    def _places(self, address: int, size: int) -> list[tuple[int, int]]:
        """(GPA, bytes): where that is in memory. This guest has all addresses as they are."""
        return [(address, size)]

    def _decode(self, code: bytes, address: int) -> tuple[dict[int, Any], dict[int, Any]]:
        return self._decoder.decode(code, address)

    def _mark_code(self, address: int, places: list[tuple[int, int]]) -> bool:
        """A block that was looked at is there; whether there was none in one of the pages before."""
        return any([self._pages.mark_code(*place) for place in places])  # noqa: C419 (of each)

    def _forget_translations(self) -> None:
        """Page flags are others: whatever was made of them is void. The gate is held. (The hook on every store reads
        the flags themselves.)"""

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
        self._c.seen_count = 0
        self._pages.forget_code()

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
                             "atomic under the guest's own page tables")
        if name == "syscall" and self._engine.msr_read(msr.EFER) & _EFER_SCE:
            return self._end(ExitReason.INTERNAL_ERROR, "the software CPU does not support syscall")
        return self._exception(_UD if name == "syscall" else _GP)

    def _load_cr3(self, what: Special) -> Exit | None:
        """Unicorn sets accessed and dirty bits in page tables, and calls no hook for that: in the machine's tables
        they are all set, but tables in RAM would change in no log."""
        engine = self._engine
        value = engine.reg_read(what.source)
        if engine.reg_read(ux.UC_X86_REG_CS) & 3:
            return self._exception(_GP)
        if not soft_state.is_boot_cr3(value, self._spec.boot["cr3"]):
            return self._end(ExitReason.INTERNAL_ERROR, "the software CPU cannot log what it writes into the "
                             f"guest's own page tables (CR3 {value:#x})")
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
            return self._end(ExitReason.TRIPLE_FAULT, "an exception without an IDT to handle it")
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
        found = {name: int(self._engine.reg_read(number(name))) for name in _REPORTED}
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
            count = calls.reset(self._address)
            self._forget_translations()
            return count

    def rebuild_ring(self) -> None:
        with self._outside():
            self._pages.restart()
            self._forget_translations()

    def set_tracking(self, spec: WorkerSpec) -> None:
        try:
            ring = Segment.open(spec.ring_segment) if spec.ring_entries else None
        except SegmentError as exc:
            raise AccelError(f"vCPU {spec.index}: dirty tracking cannot be changed: {exc}") from None
        with self._outside():
            self._spec = spec
            self._pages.track(spec, ring)
            self._forget_translations()

    def get_dirty_log(self, slot_id: int) -> int:
        return self._pages.dirty_log(slot_id)

    def clear_dirty_log(self, slot_id: int) -> None:
        with self._outside():
            self._pages.clear(slot_id)
            self._forget_translations()

    def set_memslot(self, slot: SlotSpec) -> None:
        with self._outside():
            if self._pages.knows(slot):
                self._forget_translations()
                return
            host = self._memory.slots[slot.id].host_address
            try:
                self._engine.mem_map_ptr(slot.gpa, slot.size, uconst.UC_PROT_ALL, host)
            except unicorn.UcError as exc:
                raise AccelError(f"slot {slot.id} cannot be added: {exc}") from None
            self._pages.add(slot)

    def remove_memslot(self, slot_id: int) -> None:
        with self._outside():
            self._drop_code()
            slot = self._pages.remove(slot_id)
            self._engine.mem_unmap(slot.gpa, slot.size)

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
            self._c.seen_count = 0
            try:
                self._engine = self._make_engine()
                soft_state.set_system_registers(self._engine, state)
                enter(self._engine, self._trampoline, regs.rip, regs.rsp, regs.rflags, segments.cs.selector,
                      segments.ss.selector,
                      [one.selector for one in (segments.ds, segments.es, segments.fs, segments.gs)])
                soft_state.set_registers(self._engine, state)
                self._add_hooks()
            except unicorn.UcError as exc:
                raise AccelError(f"the software CPU rejected the saved vCPU state: {exc}") from None

    def close(self) -> None:
        """Idempotent."""
        self._engine = None     # the binding closes it with its last reference
        self._c = None
        self._pages.close()
