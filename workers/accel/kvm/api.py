"""KVM's interface to user space: every ioctl number, constant and structure this project uses, here and
nowhere else. Names are those of Linux ``uapi/linux/kvm.h`` and ``uapi/asm/kvm.h`` (x86), without their
``kvm_``; documentation is Linux ``Documentation/virt/kvm/api.rst``, whose section is given in brackets.

The ioctl itself goes through libc: Python's ``fcntl.ioctl`` refuses integer arguments above 2**31 - 1 and
copies buffers, and neither suits KVM_RUN.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any

from ipc.linux.libc import LIBC

__all__: list[str] = []     # imported as a module: ``from . import api``

_ioctl = LIBC["ioctl"]      # an object of its own, with its own types
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


# --- structures -------------------------------------------------------------------------------------------


class UserspaceMemoryRegion(ctypes.Structure):
    """[4.35]"""

    _fields_ = [("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64),
                ("memory_size", c_uint64), ("userspace_addr", c_uint64)]


class EnableCap(ctypes.Structure):
    """[4.37]"""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class DirtyLog(ctypes.Structure):
    """[4.8]"""

    _fields_ = [("slot", c_uint32), ("padding", c_uint32), ("dirty_bitmap", c_uint64)]


class ClearDirtyLog(ctypes.Structure):
    """[4.117]"""

    _fields_ = [("slot", c_uint32), ("num_pages", c_uint32), ("first_page", c_uint64),
                ("dirty_bitmap", c_uint64)]


class Regs(ctypes.Structure):
    """[4.11]"""

    _fields_ = [(name, c_uint64) for name in (
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
        "r15", "rip", "rflags")]


class Segment(ctypes.Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16), ("type", c_uint8),
                ("present", c_uint8), ("dpl", c_uint8), ("db", c_uint8), ("s", c_uint8), ("l", c_uint8),
                ("g", c_uint8), ("avl", c_uint8), ("unusable", c_uint8), ("padding", c_uint8)]


class Dtable(ctypes.Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(ctypes.Structure):
    """[4.13]"""

    _fields_ = [*((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
                ("gdt", Dtable), ("idt", Dtable),
                *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
                ("interrupt_bitmap", c_uint64 * 4)]


class Xcr(ctypes.Structure):
    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class Xcrs(ctypes.Structure):
    """[4.44]"""

    _fields_ = [("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", Xcr * 16), ("padding", c_uint64 * 16)]


class Xsave(ctypes.Structure):
    """[4.42] The XSAVE area in its standard form."""

    _fields_ = [("region", c_uint8 * 4096)]


class DebugRegs(ctypes.Structure):
    """[4.33]"""

    _fields_ = [("db", c_uint64 * 4), ("dr6", c_uint64), ("dr7", c_uint64), ("flags", c_uint64),
                ("reserved", c_uint64 * 9)]


class MsrEntry(ctypes.Structure):
    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class OneMsr(ctypes.Structure):
    """[4.18] kvm_msrs with room for one entry."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32), ("entry", MsrEntry)]


class MsrList(ctypes.Structure):
    """[4.3]"""

    _fields_ = [("nmsrs", c_uint32), ("indices", c_uint32 * 1024)]


class CpuidEntry(ctypes.Structure):
    _fields_ = [(name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
                ] + [("padding", c_uint32 * 3)]


class Cpuid(ctypes.Structure):
    """[4.46]"""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry * 256)]


class VcpuEvents(ctypes.Structure):
    """[4.31] Without the inner unions' names; reserved fields are kept as they come."""

    _fields_ = [
        ("exception_injected", c_uint8), ("exception_nr", c_uint8), ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8), ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8), ("interrupt_nr", c_uint8), ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8), ("nmi_pending", c_uint8), ("nmi_masked", c_uint8), ("nmi_pad", c_uint8),
        ("sipi_vector", c_uint32), ("flags", c_uint32),
        ("smi_smm", c_uint8), ("smi_pending", c_uint8), ("smi_smm_inside_nmi", c_uint8),
        ("smi_latched_init", c_uint8),
        ("triple_fault_pending", c_uint8), ("reserved", c_uint8 * 26), ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class DeviceAttr(ctypes.Structure):
    """[4.80]"""

    _fields_ = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]


class MpState(ctypes.Structure):
    """[4.38]"""

    _fields_ = [("mp_state", c_uint32)]


