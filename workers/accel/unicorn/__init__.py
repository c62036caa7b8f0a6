"""A software CPU: Unicorn (QEMU's TCG as a library), with dirty logging, kicks and real atomics.

    cpu.py          the accelerator: what happens around the guest
    program.py      the one of a thread of a Linux program
    entry.py        how it comes to stand at a guest's instruction
    pages.py        slots, page flags, ring: what is logged
    hooks.py        what happens at the guest's speed, as Numba compiles it; calls.py has it to call. Of it:
    writes.py       dirty logging
    locked.py       locked instructions
    paging.py       a program's addresses
    native.py       pointers and libunicorn's functions
    context.py      what both know, as plain C structures
    decode.py       which instructions need help
    state.py        the architectural state, in and out
"""

from __future__ import annotations

from ..base import Accelerator, Available, Capabilities, ProgramAccelerator

__all__ = ["CAPABILITIES", "features", "load", "load_program", "probe"]

CAPABILITIES = Capabilities(section="guest", kernel_ring=False, interruptible_fault=False,
                            trackings=("ring", "bitmap", "uffd", "none"), preference=1,
                            space=1280, base_memory=100, worker_memory=10)


def probe() -> Available:
    import importlib.metadata  # late: it is dear, and each process that knows the accelerators would pay

    try:
        return Available(found=f"version {importlib.metadata.version('unicorn')}")
    except importlib.metadata.PackageNotFoundError:
        return Available("not installed", "pip install 'shardvmm[software]'", ring_max=0)


def features() -> list[str]:
    return []


def load() -> type[Accelerator]:
    from .cpu import UnicornAccelerator

    return UnicornAccelerator


def load_program() -> type[ProgramAccelerator]:
    from .program import UnicornProgram

    return UnicornProgram
