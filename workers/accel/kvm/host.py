"""What KVM offers on this host; nothing is changed. Numbers in brackets are sections of Linux
``Documentation/virt/kvm/api.rst``."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from ipc.layout import RING_MIN, DirtyGfn

from . import api

__all__ = ["DEVICE", "RING_CAPABILITIES", "KvmInfo", "hardware_virtualisation", "nested_paging", "probe",
           "ring_size_error"]

DEVICE = Path("/dev/kvm")
RING_CAPABILITIES = {"DIRTY_LOG_RING_ACQ_REL": api.CAP_DIRTY_LOG_RING_ACQ_REL,
                     "DIRTY_LOG_RING": api.CAP_DIRTY_LOG_RING}     # in the order of preference
_MODULES = Path("/sys/module")
_PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class KvmInfo:
    """What there is of KVM here."""

    present: bool                   # /dev/kvm is there
    permitted: bool                 # and can be opened
    ring_capability: str | None     # name of the best one, without KVM_CAP_; None: plain bitmaps only
    max_entries: int                # of a ring; 0 without rings
    reason: str                     # why KVM cannot be used, for a user; empty when it can


def probe() -> KvmInfo:
    """Look at /dev/kvm; changes nothing."""
    if not DEVICE.exists():
        return KvmInfo(False, False, None, 0, f"{DEVICE} is missing (no KVM in this kernel, or no hardware "
                                              "virtualisation offered to this machine)")
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return KvmInfo(True, False, None, 0, f"no permission to open {DEVICE} (add the user to its group, "
                                             "usually kvm, and log in again)")
    except OSError as exc:
        return KvmInfo(True, False, None, 0, f"{DEVICE} cannot be opened: {exc.strerror}")
    try:
        version = api.ioctl(fd, api.GET_API_VERSION)
        if version != api.API_VERSION:
            return KvmInfo(True, True, None, 0, f"KVM API version {version} is not supported (need version "
                                                f"{api.API_VERSION})")
        for name, capability in RING_CAPABILITIES.items():
            largest = api.ioctl(fd, api.CHECK_EXTENSION, capability)
            if largest:
                return KvmInfo(True, True, name, largest // ctypes.sizeof(DirtyGfn), "")
        return KvmInfo(True, True, None, 0, "")
    except OSError as exc:
        return KvmInfo(True, False, None, 0, f"{DEVICE} is not a KVM device: {exc.strerror}")
    finally:
        os.close(fd)


def nested_paging() -> bool:
    """KVM has the processor walk a second set of tables (EPT, NPT), and shadows none of the guest's."""
    for parameter in ("kvm_intel/parameters/ept", "kvm_amd/parameters/npt"):
        with contextlib.suppress(OSError):
            if (_MODULES / parameter).read_text().strip() in ("Y", "1"):
                return True
    return False


def hardware_virtualisation() -> bool:
    """The processor has VMX or SVM for KVM. A KVM without them (as of a hypervisor's guest that is given none) runs CPL
    3 natively, and emulates CPL 0. True where that cannot be seen."""
    try:
        with _PROCESSORS.open() as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return True
    return not flags or not {"vmx", "svm"}.isdisjoint(flags.split())


def ring_size_error(entries: int, info: KvmInfo) -> str:
    """What is wrong with a ring of so many entries on this host; empty when nothing is [8.29]."""
    if entries & entries - 1 or not RING_MIN <= entries <= info.max_entries:
        return (f"{entries} entries: must be a power of two from {RING_MIN} to {info.max_entries} "
                f"(KVM_CAP_{info.ring_capability})")
    return ""
