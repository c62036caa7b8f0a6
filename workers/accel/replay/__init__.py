"""No CPU and no memory: pages are dirtied by a pattern, or as a recorded trace has it, for rates and sizes that
this host's processors would not reach.

    producer.py     the accelerator
    loops.py        its loops, as Numba compiles them; calls.py has them to call
    layout.py       what both know, as plain C structures
"""

from __future__ import annotations

from ipc.layout import MAX_VCPUS

from ..base import Accelerator, AccelError, Available, Capabilities, ProgramAccelerator

__all__ = ["CAPABILITIES", "features", "load", "load_program", "probe"]

CAPABILITIES = Capabilities(section="replay", kernel_ring=False, interruptible_fault=True, trackings=("ring",),
                            preference=0, space=350, base_memory=90, worker_memory=10,
                            programs="runs no guest")


def probe() -> Available:
    return Available(found=f"no CPU, no guest memory: up to {MAX_VCPUS} rings; runs no guest")


def features() -> list[str]:
    return []


def load() -> type[Accelerator]:
    from .producer import ReplayAccelerator

    return ReplayAccelerator


def load_program() -> type[ProgramAccelerator]:
    """Raises AccelError: there is none."""
    raise AccelError(CAPABILITIES.programs)
