"""The accelerator itself: RBX is the address of the first page, RCX how many there are. Each is written once, and
logged unless it has an entry that was not reset yet."""

from __future__ import annotations

import ctypes

from ipc.layout import DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET, RING_RESERVE, DirtyGfn, VcpuControl
from ipc.messages import ExitReason, SlotSpec, WorkerSpec
from ipc.shm import PAGE_SIZE, Segment
from workers.accel.base import AccelError, Exit, ExitKind
from workers.memory import GuestMemory
from workers.ports import PortBus
from workers.state import VcpuSaved

_NO_LIMIT = 1 << 63


class Stepper:
    vcpu_fd = -1
    kvm_run_size = 0

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus) -> None:
        self._spec, self._memory, self._control = spec, memory, control
        self._at, self._left = spec.boot["rbx"], spec.boot["rcx"]
        self._unprotected: set[tuple[int, int]] = set()
        self._pushed = self._reset = 0
        self._limit = _NO_LIMIT
        self._segment = Segment.open(spec.ring_segment)
        self._ring = (DirtyGfn * spec.ring_entries).from_address(self._segment.address)

    def clear_immediate_exit(self) -> None:
        self._control.immediate_exit = 0

    def interrupt(self) -> None:
        self._control.immediate_exit = 1

    def run(self) -> Exit:
        while self._left:
            if self._control.immediate_exit or self._pushed >= self._limit:
                return Exit(ExitKind.KICKED)
            if self._pushed - self._reset >= self._spec.ring_entries - RING_RESERVE:
                return Exit(ExitKind.RING_FULL)
            self._write(self._at)
            self._at += PAGE_SIZE
            self._left -= 1
        return Exit(ExitKind.END, reason=ExitReason.CODE, registers=self.registers())

    def _write(self, gpa: int) -> None:
        slot = next(s for s in self._memory.slots.values() if s.spec.gpa <= gpa < s.spec.gpa + s.spec.size)
        page = (slot.spec.id, (gpa - slot.spec.gpa) // PAGE_SIZE)
        if slot.spec.log and page not in self._unprotected:
            self._unprotected.add(page)
            entry = self._ring[self._pushed % self._spec.ring_entries]
            entry.slot, entry.offset = page
            entry.flags = DIRTY_GFN_F_DIRTY     # the last: it publishes the entry (x86 keeps stores in their order)
            self._pushed += 1
        byte = ctypes.c_uint8.from_address(slot.host_address + gpa - slot.spec.gpa)
        byte.value = (byte.value + 1) & 0xFF

    def pushed(self) -> int:
        return self._pushed

    def limit_pushes(self, count: int | None) -> None:
        self._limit = _NO_LIMIT if count is None else self._pushed + count

    def reset_ring(self, expected: int) -> int:
        done = 0
        while self._ring[self._reset % self._spec.ring_entries].flags & DIRTY_GFN_F_RESET:
            entry = self._ring[self._reset % self._spec.ring_entries]
            self._unprotected.discard((entry.slot, entry.offset))
            entry.flags = 0
            self._reset += 1
            done += 1
        return done

    def set_memslot(self, slot: SlotSpec) -> None:
        """It looks the slots up as it writes."""

    def remove_memslot(self, slot_id: int) -> None:
        self._unprotected = {page for page in self._unprotected if page[0] != slot_id}

    def get_dirty_log(self, slot_id: int) -> int:
        raise AccelError("it has rings alone")

    def clear_dirty_log(self, slot_id: int) -> None:
        raise AccelError("it has rings alone")

    def set_tracking(self, spec: WorkerSpec) -> None:
        raise AccelError("it has rings alone")

    def rebuild_ring(self) -> None:
        ctypes.memset(self._segment.address, 0, self._segment.size)
        self._pushed = self._reset = 0
        self._unprotected.clear()

    def hypercall_args(self) -> tuple[int, int, int]:
        raise AccelError("it makes no hypercall")

    def set_hypercall_result(self, value: int) -> None:
        raise AccelError("it makes no hypercall")

    def registers(self) -> dict[str, int]:
        return {"rbx": self._at, "rcx": self._left}

    def get_state(self) -> VcpuSaved:
        raise AccelError("it has no state but two registers")

    def set_state(self, state: VcpuSaved) -> None:
        raise AccelError("it has no state but two registers")

    def close(self) -> None:
        self._segment.close()
