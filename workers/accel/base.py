"""What an accelerator must offer: its package (``Backend``), and to the run loop (``Accelerator``).

Threads: ``run`` and ``registers`` are called on the vCPU thread (the process's main thread);
``reset_ring`` and ``interrupt`` from the service thread at any time, also while ``run`` is in the
guest; everything else only while the vCPU is out of the guest and parked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from ipc.layout import RING_MAX, ExitReason

if TYPE_CHECKING:
    from ipc.layout import VcpuControl
    from ipc.messages import SlotSpec, WorkerSpec
    from ipc.programs import Kind

    from ..memory import GuestMemory
    from ..ports import PortBus, PortEvent
    from ..state import Saved

__all__ = ["AccelError", "Accelerator", "Available", "Backend", "Capabilities", "Exit", "ExitKind",
           "ProgramAccelerator", "ProgramServer"]


class AccelError(Exception):
    """The accelerator cannot do what was asked; the text is fit for a user."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an accelerator can do, as data. Whoever wants to know asks this, and nobody asks for a name."""

    section: str                    # what it takes of a configuration: "guest", or "replay": it has no CPU and
                                    # no memory, and drives rings alone
    kernel_ring: bool               # the kernel makes its ring, mapped from the vCPU fd; else it is a segment
    interruptible_fault: bool       # a vCPU that waits for a page (post-copy) can be kicked
    trackings: tuple[str, ...]      # modes of dirty tracking, of vmm.machine.trackings.MODES
    preference: int                 # ``accel: auto`` takes the highest of those that can be used here
    space: int                      # address space of a worker beside the guest's memory, MiB; less than is seen: how
                                    # many arenas malloc makes (64 MiB each) differs from run to run
    base_memory: int                # private memory of keeper, coordinator and what forks the workers, MiB
    worker_memory: int              # and of each worker
    programs: str = ""              # why it cannot run Linux programs; empty: it can

    @property
    def guests(self) -> bool:
        """It has memory and CPUs, and runs guests."""
        return self.section == "guest"


@dataclass(frozen=True, slots=True)
class Available:
    """What an accelerator finds on this host."""

    reason: str = ""                # why it cannot be used here, for a user; empty when it can
    advice: str = ""                # what to do then
    found: str = ""                 # what there is, for a user
    ring_max: int = RING_MAX        # entries of its largest ring; 0: it has no rings here
    ring: str = ""                  # what its rings are, where that depends on the host
    emulates_kernel: bool = False   # guests at CPL 0 are emulated here, instruction by instruction


class Backend(Protocol):
    """What the package of an accelerator (a folder here) has. Importing it loads nothing else."""

    @property
    def CAPABILITIES(self) -> Capabilities: ...

    def probe(self) -> Available:
        """Look; nothing is changed."""
        ...

    def features(self) -> list[str]:
        """CPU features that its guests are shown on this host, by name; empty where it does not know."""
        ...

    def load(self) -> type[Accelerator]:
        """Import the accelerator itself. Raises ImportError."""
        ...

    def load_program(self) -> type[ProgramAccelerator]:
        """The one for a thread of a Linux program. Raises ImportError, and AccelError where it has none."""
        ...


class ExitKind(Enum):
    """Why ``Accelerator.run`` has come back."""

    KICKED = "kicked"          # interrupted: look at the control block
    RING_FULL = "ring-full"    # soft-full: wait for a reset
    PORT = "port"              # a port access asked for something (Exit.event)
    END = "end"                # the guest is over (Exit.reason, detail, registers)


@dataclass(slots=True)
class Exit:
    """And with what."""

    kind: ExitKind
    event: PortEvent | None = None
    reason: ExitReason = ExitReason.NONE
    detail: str = ""
    registers: dict[str, int] | None = None
    code: int = 0                   # with reason CODE


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

    def get_state(self) -> Saved:
        """Complete architectural state, the same for every accelerator (without ``exit``); of a program's system, all
        that it has. Raises AccelError."""
        ...

    def set_state(self, state: Any) -> None:
        """What ``get_state`` of one of its kind gave. Raises AccelError when this host cannot take it over."""

    def close(self) -> None:
        """Idempotent."""


class ProgramServer(Protocol):
    """What serves a thread of a Linux program, out of the guest. Each method is called by ``run``, which goes on with
    the registers as they are then; with an Exit it returns that."""

    def begin(self) -> Exit | None:
        """``run`` begins."""
        ...

    def call(self) -> Exit | None:
        """A system call."""
        ...

    def fault(self, vector: int, error: int, address: int) -> Exit | None:
        """An exception: RIP is that of the instruction (or of the next one, where the vector says so)."""
        ...

    def interrupted(self) -> Exit | None:
        """A kick, or a signal."""
        ...

    # While it is paused, for its state:

    def put(self, kind: Kind, fault: tuple[int, int, int] = (0, 0, 0)) -> None:
        """It had left the program for this (a call, or a fault: vector, error, address), and nobody knew yet."""

    @property
    def repeats_call(self) -> bool:
        """It waits in a call that is nobody else's, and which is to be made again wherever it goes on."""
        ...


class ProgramAccelerator(Accelerator, Protocol):
    """For a thread of a Linux program. ``server`` is there before ``run``."""

    @staticmethod
    def sees_host_tsc() -> bool:
        """RDTSC in a program gives what it gives on the host."""
        ...

    server: ProgramServer
    #: What it keeps of a page's translations goes when a hole is punched into the page, in whichever process.
    sees_holes: bool
    #: Those of the program, 18 words as ipc.programs.REGISTERS has them: as it goes on.
    registers_now: memoryview

    @property
    def has_gate(self) -> bool:
        """``syscall`` enters a gate (ipc/gates.py): a call may have been made before ``server`` hears of it."""
        ...

    def set_registers(self, words: memoryview) -> None: ...

    def set_fs_base(self, address: int) -> None: ...

    @property
    def fs_base(self) -> int: ...

    def set_root(self, address: int) -> None:
        """Of its page tables (GPA)."""

    def forget_frames(self, runs: list[tuple[int, int]]) -> None:
        """What it has read of page tables about these frames (first, count), or `EVERYTHING` (ipc/programs.py). By any
        thread, also while ``run`` is in the guest."""

    def get_xsave(self, area: memoryview) -> None:
        """Into 4096 bytes."""

    def set_xsave(self, area: memoryview) -> None:
        """Raises OSError for one that is not valid."""
