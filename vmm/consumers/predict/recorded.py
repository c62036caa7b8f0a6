"""What runs, a machine or any process: what it dirties is recorded for a while. It goes on meanwhile."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ipc.shm import PAGE_SIZE, open_fd

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.tracefile import TraceEnd
from ..pages import is_filled, touched
from ..trace import record
from ..watch.series import Source
from ..watch.tracing import record_process
from .costs import PROGRAM, Costs
from .dirtying import Guest, Memory, from_trace

__all__ = ["costs_of", "memory_of", "watch", "watch_process"]

_PART = 1 << 14             # pages that are looked at at once


def memory_of(machine: Machine) -> Memory:
    """As it is now. Raises VmmError, SegmentError."""
    sizes, todo, filled = {}, {}, 0
    for slot in machine.status()["slots"]:
        with contextlib.ExitStack() as stack:
            fd = open_fd(machine.ram_segment(slot["id"]))
            stack.callback(os.close, fd)
            found = touched(fd, slot["size"])
        sizes[slot["id"]], todo[slot["id"]] = slot["pages"], found
        ram = machine.ram(slot["id"]).reshape(-1, PAGE_SIZE)
        filled += sum(int(is_filled(ram[found[at:at + _PART]]).sum()) for at in range(0, len(found), _PART))
    return Memory(sizes, todo, filled)


def costs_of(machine: Machine) -> Costs:
    """Of its migrations. Raises VmmError."""
    return PROGRAM if machine.status()["program"] is not None else Costs()


def watch(machine: Machine, seconds: float, interval: float, progress: Callable[[float, int], None],
          wait: Callable[[float], bool]) -> tuple[Guest, Memory]:
    """See ``vmm.consumers.trace.record`` for the arguments. Raises VmmError, TraceError, SegmentError."""
    guest, _ = _traced(lambda path: record(machine, path, seconds, interval, progress, wait))
    return guest, memory_of(machine)


def watch_process(source: Source, seconds: float, interval: float, progress: Callable[[float, int], None],
                  wait: Callable[[float], bool]) -> tuple[Guest, dict[int, int]]:
    """See ``vmm.consumers.watch.tracing.record_process`` for the arguments; the guest, and {slot: pages}. Raises
    VmmError, TraceError."""
    return _traced(lambda path: record_process(source, "process", path, seconds, interval, progress, wait))


def _traced(recording: Callable[[Path], TraceEnd]) -> tuple[Guest, dict[int, int]]:
    with tempfile.TemporaryDirectory(prefix="vmm-predict-") as folder:
        path = Path(folder) / "trace"
        end = recording(path)
        if end.lost:
            raise VmmError(f"{end.lost:,} entries came faster than they could be recorded: try a longer --interval")
        return from_trace(path)

