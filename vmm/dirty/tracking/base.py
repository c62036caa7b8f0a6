"""What a mode of dirty tracking is: what it needs, how what the vCPUs have dirtied is gathered, and how a machine
changes to it and from it."""

from __future__ import annotations

from typing import Protocol

from ...vcpus.handle import VcpuHandle
from ...vcpus.pool import VcpuPool
from ..parts import Logging, Parts
from ..reaper import ReapMode

__all__ = ["TrackingMode"]


class TrackingMode(Logging, ReapMode, Protocol):
    """One file each beside this one. Stateless: what there is lies in ``Parts`` and in the workers."""

    def need(self, parts: Parts, *, fresh: bool) -> None:
        """Have the segments that it takes. ``fresh``: the machine does not log so yet, and what they hold is void.
        Raises SegmentError."""

    def switch_in(self, parts: Parts, vcpus: VcpuPool) -> None:
        """The workers, paused, log so by now: have here what they log into. Raises VmmError."""

    def segments(self, parts: Parts, vcpu: VcpuHandle) -> tuple[str, dict[int, str]]:
        """What a worker that is to log so is told: the segment of its ring ("": there is none, or it is the
        kernel's), and {slot: segment of its log buffer}."""
        ...
