"""Byte layouts of what lies in shared memory: ring entries and control blocks.

docs/protocol.md is the prose of this file; ``PROTOCOL_VERSION`` changes with either. Every field
has one writer, named beside it: *c* the coordinator, *w* the vCPU worker. All fields are naturally
aligned, so a store of one is a single machine store.

A worker that went wild may have written anything over its block. Whoever reads one takes every number: those that
name nothing are ``UNKNOWN``, sums that cannot be are a ring that has lost count (vmm/dirty/reaper.py).
"""

from __future__ import annotations

import ctypes
import signal
from enum import IntEnum, IntFlag

from .shm import PAGE_SIZE

__all__ = [
    "CONTROL_MAGIC",
    "DIRTY_GFN_F_DIRTY",
    "DIRTY_GFN_F_RESET",
    "IMMEDIATE_EXIT_OFFSET",
    "KICK_SIGNAL",
    "MAX_SLOTS",
    "MAX_VCPUS",
    "NR_ADDRESS_SPACES",
    "PROTOCOL_VERSION",
    "RING_MAX",
    "RING_MIN",
    "RING_PAGE_OFFSET",
    "RING_RESERVE",
    "SYSTEM_SLOT",
    "DirtyGfn",
    "ExitReason",
    "MachineControl",
    "PeerEnum",
    "ReaperState",
    "Tracking",
    "VcpuControl",
    "VcpuRequest",
    "VcpuState",
    "control_error",
    "control_size",
    "coordinator_lane",
    "machine_control",
    "vcpu_control",
    "vcpu_lane",
]

PROTOCOL_VERSION = 5
CONTROL_MAGIC = 0x4D4D5644_52414853  # "SHARDVMM"

MAX_VCPUS = 256
MAX_SLOTS = 500            # user slots: ids 0..499
SYSTEM_SLOT = 510          # page tables, descriptor tables, boot information; never logged
NR_ADDRESS_SPACES = 1      # as_id 0 only; an entry that names another is counted and dropped

#: Bounds of a ring's entries, powers of two. KVM's own are a page (256 entries) and 65536; its reserve is up to
#: 64 + 512 entries, and half a ring is to be usable.
RING_MIN, RING_MAX = 1024, 65536

#: Entries kept free when a vCPU is asked out of the guest (soft-full), as KVM does on Intel: 64, and a PML
#: buffer's 512.
RING_RESERVE = 64 + 512

#: Where the kernel's ring lies in the mapping of a vCPU fd: KVM_DIRTY_LOG_PAGE_OFFSET (Linux uapi/linux/kvm.h); and
#: ``immediate_exit`` in kvm_run, at its beginning.
RING_PAGE_OFFSET = 64
IMMEDIATE_EXIT_OFFSET = 1

#: Interrupts the vCPU thread of a worker in the guest.
KICK_SIGNAL = signal.SIGUSR1

#: Bytes of the lanes behind the control blocks, in which each process writes down what it does (ipc/lanes.py).
_COORDINATOR_LANE, _VCPU_LANE = 512 << 10, 128 << 10

# Flags of a ring entry (Linux Documentation/virt/kvm/api.rst, 8.29 KVM_CAP_DIRTY_LOG_RING).
DIRTY_GFN_F_DIRTY = 1
DIRTY_GFN_F_RESET = 2


class DirtyGfn(ctypes.Structure):
    """``struct kvm_dirty_gfn``: 16 bytes."""

    _fields_ = [
        ("flags", ctypes.c_uint32),   # 0 free, 1 dirty (producer, release), 2 harvested (c, release)
        ("slot", ctypes.c_uint32),    # as_id << 16 | slot id
        ("offset", ctypes.c_uint64),  # page within the slot
    ]


class PeerEnum(IntEnum):
    """A number that somebody else has written; what names nothing is ``UNKNOWN``."""

    @classmethod
    def _missing_(cls, value: object) -> IntEnum | None:
        return cls["UNKNOWN"] if isinstance(value, int) else None


