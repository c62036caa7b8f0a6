"""An accelerator in one folder: a "CPU" whose only program is to write to one page after the other."""

from __future__ import annotations

from workers.accel.base import Accelerator, Available, Capabilities

CAPABILITIES = Capabilities(section="guest", kernel_ring=False, interruptible_fault=True, trackings=("ring",),
                            preference=-1, space=200, base_memory=45, worker_memory=5)


def probe() -> Available:
    return Available(found="one page after the other")


def features() -> list[str]:
    return []


def load() -> type[Accelerator]:
    from .cpu import Stepper

    return Stepper
