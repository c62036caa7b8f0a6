"""A test's own view of what the processes of a machine share: control blocks, and the rings of software CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ipc.layout import DirtyGfn, MachineControl, VcpuControl, machine_control, vcpu_control
from ipc.shm import Segment
from vmm.machine.names import segment_name

__all__ = ["control_blocks", "forge_full", "machine_block", "software_ring"]


@contextmanager
def control_blocks(name: str) -> Iterator[list[VcpuControl]]:
    """Of all vCPUs of this machine."""
    with Segment.open(segment_name(name, "control")) as segment:
        yield [vcpu_control(segment.address, i) for i in range(machine_control(segment.address).vcpu_count)]


@contextmanager
def machine_block(name: str) -> Iterator[MachineControl]:
    with Segment.open(segment_name(name, "control")) as segment:
        yield machine_control(segment.address)


@contextmanager
def software_ring(name: str, vcpu: int) -> Iterator[Any]:
    """The entries (DirtyGfn array) of a vCPU without a kernel's ring."""
    with Segment.open(segment_name(name, f"ring{vcpu}")) as segment:
        yield (DirtyGfn * (segment.size // ctypes.sizeof(DirtyGfn))).from_address(segment.address)


def forge_full(name: str, vcpu: int, page: int) -> None:
    """Write over all entries of a software ring, as a vCPU does that is not stopped in time: none is free. The vCPU
    stands still."""
    with software_ring(name, vcpu) as entries:
        for entry in entries:
            entry.slot, entry.offset, entry.flags = 0, page, 1
