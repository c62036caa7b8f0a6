"""What an accelerator must offer the run loop (workers/process.py), and how one is chosen by name.

Threads: ``run`` and ``registers`` are called on the vCPU thread (the process's main thread);
``reset_ring`` and ``interrupt`` from the service thread at any time, also while ``run`` is in the
guest; everything else only while the vCPU is out of the guest and parked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ipc.layout import VcpuControl
from ipc.messages import ExitReason, SlotSpec, WorkerSpec

from ..memory import GuestMemory
from ..ports import PortBus, PortEvent
from ..state import VcpuSaved

__all__ = ["AccelError", "Accelerator", "Exit", "ExitKind", "load"]


class AccelError(Exception):
    """The accelerator cannot do what was asked; the text is fit for a user."""


class ExitKind(Enum):
    KICKED = "kicked"          # interrupted: look at the control block
    RING_FULL = "ring-full"    # soft-full: wait for a reset
    PORT = "port"              # a port access asked for something (Exit.event)
    END = "end"                # the guest is over (Exit.reason, detail, registers)


@dataclass(slots=True)
class Exit:
    kind: ExitKind
    event: PortEvent | None = None
    reason: ExitReason = ExitReason.NONE
    detail: str = ""
    registers: dict[str, int] | None = None


class Accelerator(Protocol):
    """Constructor: ``(spec, memory, control, ports)``; raises AccelError with nothing left open."""

    #: The fd whose mapping at page 64 is the ring and at page 0 is kvm_run; -1 for a software ring.
    vcpu_fd: int
    #: Bytes of kvm_run (0 for software).
    kvm_run_size: int

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl,
                 ports: PortBus) -> None: ...

    def clear_immediate_exit(self) -> None:
        """vCPU thread, before it looks at the control block: no kick after this is lost."""

    def run(self) -> Exit:
        """Enter the guest until there is something to do. Returns at once if an immediate exit
        has been requested since ``clear_immediate_exit``."""
        ...

    def interrupt(self) -> None:
        """Set this vCPU's own immediate-exit flag and, if need be, wake it (any thread)."""

    def pushed(self) -> int:
        """Ring entries pushed since the ring was built; 0 without a ring. On the vCPU thread."""
        ...

    def limit_pushes(self, count: int | None) -> None:
        """Leave the guest (KICKED) after so many more entries, where that can be had; None: no limit."""

    def reset_ring(self, expected: int) -> int:
        """Re-protect harvested pages, free their entries; the count. Repeats short calls."""
        ...

    def set_memslot(self, slot: SlotSpec) -> None:
        """Add the slot (memory has it mapped already) or change its logging."""

    def remove_memslot(self, slot_id: int) -> None: ...

    def get_dirty_log(self, slot_id: int) -> int:
        """Bitmap mode: into the slot's log buffer (memory.log_buffer); number of dirty pages."""
        ...

    def clear_dirty_log(self, slot_id: int) -> None: ...

    def set_tracking(self, spec: WorkerSpec) -> None:
        """Log as this specification says, which differs from the present one in ``tracking`` and the ring. On the
        vCPU thread; the log is empty. ``uffd`` and ``none`` are no business of an accelerator: it logs nothing.
        ``vcpu_fd`` may change. Raises AccelError, with everything as it was."""

    def rebuild_ring(self) -> None:
        """A fresh ring, indices at zero, vCPU state kept; ``vcpu_fd`` may change."""

    def hypercall_args(self) -> tuple[int, int, int]:
        """(EAX, RDI, RSI) of the hypercall that ``run`` has just returned."""
        ...

    def set_hypercall_result(self, value: int) -> None:
        """EAX as the guest finds it after the hypercall."""

    def registers(self) -> dict[str, int]:
        """rax…r15, rip, rflags, cr0, cr2, cr3, cr4 and the like, for a report."""
        ...

    def get_state(self) -> VcpuSaved:
        """Complete architectural state, the same for every accelerator (without ``exit``)."""
        ...

    def set_state(self, state: VcpuSaved) -> None:
        """Raises AccelError when this host cannot take it over."""

    def close(self) -> None:
        """Idempotent."""


def load(name: str) -> type[Accelerator]:
    """The accelerator class called ``name``; imported only now, so that a KVM worker pays for
    nothing a software CPU needs. Raises AccelError."""
    if name == "kvm":
        from .kvm.vm import KvmAccelerator

        return KvmAccelerator
    if name == "unicorn":
        try:
            from .unicorn.cpu import UnicornAccelerator
        except ImportError as exc:
            raise AccelError(f"the unicorn accelerator cannot be loaded: {exc}") from None
        return UnicornAccelerator
    if name == "replay":
        from .replay.producer import ReplayAccelerator

        return ReplayAccelerator
    raise AccelError(f"unknown accelerator '{name}'")