class RunIo(ctypes.Structure):
    _fields_ = [("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32),
                ("data_offset", c_uint64)]


class RunMmio(ctypes.Structure):
    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class RunInternal(ctypes.Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class RunFailEntry(ctypes.Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class RunSystemEvent(ctypes.Structure):
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _RunExit(ctypes.Union):
    _fields_ = [("io", RunIo), ("mmio", RunMmio), ("internal", RunInternal), ("fail_entry", RunFailEntry),
                ("system_event", RunSystemEvent), ("padding", c_uint8 * 256)]


class Run(ctypes.Structure):
    """[5] The beginning of the page shared with KVM_RUN."""

    _anonymous_ = ("exit",)
    _fields_ = [("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
                ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
                ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64), ("exit", _RunExit),
                # KVM_CAP_SYNC_REGS: registers that come with an exit, and that an entry is to take over
                ("valid_regs", c_uint64), ("dirty_regs", c_uint64), ("regs", Regs), ("sregs", Sregs)]


# --- ioctl numbers: _IOC(direction, 0xAE, number, size) of uapi/asm-generic/ioctl.h ------------------------

_KVMIO = 0xAE
_WRITE, _READ = 1, 2


def _ioc(direction: int, number: int, kind: type[Any] | int = 0) -> int:
    size = kind if isinstance(kind, int) else ctypes.sizeof(kind)
    return direction << 30 | size << 16 | _KVMIO << 8 | number


GET_API_VERSION = _ioc(0, 0x00)
CREATE_VM = _ioc(0, 0x01)
GET_MSR_INDEX_LIST = _ioc(_READ | _WRITE, 0x02, 4)
CHECK_EXTENSION = _ioc(0, 0x03)
GET_VCPU_MMAP_SIZE = _ioc(0, 0x04)
GET_SUPPORTED_CPUID = _ioc(_READ | _WRITE, 0x05, 8)
CREATE_VCPU = _ioc(0, 0x41)
GET_DIRTY_LOG = _ioc(_WRITE, 0x42, DirtyLog)
SET_USER_MEMORY_REGION = _ioc(_WRITE, 0x46, UserspaceMemoryRegion)
RUN = _ioc(0, 0x80)
GET_REGS = _ioc(_READ, 0x81, Regs)
SET_REGS = _ioc(_WRITE, 0x82, Regs)
GET_SREGS = _ioc(_READ, 0x83, Sregs)
SET_SREGS = _ioc(_WRITE, 0x84, Sregs)
GET_MSRS = _ioc(_READ | _WRITE, 0x88, 8)
SET_MSRS = _ioc(_WRITE, 0x89, 8)
SET_CPUID2 = _ioc(_WRITE, 0x90, 8)
GET_MP_STATE = _ioc(_READ, 0x98, MpState)
SET_MP_STATE = _ioc(_WRITE, 0x99, MpState)
GET_VCPU_EVENTS = _ioc(_READ, 0x9F, VcpuEvents)
SET_VCPU_EVENTS = _ioc(_WRITE, 0xA0, VcpuEvents)
GET_DEBUGREGS = _ioc(_READ, 0xA1, DebugRegs)
SET_DEBUGREGS = _ioc(_WRITE, 0xA2, DebugRegs)
ENABLE_CAP = _ioc(_WRITE, 0xA3, EnableCap)
GET_XSAVE = _ioc(_READ, 0xA4, Xsave)
SET_XSAVE = _ioc(_WRITE, 0xA5, Xsave)
GET_XCRS = _ioc(_READ, 0xA6, Xcrs)
SET_XCRS = _ioc(_WRITE, 0xA7, Xcrs)
SET_DEVICE_ATTR = _ioc(_WRITE, 0xE1, DeviceAttr)
HAS_DEVICE_ATTR = _ioc(_WRITE, 0xE3, DeviceAttr)
CLEAR_DIRTY_LOG = _ioc(_READ | _WRITE, 0xC0, ClearDirtyLog)
RESET_DIRTY_RINGS = _ioc(0, 0xC7)

_NAMES = {value: f"KVM_{name}" for name, value in list(globals().items())
          if name.isupper() and not name.startswith("_") and isinstance(value, int)}

# --- constants --------------------------------------------------------------------------------------------

API_VERSION = 12

CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168     # [7.18]
CAP_SYNC_REGS = 74                      # [6.74]
CAP_DIRTY_LOG_RING = 192                # [8.29]
CAP_DIRTY_LOG_RING_ACQ_REL = 223        # [8.29]

SYNC_REGS, SYNC_SREGS = 1, 2
VCPU_TSC_CTRL, VCPU_TSC_OFFSET = 0, 0   # Documentation/virt/kvm/devices/vcpu.rst, 4

MEM_LOG_DIRTY_PAGES = 1                 # flags of a memory region
DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1

EXIT_UNKNOWN = 0
EXIT_IO = 2
EXIT_HLT = 5
EXIT_MMIO = 6
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTERNAL_ERROR = 17
EXIT_SYSTEM_EVENT = 24
EXIT_DIRTY_RING_FULL = 31
EXIT_IO_OUT = 1

INTERNAL_ERRORS = {1: "emulation failure", 2: "simultaneous exceptions", 3: "event delivery",
                   4: "unexpected VM exit"}


# Sizes that the kernel's headers have, on x86-64.
for _kind, _size in ((UserspaceMemoryRegion, 32), (EnableCap, 104), (DirtyLog, 16), (ClearDirtyLog, 24),
                     (Regs, 144), (Segment, 24), (Sregs, 312), (Xcrs, 392), (Xsave, 4096), (DebugRegs, 128),
                     (MsrEntry, 16), (CpuidEntry, 40), (DeviceAttr, 24), (VcpuEvents, 64), (RunIo, 16), (RunMmio, 24)):
    assert ctypes.sizeof(_kind) == _size, _kind
assert (Run.immediate_exit.offset, Run.exit_reason.offset, Run.exit.offset) == (1, 8, 32)
assert (Run.valid_regs.offset, Run.dirty_regs.offset, Run.regs.offset, Run.sregs.offset) == (288, 296, 304, 448)


def ioctl(fd: int, number: int, argument: ctypes.Structure | int = 0) -> int:
    """The ioctl's result, 0 or more. Raises OSError that names it (``KVM_CREATE_VM: …``)."""
    pointer = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result = int(_ioctl(fd, number, pointer))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{_NAMES.get(number, hex(number))}: {os.strerror(error)}")
    return result


def run(fd: int) -> int:
    """KVM_RUN: 0, or the errno. The one call that is made often; without an exception for EINTR."""
    return 0 if _ioctl(fd, RUN, None) >= 0 else ctypes.get_errno()