class VcpuState(PeerEnum):
    """Where a vCPU is, as its control block says."""

    NEW = 0         # process started, not ready
    READY = 1       # set up, has not entered the guest
    RUNNING = 2     # in the guest, or about to be
    RING_FULL = 3   # out of the guest until its ring has been reset
    WAITING = 4     # out of the guest in the wait hypercall
    PAUSED = 5      # out of the guest on request
    EXITED = 6      # the guest ended; the process still serves (reset, state)
    DEAD = 7        # the process is gone (set by the coordinator)
    THROTTLED = 8   # out of the guest for its dirty limit
    IN_CALL = 9     # a program's system in the middle of a call, until its ring has been reset, or on request
    UNKNOWN = 0xFFFF_FFFF


class ExitReason(PeerEnum):
    """Why a vCPU is no longer running."""

    NONE = 0
    CODE = 1            # the guest wrote its exit code to port 0xf4
    HALT = 2            # HLT at CPL 0 (nothing can wake it: there are no interrupts)
    TRIPLE_FAULT = 3
    EXCEPTION = 4       # a CPU exception the guest has no handler for
    BAD_ADDRESS = 5     # touched an address outside RAM
    UNKNOWN_PORT = 6
    INTERNAL_ERROR = 7  # the accelerator gave up (KVM_EXIT_INTERNAL_ERROR, FAIL_ENTRY, …)
    TIMEOUT = 8         # still running at the machine's timeout
    STOPPED = 9         # ended on request
    WORKER_DIED = 10    # the process is gone
    UNKNOWN = 0xFFFF_FFFF   # what a worker says means nothing


class VcpuRequest(IntFlag):
    """What the coordinator wants of a vCPU; looked at before each guest entry."""

    NONE = 0
    PAUSE = 1       # stay out of the guest while set
    STOP = 2        # end this vCPU now (reason in stop_reason)


class ReaperState(PeerEnum):
    """``enum KVMDirtyRingReaperState`` of the seed."""

    NONE = 0
    WAIT = 1
    REAPING = 2
    UNKNOWN = 0xFFFF_FFFF


class Tracking(PeerEnum):
    """How a worker logs what its vCPU dirties. Names in lower case are those of the configuration."""

    UNSET = 0       # process started, not ready
    RING = 1        # the vCPU's dirty ring
    BITMAP = 2      # plain dirty bitmap: of KVM, or of the software CPU
    UFFD = 3        # write-protected page tables of the worker (ipc/writelog.py)
    NONE = 4        # not at all
    UNKNOWN = 0xFFFF_FFFF


class VcpuControl(ctypes.Structure):
    """Control block of one vCPU: one page in the machine's control segment."""

    _fields_ = [
        ("pid", ctypes.c_uint32),             # w
        ("state", ctypes.c_uint32),           # w (VcpuState); c sets DEAD
        ("request", ctypes.c_uint32),         # c (VcpuRequest)
        ("kick_request", ctypes.c_uint32),    # c: raised by one for each kick
        ("kick_ack", ctypes.c_uint32),        # w: the kick_request seen outside the guest
        ("immediate_exit", ctypes.c_uint32),  # c sets, w clears (software CPUs; KVM has kvm_run's)
        ("stop_reason", ctypes.c_uint32),     # c: an ExitReason, with request STOP
        ("ring_entries", ctypes.c_uint32),    # c
        ("exit_reason", ctypes.c_uint32),     # w (ExitReason)
        ("exit_code", ctypes.c_int32),        # w
        ("ring_generation", ctypes.c_uint32), # w: raised by one when the ring is rebuilt
        ("collected", ctypes.c_uint32),       # c: the worker has died, and all it dirtied is in the slot bitmaps
        # --- ring indices: totals since the ring's (re)build, never wrapped -------------------
        ("pushed_total", ctypes.c_uint64),    # w: entries pushed (software rings only)
        ("fetch_total", ctypes.c_uint64),     # c: entries harvested (QEMU: kvm_fetch_index)
        ("reset_total", ctypes.c_uint64),     # w: entries reset, as the reset call counted them
        # --- statistics over the vCPU's life ------------------------------------------------
        ("dirty_pages", ctypes.c_uint64),     # c: entries harvested from this vCPU
        ("bad_entries", ctypes.c_uint64),     # c: entries dropped by the bounds checks
        ("ring_full_exits", ctypes.c_uint64), # w: raised by one for each: the coordinator goes by it (ipc/ring.py)
        ("resets", ctypes.c_uint64),          # w: reset calls made
        ("ring_rebuilds", ctypes.c_uint64),   # c: count mismatches answered by a new ring
        ("guest_ns", ctypes.c_uint64),        # w: time inside the guest, ns
        ("stalled_ns", ctypes.c_uint64),      # w: time out of the guest for a full ring, ns
        ("guest_entries", ctypes.c_uint64),   # w: times the guest was entered
        ("last_slot", ctypes.c_uint32),       # c: slot word of the last entry harvested
        ("_pad1", ctypes.c_uint32),
        ("last_offset", ctypes.c_uint64),     # c: its page offset
        ("dirty_quota", ctypes.c_uint64),     # c: pages a second that this vCPU may dirty; 0: no limit
        ("throttled_ns", ctypes.c_uint64),    # w: time out of the guest for that, ns
        # --- the reset of the ring: asked for and answered here, both words with a futex wake --------------
        ("reset_request", ctypes.c_uint32),   # c: raised by one for each
        ("reset_expected", ctypes.c_uint32),  # c: entries harvested and not reset yet
        ("reset_done", ctypes.c_uint32),      # w: the reset_request that was carried out last
        ("tracking", ctypes.c_uint32),        # w (Tracking)
        ("reset_ns", ctypes.c_uint64),        # w: time in reset calls, ns
        ("awaits_reset", ctypes.c_uint32),    # w: 1 while the vCPU thread itself looks for a reset_request (ring full)
    ]


