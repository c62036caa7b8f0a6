"""Tracking ``ring``: each vCPU logs into its own dirty ring (ipc/ring.py), which the reaper harvests all the
time."""

from __future__ import annotations

import ctypes

from ipc.layout import DirtyGfn
from ipc.shm import Segment

from ...machine.names import segment_name
from ...vcpus.handle import VcpuHandle
from ...vcpus.pool import VcpuPool
from ..parts import Parts
from ..reaper import Reaper

__all__ = ["Ring"]


class Ring:
    """A dirty ring of each vCPU."""

    name = "ring"
    rings, logs, logged = True, False, True

    def need(self, parts: Parts, *, fresh: bool) -> None:
        """A segment for each ring, where the kernel makes none."""
        for index in range(parts.spec.vcpus):
            if index in parts.rings or parts.spec.has_kernel_ring(index):
                continue
            name = segment_name(parts.spec.name, f"ring{index}")
            segment, _ = Segment.adopt(name, parts.spec.ring_entries * ctypes.sizeof(DirtyGfn))
            parts.rings[index] = parts.stack.enter_context(segment)

    def gather(self, reaper: Reaper) -> int:
        return reaper.reap()

    def drain(self, reaper: Reaper) -> int:
        return reaper.drain_rings()

    def switch_in(self, parts: Parts, vcpus: VcpuPool) -> None:
        for vcpu in vcpus.all:
            if vcpu.index in parts.rings:
                vcpu.ring.map_segment(parts.rings[vcpu.index])

    def segments(self, parts: Parts, vcpu: VcpuHandle) -> tuple[str, dict[int, str]]:
        return parts.rings[vcpu.index].name if vcpu.index in parts.rings else "", {}
