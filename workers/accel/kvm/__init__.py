"""KVM: the guest runs on the processor, and its dirty ring is the kernel's.

    api.py      KVM's numbers and structures
    host.py     what KVM offers on this host
    vm.py       the accelerator: a VM of one vCPU
    program.py  the same for a thread of a Linux program
    tables.py   page tables of its own, by which reads are not logged
    cpuid.py    CPU features that guests are shown
    state.py    the architectural state, in and out
"""

from __future__ import annotations

from ..base import Accelerator, Available, Capabilities, ProgramAccelerator

__all__ = ["CAPABILITIES", "features", "load", "load_program", "probe"]

CAPABILITIES = Capabilities(section="guest", kernel_ring=True, interruptible_fault=True,
                            trackings=("ring", "bitmap", "uffd", "none"), preference=2,
                            space=200, base_memory=45, worker_memory=5)


def probe() -> Available:
    from . import host

    info = host.probe()
    if info.reason:
        return Available(info.reason, "accel: unicorn works without it", ring_max=0)
    return Available(found=f"{host.DEVICE} can be used", ring_max=info.max_entries,
                     ring=f"KVM_CAP_{info.ring_capability}" if info.ring_capability else "",
                     emulates_kernel=not host.hardware_virtualisation())


def features() -> list[str]:
    from .cpuid import shown

    return shown()


def load() -> type[Accelerator]:
    from .vm import KvmAccelerator

    return KvmAccelerator


def load_program() -> type[ProgramAccelerator]:
    from .program import KvmProgram

    return KvmProgram
