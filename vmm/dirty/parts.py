"""What a machine's dirty log is made of: its segments, and the views of them that the coordinator has."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Protocol

from ipc.layout import MachineControl, machine_control
from ipc.shm import Segment

from ..machine.memory import MemorySlot
from ..machine.spec import MachineSpec, RamSlot
from .log import DirtyLog

__all__ = ["Logging", "Parts"]


class Logging(Protocol):
    """What is asked of a mode of dirty tracking here (vmm/dirty/tracking has the modes)."""

    #: As the configuration has it.
    name: str
    #: It has a dirty ring of each vCPU; log buffers of each vCPU and slot; a log at all.
    rings: bool
    logs: bool
    logged: bool


@dataclass
class Parts:
    """Segments of a machine and the views of them. ``mode``: how the machine logs now."""

    spec: MachineSpec
    control_segment: Segment
    system: Segment
    log: DirtyLog
    mode: Logging
    #: Software rings, by vCPU.
    rings: dict[int, Segment] = field(default_factory=dict)
    #: Each vCPU's part of the trace that is replayed (ipc/traces/segment.py).
    traces: list[Segment] = field(default_factory=list)
    entry: int = 0
    #: Pages [first, end) of each slot that are the guest's to use: no image, no stacks.
    usable: dict[int, tuple[int, int]] = field(default_factory=dict)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def control(self) -> MachineControl:
        return machine_control(self.control_segment.address)

    def new_slot(self, slot: RamSlot, *, create: bool, incoming: bool = False) -> MemorySlot:
        """``incoming``: its memory is filled before the guest has it (ipc/shm.py)."""
        replay = not self.spec.can.guests
        logs = self.spec.vcpus if (self.spec.verify is not None if replay else self.mode.logs) else 0
        return MemorySlot(self.spec.name, slot, vcpu_logs=logs, create=create, replay=replay,
                          incoming=incoming, reapers=self.spec.reaper.reapers)

    @property
    def ring_entries(self) -> int:
        """Of the rings as they are now; 0 without any."""
        return self.spec.ring_entries if self.mode.rings else 0

    @property
    def reaps(self) -> bool:
        """There are rings that get full."""
        return bool(self.ring_entries) and self.log.on

    @property
    def tracking(self) -> str:
        """Name of the mode, one of vmm.machine.trackings.MODES."""
        return self.mode.name

    @property
    def segments(self) -> list[str]:
        """Names of all that the machine has now, but for the journal and the verifier's."""
        return [self.control_segment.name, self.system.name, *self.log.segments(),
                *(ring.name for ring in self.rings.values()), *(trace.name for trace in self.traces)]

    def close(self) -> None:
        self.log.close()
        self.stack.close()
