"""The KVM accelerator: a VM of one vCPU over the shared RAM, and its dirty ring.

The kernel publishes the ring; the coordinator harvests it, through a mapping of the vCPU fd that it is sent;
this process alone may reset it, since a VM answers only to the process that made it. Numbers in brackets are
sections of Linux ``Documentation/virt/kvm/api.rst``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Mapping
from typing import Any

from ipc.layout import RING_PAGE_OFFSET, DirtyGfn, Tracking, VcpuControl
from ipc.messages import ExitReason, SlotSpec, WorkerSpec

from ... import msr
from ...faults import describe, read_frame
from ...memory import GuestMemory
from ...ports import PortBus, PortEvent, PortEventKind, UnknownPort
from ...state import VcpuSaved
from ..base import AccelError, Exit, ExitKind
from . import api
from . import state as kvm_state
from .host import DEVICE, RING_CAPABILITIES, probe, ring_size_error
from .tables import PageTables, Region

__all__ = ["KvmAccelerator"]


class KvmAccelerator:
    """See workers/accel/base.py for the contract."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus) -> None:
        self._spec = spec
        self._memory = memory
        self._ports = ports
        #: The slots as KVM has them now, logging included.
        self._slots: dict[int, SlotSpec] = {s.spec.id: s.spec for s in memory.slots.values()}
        self._manual_protect = False
        self._open = contextlib.ExitStack()
        self._tables = self._make_tables()
        try:
            self._make_vm()
            self._load_boot(spec.boot)
        except BaseException:
            self.close()
            raise

    def _make_tables(self) -> PageTables | None:
        """Of this vCPU alone. Raises SegmentError and OSError."""
        return PageTables(self._spec.system_slot, self._spec.boot["cr3"])

    def _make_vm(self) -> None:
        """VM, slots, vCPU; the ring before the vCPU. Replaces what was there, once all of it is made."""
        spec = self._spec
        with contextlib.ExitStack() as stack:
            try:
                self._kvm = _owned(stack, os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
                self._vm = _owned(stack, api.ioctl(self._kvm, api.CREATE_VM))
                self._enable_dirty_log()
                if self._tables is not None:
                    self._tables.forget_writes()
                for slot in self._slots.values():
                    self._put_slot(slot, slot.size)
                self._put_tables()
                self.vcpu_fd = _owned(stack, api.ioctl(self._vm, api.CREATE_VCPU, 0))
                self._set_cpuid()
                self.kvm_run_size = api.ioctl(self._kvm, api.GET_VCPU_MMAP_SIZE)
                mapping = mmap.mmap(self.vcpu_fd, self.kvm_run_size)
            except OSError as exc:
                raise AccelError(f"vCPU {spec.index}: KVM cannot create it: {exc.strerror}{_advice(exc)}") from None
            stack.callback(mapping.close)
            self._use_run(mapping)
            self._ring: Any = None      # mapped by ``pushed``, when it is first wanted
            self._reset_sum = self._pushed = 0
            self._open.close()
            self._open = stack.pop_all()

    def _use_run(self, mapping: mmap.mmap) -> None:
        """The vCPU has this kvm_run from now on."""
        self._run = api.Run.from_buffer(mapping)

    def _enable_dirty_log(self) -> None:
        entries = self._spec.ring_entries
        if not entries:
            # Protection by hand, not by GET: only then can a page be re-protected after it was recorded.
            # Not KVM_DIRTY_LOG_INITIALLY_SET: a page that was never written would count as dirty.
            cap = api.EnableCap(cap=api.CAP_MANUAL_DIRTY_LOG_PROTECT2)
            cap.args[0] = api.DIRTY_LOG_MANUAL_PROTECT_ENABLE
            with contextlib.suppress(OSError):
                api.ioctl(self._vm, api.ENABLE_CAP, cap)
                self._manual_protect = True
            return
        info = probe()
        wrong = ring_size_error(entries, info)
        if info.ring_capability is None or wrong:
            raise AccelError(f"dirty ring: {wrong or 'this kernel has none'}")
        cap = api.EnableCap(cap=RING_CAPABILITIES[info.ring_capability])
        cap.args[0] = entries * ctypes.sizeof(DirtyGfn)
        api.ioctl(self._vm, api.ENABLE_CAP, cap)

    def _set_cpuid(self) -> None:
        cpuid = api.Cpuid(nent=256)
        api.ioctl(self._kvm, api.GET_SUPPORTED_CPUID, cpuid)
        api.ioctl(self.vcpu_fd, api.SET_CPUID2, cpuid)

    def _load_boot(self, boot: Mapping[str, int]) -> None:
        sregs = api.Sregs()
        try:
            api.ioctl(self.vcpu_fd, api.GET_SREGS, sregs)
            flat = {"limit": 0xFFFF_FFFF, "present": 1, "dpl": boot["cpl"], "s": 1, "g": 1}
            sregs.cs = api.Segment(selector=boot["cs"], type=0xB, l=1, **flat)      # code, read, accessed
            for name in ("ds", "es", "fs", "gs", "ss"):
                selector = boot["ss"] if name == "ss" else boot["ds"]
                setattr(sregs, name, api.Segment(selector=selector, type=3, db=1, **flat))  # data, accessed
            sregs.tr = api.Segment(base=boot["tss_base"], limit=boot["tss_limit"], type=0xB, present=1,
                                   selector=boot["tr_selector"])                    # busy 64-bit TSS
            sregs.gdt = api.Dtable(boot["gdt_base"], boot["gdt_limit"])
            sregs.idt = api.Dtable(boot["idt_base"], boot["idt_limit"])
            for name in ("cr0", "cr3", "cr4", "efer"):
                setattr(sregs, name, boot[name])
            api.ioctl(self.vcpu_fd, api.SET_SREGS, sregs)
            names = {name for name, *_ in api.Regs._fields_}
            api.ioctl(self.vcpu_fd, api.SET_REGS, api.Regs(**{k: v for k, v in boot.items() if k in names}))
            kvm_state.set_msr(self.vcpu_fd, msr.LSTAR, boot["lstar"])
        except OSError as exc:
            raise AccelError(f"vCPU {self._spec.index}: KVM rejected the boot registers: {exc.strerror}") from None

    # --- the guest ------------------------------------------------------------------------------------------

    def clear_immediate_exit(self) -> None:
        self._run.immediate_exit = 0

    def interrupt(self) -> None:
        self._run.immediate_exit = 1

    def run(self) -> Exit:
        run = self._run
        while True:
            error = api.run(self.vcpu_fd)
            if error == errno.EINTR:
                return Exit(ExitKind.KICKED)
            if error:
                return self._end(ExitReason.INTERNAL_ERROR, f"KVM_RUN: {os.strerror(error)}")
            reason = run.exit_reason
            if reason == api.EXIT_DIRTY_RING_FULL:
                return Exit(ExitKind.RING_FULL)
            if reason != api.EXIT_IO:
                return self._ended(reason)
            try:
                event = self._port(run.io)
            except UnknownPort as exc:
                return self._end(ExitReason.UNKNOWN_PORT, str(exc))
            if event is None:
                continue
            if event.kind is PortEventKind.FAULT:
                return self._exception(event.value)
            return Exit(ExitKind.PORT, event=event)

    def _port(self, io: api.RunIo) -> PortEvent | None:
        """``count`` accesses of ``size`` bytes each; the data lies in kvm_run. Raises UnknownPort."""
        data = ctypes.addressof(self._run) + io.data_offset
        event = None
        for at in range(data, data + io.count * io.size, io.size):
            if io.direction == api.EXIT_IO_OUT:
                value = int.from_bytes(ctypes.string_at(at, io.size), "little")
                event = self._ports.write(io.port, io.size, value) or event
            else:
                value = self._ports.read(io.port, io.size)
                ctypes.memmove(at, value.to_bytes(io.size, "little"), io.size)
        return event

    def hypercall_args(self) -> tuple[int, int, int]:
        regs = self._regs()
        return regs.rax & 0xFFFF_FFFF, regs.rdi, regs.rsi

    def set_hypercall_result(self, value: int) -> None:
        """Completes the port write first: until KVM is entered again, RIP may still be that of the OUT.

        The run loop clears the flag and looks at its control block before it enters the guest again, so a
        kick that comes in between is not lost."""
        self._run.immediate_exit = 1
        api.run(self.vcpu_fd)
        regs = self._regs()
        regs.rax = value
        api.ioctl(self.vcpu_fd, api.SET_REGS, regs)

    # --- how a guest ends -------------------------------------------------------------------------------------

    def _ended(self, reason: int) -> Exit:
        run = self._run
        if reason == api.EXIT_HLT:
            return self._end(ExitReason.HALT, "")
        if reason == api.EXIT_SHUTDOWN:
            # On AMD the processor has reset itself by now: the registers are then those after a reset.
            return self._end(ExitReason.TRIPLE_FAULT, "")
        if reason == api.EXIT_MMIO:
            kind = "write" if run.mmio.is_write else "read"
            return self._end(ExitReason.BAD_ADDRESS,
                             f"{kind} of {run.mmio.len} bytes at {run.mmio.phys_addr:#x}, outside RAM")
        if reason == api.EXIT_INTERNAL_ERROR:
            return self._internal_error(run.internal)
        if reason == api.EXIT_FAIL_ENTRY:
            detail = f"entry failed, hardware reason {run.fail_entry.hardware_entry_failure_reason:#x}"
        elif reason == api.EXIT_SYSTEM_EVENT:
            detail = f"system event {run.system_event.type}"
        else:
            detail = f"unexpected KVM exit {reason}"
        return self._end(ExitReason.INTERNAL_ERROR, detail)

    def _internal_error(self, error: api.RunInternal) -> Exit:
        rip = self._regs().rip
        try:
            self._memory.host_address(rip)
        except KeyError:    # nothing to emulate where there is no RAM
            return self._end(ExitReason.BAD_ADDRESS, f"fetch at {rip:#x}, outside RAM")
        name = api.INTERNAL_ERRORS.get(error.suberror, f"suberror {error.suberror}")
        data = " ".join(f"{word:#x}" for word in error.data[:min(error.ndata, 16)])
        return self._end(ExitReason.INTERNAL_ERROR, f"KVM internal error: {name}" + (f" ({data})" if data else ""))

    def _exception(self, code: int) -> Exit:
        """The stub of an exception has written to its port: its frame tells where the guest was."""
        registers = self.registers()
        try:
            frame = read_frame(self._memory, registers["rsp"])
        except KeyError:
            return self._end(ExitReason.UNKNOWN_PORT, f"write to the machine's own fault port ({code:#x})")
        reason, detail = describe(frame["vector"], frame["error"], registers["cr2"])
        registers |= {name: frame[name] for name in ("rip", "cs", "rflags", "rsp", "ss")}
        return Exit(ExitKind.END, reason=reason, detail=detail, registers=registers)

    def _end(self, reason: ExitReason, detail: str) -> Exit:
        return Exit(ExitKind.END, reason=reason, detail=detail, registers=self.registers())

    def _regs(self) -> api.Regs:
        regs = api.Regs()
        api.ioctl(self.vcpu_fd, api.GET_REGS, regs)
        return regs

    def registers(self) -> dict[str, int]:
        regs, sregs = self._regs(), api.Sregs()
        api.ioctl(self.vcpu_fd, api.GET_SREGS, sregs)
        return {**{name: getattr(regs, name) for name, *_ in regs._fields_},
                **{name: getattr(sregs, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer")},
                "cs": sregs.cs.selector, "ss": sregs.ss.selector,
                "fs_base": sregs.fs.base, "gs_base": sregs.gs.base}

    # --- ring, dirty log, slots: by the service thread --------------------------------------------------------

    def pushed(self) -> int:
        """The kernel does not say; but what is not free in the ring has been pushed, and so has what was reset.
        A reset that runs meanwhile may hide some until the next call, never invent any."""
        entries = self._spec.ring_entries
        if not entries:
            return 0
        if self._ring is None:
            mapping = mmap.mmap(self.vcpu_fd, entries * ctypes.sizeof(DirtyGfn),
                                offset=RING_PAGE_OFFSET * mmap.PAGESIZE)
            self._ring = (DirtyGfn * entries).from_buffer(mapping)
        first = self._reset_sum
        low, high = 0, entries      # entries in use lie in one piece from the first not reset
        while low < high:
            middle = (low + high) // 2
            if self._ring[(first + middle) % entries].flags:
                low = middle + 1
            else:
                high = middle
        self._pushed = max(self._pushed, first + low)
        return self._pushed

    def limit_pushes(self, count: int | None) -> None:
        """Cannot be had: KVM leaves at soft-full alone."""

    def reset_ring(self, expected: int) -> int:
        """Since Linux 6.17 the ioctl may stop short when a signal is pending: again, until it is done."""
        total = 0
        while total < expected:
            try:
                count = api.ioctl(self._vm, api.RESET_DIRTY_RINGS)
            except InterruptedError:
                continue
            if not count:
                break
            total += count
        self._reset_sum += total
        return total

    def rebuild_ring(self) -> None:
        """A ring cannot be emptied by hand: the vCPU moves to a VM of its own anew."""
        state = self.get_state()
        self._make_vm()
        self.set_state(state)

    def set_tracking(self, spec: WorkerSpec) -> None:
        """A VM has a ring from its beginning or never: with another ring, the vCPU moves to another VM. Otherwise
        only the slots' flags change."""
        before, self._spec = self._spec, spec
        try:
            if spec.ring_entries != before.ring_entries:
                self.rebuild_ring()
            else:
                for slot in self._slots.values():
                    self._put_slot(slot, slot.size)
        except (OSError, AccelError) as exc:
            self._spec = before
            raise AccelError(f"vCPU {spec.index}: dirty tracking cannot be changed: {exc}") from None

    def _put_slot(self, slot: SlotSpec, size: int) -> None:
        """[4.35]; size 0 removes it. Raises OSError."""
        address = self._memory.slots[slot.id].host_address
        if self._tables is not None and slot.id == self._spec.system_slot.id:
            # Where its page tables begin, this vCPU has its own.
            self._put(Region(slot.id, slot.gpa, self._spec.boot["cr3"] - slot.gpa, address))
            return
        if size and self._tables is not None and self._tables.cover(slot):
            self._put_tables()
        self._put(Region(slot.id, slot.gpa, size, address),
                  logged=slot.log and self._spec.mode in (Tracking.RING, Tracking.BITMAP))

    def _put_tables(self) -> None:
        for region in self._tables.regions if self._tables is not None else ():
            self._put(region)

    def _put(self, region: Region, *, logged: bool = False) -> None:
        api.ioctl(self._vm, api.SET_USER_MEMORY_REGION, api.UserspaceMemoryRegion(
            slot=region.slot_id, flags=api.MEM_LOG_DIRTY_PAGES if logged else 0, guest_phys_addr=region.gpa,
            memory_size=region.size, userspace_addr=region.host_address))

    def set_memslot(self, slot: SlotSpec) -> None:
        try:
            self._put_slot(slot, slot.size)
        except OSError as exc:
            raise AccelError(f"slot {slot.id}: {exc.strerror}") from None
        self._slots[slot.id] = slot

    def remove_memslot(self, slot_id: int) -> None:
        self._put_slot(self._slots.pop(slot_id), 0)
        if self._tables is not None:
            self._tables.forget_writes()

    def get_dirty_log(self, slot_id: int) -> int:
        slot = self._memory.slots[slot_id]
        api.ioctl(self._vm, api.GET_DIRTY_LOG, api.DirtyLog(slot=slot_id, dirty_bitmap=slot.log_address))
        words = -(-slot.spec.size // mmap.PAGESIZE // 64)
        return int.from_bytes(ctypes.string_at(slot.log_address, words * 8), "little").bit_count()

    def clear_dirty_log(self, slot_id: int) -> None:
        """The whole slot at once: only a range that ends with the slot may end off a multiple of 64 pages
        [4.117]."""
        if not self._manual_protect:
            return      # KVM_GET_DIRTY_LOG has re-protected the pages already
        slot = self._memory.slots[slot_id]
        api.ioctl(self._vm, api.CLEAR_DIRTY_LOG,
                  api.ClearDirtyLog(slot=slot_id, num_pages=slot.spec.size // mmap.PAGESIZE, first_page=0,
                                    dirty_bitmap=slot.log_address))

    # --- state ------------------------------------------------------------------------------------------------

    def get_state(self) -> VcpuSaved:
        return kvm_state.get_state(self._kvm, self.vcpu_fd)

    def set_state(self, state: VcpuSaved) -> None:
        kvm_state.set_state(self.vcpu_fd, state)

    def close(self) -> None:
        """Idempotent."""
        self._run = api.Run()   # a mapping can only be closed without a view of it
        self._ring = None
        self._open.close()
        if self._tables is not None:
            self._tables.close()


def _owned(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _advice(error: OSError) -> str:
    if error.errno == errno.ENOMEM:
        return " (the host is low on memory)"
    if error.errno in (errno.EACCES, errno.ENOENT):
        return " (vmm doctor says what is missing)"
    return ""
