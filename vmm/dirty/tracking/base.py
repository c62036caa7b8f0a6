"""What a mode of dirty tracking is: what it needs, how what the vCPUs have dirtied is gathered, and how a machine
changes to it and from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ...vcpus.handle import VcpuHandle
    from ...vcpus.pool import VcpuPool
    from ..parts import Parts
    from ..reaper import Reaper

__all__ = ["TrackingMode"]


class TrackingMode(Protocol):
    """One file each beside this one. Stateless: what there is lies in ``Parts`` and in the workers."""

    #: As the configuration has it.
    name: str
    #: It has a dirty ring of each vCPU; log buffers of each vCPU and slot; a log at all.
    rings: bool
    logs: bool
    logged: bool

    def need(self, parts: Parts, *, fresh: bool) -> None:
        """Have the segments that it takes. ``fresh``: the machine does not log so yet, and what they hold is void.
        Raises SegmentError."""

    def gather(self, reaper: Reaper) -> int:
        """Into the slot bitmaps: whatever the vCPUs have dirtied by now, who have all been kicked; pages, counted
        once a vCPU. Raises VmmError."""
        ...

    def drain(self, reaper: Reaper) -> int:
        """``gather``, with every vCPU paused, to the last page: before another way is switched in."""
        ...

    def switch_in(self, parts: Parts, vcpus: VcpuPool) -> None:
        """The workers, paused, log so by now: have here what they log into. Raises VmmError."""

    def segments(self, parts: Parts, vcpu: VcpuHandle) -> tuple[str, dict[int, str]]:
        """What a worker that is to log so is told: the segment of its ring ("": there is none, or it is the
        kernel's), and {slot: segment of its log buffer}."""
        ...