class MachineControl(ctypes.Structure):
    """First page of the control segment."""

    _fields_ = [
        ("magic", ctypes.c_uint64),
        ("version", ctypes.c_uint32),
        ("vcpu_count", ctypes.c_uint32),
        ("coordinator_pid", ctypes.c_uint32),
        ("reaper_state", ctypes.c_uint32),        # ReaperState
        ("reaper_iteration", ctypes.c_uint64),    # QEMU: reaper_iteration
        ("reaped_pages", ctypes.c_uint64),
        ("reap_ns", ctypes.c_uint64),             # time spent reaping, ns
        ("flushes", ctypes.c_uint64),
        ("publish_pending", ctypes.c_uint32),     # 1 while staging may hold unpublished pages
        ("verify_in_round", ctypes.c_uint32),     # 1 while the verifier brings its copy up to date
        ("events", ctypes.c_uint64),              # events of the control socket that there have been
    ]


assert ctypes.sizeof(DirtyGfn) == 16


def control_size(vcpus: int) -> int:
    """Bytes of a control segment: the machine's page, then one page a vCPU, then the lanes: the coordinator's, then
    one a vCPU."""
    return PAGE_SIZE * (1 + vcpus) + _COORDINATOR_LANE + _VCPU_LANE * vcpus


def coordinator_lane(vcpus: int) -> tuple[int, int]:
    """Where it lies in the control segment: (first byte, bytes)."""
    return PAGE_SIZE * (1 + vcpus), _COORDINATOR_LANE


def vcpu_lane(vcpus: int, index: int) -> tuple[int, int]:
    """The same, of vCPU ``index``."""
    return PAGE_SIZE * (1 + vcpus) + _COORDINATOR_LANE + _VCPU_LANE * index, _VCPU_LANE


def machine_control(address: int) -> MachineControl:
    """The machine's block of the control segment mapped at ``address`` (keep the mapping alive)."""
    return MachineControl.from_address(address)


def vcpu_control(address: int, index: int) -> VcpuControl:
    """vCPU ``index``'s block of the control segment mapped at ``address``."""
    return VcpuControl.from_address(address + PAGE_SIZE * (1 + index))


def control_error(address: int, size: int) -> str:
    """What is wrong with the control segment of ``size`` bytes mapped at ``address``; empty when this program can
    use it."""
    if size < control_size(0):
        return f"its control segment has {size} bytes"
    block = machine_control(address)
    if block.magic != CONTROL_MAGIC:
        return "its control segment was not made by this program"
    if block.version != PROTOCOL_VERSION:
        return (f"it was started by another version of this program (protocol {block.version}, here "
                f"{PROTOCOL_VERSION})")
    if size < control_size(block.vcpu_count):
        return f"its control segment has {size} bytes for {block.vcpu_count} vCPUs"
    return ""
