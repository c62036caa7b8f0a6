"""A KVM vCPU that runs a thread of a Linux program: system calls and exceptions leave it here, and are served by
whoever is its ``server``, while `run` goes on.

``syscall`` enters a stub (LSTAR) that writes to a port, an exception one that leaves its frame and writes to another
(vmm/machine/boot.py). Where KVM has page tables alone, that of ``syscall`` is a gate (ipc/gates.py), which may ask the
system without an exit, and a vCPU that is stopped may stand in it. Registers come with the exit and go with the entry,
in kvm_run (KVM_CAP_SYNC_REGS), which costs no ioctl. On processors with virtualisation both stubs run at CPL 0; on a
KVM that has page tables alone (nested) ``syscall`` does not change the level, so its stub must be the program's to
execute. Which of the two it is, the segment at the exit says.

Its page tables are those of the program's system (workers/linux/tables.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ipc.gates import DESK_REGISTERS, FUTEX, Stop, stopped_at
from ipc.layout import SYSTEM_SLOT, VcpuControl
from ipc.linux.libc import LIBC, check
from ipc.messages import ExitReason, WorkerSpec
from ipc.programs import (
    EVERYTHING,
    PORT_CALL,
    REGISTERS,
    SYSCALL_SIZE,
    SYSTEM_ADDRESS,
    VSYSCALL_ADDRESS,
    Kind,
    gate_page,
)

from ... import msr
from ...faults import FRAME_NAMES, PAGE_FAULT
from ...memory import GuestMemory
from ...ports import PORT_FAULT, PortBus
from ...state import VcpuSaved
from ..base import AccelError, Exit, ExitKind, ProgramServer
from . import api
from . import state as kvm_state
from .host import DEVICE
from .tables import Region
from .vm import KvmAccelerator

__all__ = ["KvmProgram"]

_RAX, _RIP, _RFLAGS, _RSP, _RCX, _R11 = map(REGISTERS.index, ("rax", "rip", "rflags", "rsp", "rcx", "r11"))
_FRAME = struct.Struct(f"<{len(FRAME_NAMES)}Q")

#: Flags that a program may have: all that popf can set at CPL 3, and ID.
_FLAGS = 0x24_0DD5
_FLAGS_ALWAYS = 0x202

_CR4_OPTIONAL = 1 << 18 | 1 << 16       # OSXSAVE, FSGSBASE: where the processor has them
_XSAVE_LEAF = 0xD                       # CPUID: EDX:EAX of its first subleaf is what XCR0 can have
_XCR0_MAX = 0xE7                        # x87, SSE, AVX, AVX-512

#: There is a KVM module that does without hardware virtualisation.
_PAGE_TABLES_ALONE = Path("/sys/module/kvm_pvm")

_UNUSED_SLOT = SYSTEM_SLOT + 1
_DONTNEED = 4           # MADV_DONTNEED

_SEGMENT = ctypes.sizeof(api.Segment)
_CS, _FS, _SS = api.Sregs.cs.offset, api.Sregs.fs.offset, api.Sregs.ss.offset
_DPL = api.Segment.dpl.offset
_CR2, _CR3 = api.Sregs.cr2.offset // 8, api.Sregs.cr3.offset // 8


class KvmProgram(KvmAccelerator):
    """``server``: before ``run``. What it may use has no underscore; a change holds from the next entry on."""

    server: ProgramServer
    sees_holes = True

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus) -> None:
        self._views: list[memoryview] = []
        self._vm_lock = threading.Lock()        # it stays what it is
        super().__init__(spec, memory, control, ports)
        self._system = memory.slots[spec.system_slot.id].segment.buf
        page = gate_page(spec.threads, spec.index)
        self._gate = SYSTEM_ADDRESS + page * mmap.PAGESIZE
        desk = (page + 1) * mmap.PAGESIZE + DESK_REGISTERS
        self._desk = memoryview(self._system)[desk:desk + 8 * len(REGISTERS)].cast("Q")
        self._enter_gate()

    def _make_tables(self) -> None:
        """The system has them."""
        return None

    def _make_vm(self) -> None:
        with self._vm_lock:
            super()._make_vm()

    def _use_run(self, mapping: mmap.mmap) -> None:
        super()._use_run(mapping)
        self._release_views()
        # Not through ctypes: this is the way of every system call.
        start = api.Run.regs.offset
        whole = memoryview(mapping)
        self._views = [
            whole,
            registers := whole[start:start + ctypes.sizeof(api.Regs)].cast("Q"),
            sregs := whole[api.Run.sregs.offset:api.Run.sregs.offset + ctypes.sizeof(api.Sregs)],
            control := sregs.cast("Q"),
            sync := whole[api.Run.valid_regs.offset:start].cast("Q"),
            reason := whole[api.Run.exit_reason.offset:api.Run.exit_reason.offset + 4].cast("I"),
            port := whole[api.Run.exit.offset:api.Run.exit.offset + 8].cast("H"),
        ]
        #: 18 words, as ipc.programs.REGISTERS has them: those of the program, as it goes on.
        self.registers_now = registers
        self._sregs, self._control_registers, self._sync, self._reason, self._port_words = (
            sregs, control, sync, reason, port)
        self._sync[0] = api.SYNC_REGS | api.SYNC_SREGS

    def _load_boot(self, boot: Mapping[str, int]) -> None:
        if api.ioctl(self._kvm, api.CHECK_EXTENSION, api.CAP_SYNC_REGS) & 3 != 3:
            raise AccelError("this kernel's KVM cannot run programs: it has no KVM_CAP_SYNC_REGS for registers and "
                             "segments")
        self._set_xcr0()
        self._set_tsc()
        try:
            super()._load_boot(boot)
        except AccelError:
            super()._load_boot({**boot, "cr4": boot["cr4"] & ~_CR4_OPTIONAL})
        for number, name in ((msr.STAR, "star"), (msr.SYSCALL_MASK, "fmask")):
            kvm_state.set_msr(self.vcpu_fd, number, boot[name])
        sregs = api.Sregs()
        api.ioctl(self.vcpu_fd, api.GET_SREGS, sregs)
        self._sregs[:] = bytes(sregs)
        self._user_code, self._user_stack = bytes(sregs.cs), bytes(sregs.ss)

    @property
    def has_gate(self) -> bool:
        return _PAGE_TABLES_ALONE.exists()

    def _enter_gate(self) -> None:
        """LSTAR is the gate; in what is saved it is the stub, which is at the same place in every machine."""
        if self.has_gate:
            kvm_state.set_msr(self.vcpu_fd, msr.LSTAR, self._gate)

    @staticmethod
    def sees_host_tsc() -> bool:
        """A KVM on page tables alone leaves RDTSC to the processor; others have an offset that can be set."""
        if _PAGE_TABLES_ALONE.exists():
            return True
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, kvm := os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
                stack.callback(os.close, vm := api.ioctl(kvm, api.CREATE_VM))
                stack.callback(os.close, vcpu := api.ioctl(vm, api.CREATE_VCPU, 0))
                api.ioctl(vcpu, api.HAS_DEVICE_ATTR, api.DeviceAttr(group=api.VCPU_TSC_CTRL, attr=api.VCPU_TSC_OFFSET))
        except OSError:
            return False
        return True

    def _set_tsc(self) -> None:
        """The host's, so that all vCPUs, and the system's clocks, agree."""
        offset = ctypes.c_uint64(0)
        with contextlib.suppress(OSError):
            api.ioctl(self.vcpu_fd, api.SET_DEVICE_ATTR, api.DeviceAttr(
                group=api.VCPU_TSC_CTRL, attr=api.VCPU_TSC_OFFSET, addr=ctypes.addressof(offset)))

    def _set_xcr0(self) -> None:
        """As much as there is, so that a program finds the vector registers that CPUID promises. Where KVM says
        nothing of XSAVE it is the host's, whatever is set."""
        cpuid = api.Cpuid(nent=256)
        api.ioctl(self._kvm, api.GET_SUPPORTED_CPUID, cpuid)
        for entry in cpuid.entries[:cpuid.nent]:
            if entry.function == _XSAVE_LEAF and entry.index == 0 and entry.eax:
                xcrs = api.Xcrs(nr_xcrs=1)
                xcrs.xcrs[0].value = entry.eax & _XCR0_MAX
                api.ioctl(self.vcpu_fd, api.SET_XCRS, xcrs)

    # --- the program ------------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        reason, port = self._reason, self._port_words
        fd, server = self.vcpu_fd, self.server
        left = server.begin()
        while left is None:
            if api.run(fd):
                left = self._interrupted()
            elif reason[0] != api.EXIT_IO:
                return self._left(reason[0])
            elif port[1] == PORT_CALL:
                self._take_call()
                left = server.call()
            elif port[1] == PORT_FAULT:
                fault = self._fault()
                left = server.fault(*fault) if self._is_out_of_gate() else server.call()
            else:
                return self._end(ExitReason.UNKNOWN_PORT, f"port {port[1]:#x}")
        return left

    def _interrupted(self) -> Exit | None:
        if stopped_at(self.registers_now[_RIP] - self._gate) is Stop.WAKING and self._is_delivering():
            return Exit(ExitKind.KICKED)        # it goes on, and is that of the gate
        if self._is_out_of_gate():
            return self.server.interrupted()
        self.server.put(Kind.CALL)
        return Exit(ExitKind.KICKED)

    def _take_call(self) -> None:
        """The program goes on behind its ``syscall``."""
        registers = self.registers_now
        registers[_RIP] = registers[_RCX]
        registers[_RFLAGS] = registers[_R11] & _FLAGS | _FLAGS_ALWAYS
        self._sync[1] |= api.SYNC_REGS
        if self._sregs[_CS + _DPL] != 3:
            self._back_to_user()

    def _is_out_of_gate(self) -> bool:
        """The registers are the program's, wherever it has been stopped; False: they are as behind the gate's write to
        the port, and its call is to be served."""
        registers, desk = self.registers_now, self._desk
        stop = stopped_at(registers[_RIP] - self._gate)
        if stop is None:
            return True
        if stop is Stop.BACK:
            for each in (_RAX, _RCX, _RSP, _R11, _RIP):
                registers[each] = desk[each]
            registers[_RFLAGS] = desk[_RFLAGS] & _FLAGS | _FLAGS_ALWAYS
            self._sync[1] |= api.SYNC_REGS
            return True
        if stop is not Stop.ENTERED:
            registers[_RCX], registers[_R11] = desk[_RCX], desk[_R11]
        if stop is Stop.WAKING:
            registers[_RAX] = FUTEX
        self._take_call()
        return False

    def _left(self, reason: int) -> Exit:
        return Exit(ExitKind.RING_FULL) if reason == api.EXIT_DIRTY_RING_FULL else self._ended(reason)

    def _fault(self) -> tuple[int, int, int]:
        """(vector, error code, address); the program goes on where the exception was."""
        registers = self.registers_now
        vector, error, rip, _, flags, rsp, _ = _FRAME.unpack_from(self._system, registers[_RSP] - SYSTEM_ADDRESS)
        address = self._control_registers[_CR2] if vector == PAGE_FAULT else rip
        registers[_RIP], registers[_RSP] = rip, rsp
        registers[_RFLAGS] = flags & _FLAGS | _FLAGS_ALWAYS
        self._back_to_user()
        self._sync[1] |= api.SYNC_REGS
        return vector, error, address

    def _back_to_user(self) -> None:
        self._sregs[_CS:_CS + _SEGMENT] = self._user_code
        self._sregs[_SS:_SS + _SEGMENT] = self._user_stack
        self._sync[1] |= api.SYNC_SREGS

    # --- what its server changes ------------------------------------------------------------------------------------

    def set_registers(self, words: memoryview) -> None:
        """All of them, 18 words."""
        self.registers_now[:] = words
        self._back_to_user()
        self._sync[1] |= api.SYNC_REGS

    def set_fs_base(self, address: int) -> None:
        self._sregs[_FS:_FS + 8] = address.to_bytes(8, "little")
        self._sync[1] |= api.SYNC_SREGS

    @property
    def fs_base(self) -> int:
        return self._control_registers[_FS // 8]

    def set_root(self, address: int) -> None:
        self._control_registers[_CR3] = address
        self._sync[1] |= api.SYNC_SREGS

    def forget_frames(self, runs: list[tuple[int, int]]) -> None:
        """This process' mapping of them goes, and with it the translations of its VM."""
        slots = [each for each in self._memory.slots.values() if each.spec.id != self._spec.system_slot.id]
        if EVERYTHING in runs:
            for slot in slots:
                _unneeded(slot.host_address, slot.spec.size)
            self._forget_tables()
            return
        for first, count in runs:
            gpa = first * mmap.PAGESIZE
            for slot in slots:
                if slot.spec.gpa <= gpa < slot.spec.gpa + slot.spec.size:
                    _unneeded(slot.host_address + gpa - slot.spec.gpa, count * mmap.PAGESIZE)

    def _forget_tables(self) -> None:
        """When any slot is removed KVM gives up all that it keeps of page tables (KVM_X86_QUIRK_SLOT_ZAP_ALL): so one
        comes and goes that nobody uses."""
        slots = self._slots.values()
        unused = Region(_UNUSED_SLOT, max(each.gpa + each.size for each in slots), mmap.PAGESIZE,
                        self._memory.slots[self._spec.system_slot.id].host_address)
        with self._vm_lock:
            self._put(unused)
            self._put(unused._replace(size=0))

    def get_xsave(self, area: memoryview) -> None:
        """Into 4096 bytes. Raises OSError."""
        xsave = api.Xsave()
        api.ioctl(self.vcpu_fd, api.GET_XSAVE, xsave)
        area[:] = bytes(xsave)

    def set_xsave(self, area: memoryview) -> None:
        """Raises OSError for one that is not valid."""
        api.ioctl(self.vcpu_fd, api.SET_XSAVE, api.Xsave.from_buffer_copy(area))

    # ------------------------------------------------------------------------------------------------------------------

    def registers(self) -> dict[str, int]:
        self._apply()
        return super().registers()

    def get_state(self) -> VcpuSaved:
        """As the program has it: not in the middle of a stub."""
        self._leave_stub()
        self._apply()
        state = super().get_state()
        state = msgspec.structs.replace(state, msrs={**state.msrs, str(msr.LSTAR): self._spec.boot["lstar"]})
        if self.server.repeats_call:
            regs = msgspec.structs.replace(state.regs, rip=state.regs.rip - SYSCALL_SIZE)
            return msgspec.structs.replace(state, regs=regs)
        return state

    def _leave_stub(self) -> None:
        """A kick may come just behind a call or an exception, or while one is being delivered: go on to where it is
        asked for. Raises AccelError."""
        while self._is_delivering() or self._is_in_stub():
            self.clear_immediate_exit()
            if api.run(self.vcpu_fd):
                continue
            if self._reason[0] == api.EXIT_IO and self._port_words[1] == PORT_CALL:
                self._take_call()
                self.server.put(Kind.CALL)
            elif self._reason[0] == api.EXIT_IO and self._port_words[1] == PORT_FAULT:
                fault = self._fault()
                if self._is_out_of_gate():
                    self.server.put(Kind.FAULT, fault)
                else:
                    self.server.put(Kind.CALL)
            else:
                raise AccelError(f"a vCPU cannot be saved at {self.registers_now[_RIP]:#x}")
        if not self._is_out_of_gate():
            self.server.put(Kind.CALL)

    def _is_in_stub(self) -> bool:
        """Of those that lead to a port in any case."""
        rip = self.registers_now[_RIP]
        return SYSTEM_ADDRESS <= rip < VSYSCALL_ADDRESS and stopped_at(rip - self._gate) is None

    def _is_delivering(self) -> bool:
        """An exception."""
        events = api.VcpuEvents()
        api.ioctl(self.vcpu_fd, api.GET_VCPU_EVENTS, events)
        return bool(events.exception_injected or events.exception_pending)

    def set_state(self, state: VcpuSaved) -> None:
        super().set_state(state)
        self._enter_gate()
        self._set_tsc()         # what programs see of it is this host's
        regs, sregs = self._regs(), api.Sregs()
        api.ioctl(self.vcpu_fd, api.GET_SREGS, sregs)
        self.registers_now[:] = memoryview(bytes(regs)).cast("Q")
        self._sregs[:] = bytes(sregs)
        self._sync[1] = 0

    def _apply(self) -> None:
        """What is to go with the next entry is the vCPU's now. It goes again, for what is changed until then."""
        if self._sync[1] & api.SYNC_SREGS:
            api.ioctl(self.vcpu_fd, api.SET_SREGS, api.Sregs.from_buffer_copy(self._sregs))
        if self._sync[1] & api.SYNC_REGS:
            api.ioctl(self.vcpu_fd, api.SET_REGS, api.Regs.from_buffer_copy(self.registers_now))

    def _release_views(self) -> None:
        for view in reversed(self._views):
            view.release()
        self._views.clear()

    def close(self) -> None:
        self._release_views()
        self._desk.release()
        super().close()


def _unneeded(address: int, size: int) -> None:
    check(LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _DONTNEED))
