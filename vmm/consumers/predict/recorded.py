"""A guest that runs: what it dirties is recorded for a while, its memory looked at. It goes on meanwhile."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ipc.shm import PAGE_SIZE, open_fd

from ...client.machine import Machine
from ...errors import VmmError
from ..pages import is_filled, touched
from ..trace import record
from .dirtying import Guest, Memory, from_trace

__all__ = ["memory_of", "watch"]

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


def watch(machine: Machine, seconds: float, interval: float, progress: Callable[[float, int], None],
          wait: Callable[[float], bool]) -> tuple[Guest, Memory]:
    """See ``vmm.consumers.trace.record`` for the arguments. Raises VmmError, TraceError, SegmentError."""
    with tempfile.TemporaryDirectory(prefix="vmm-predict-") as folder:
        path = Path(folder) / "trace"
        end = record(machine, path, seconds, interval, progress, wait)
        if end.lost:
            raise VmmError(f"{end.lost:,} entries came faster than they could be recorded: try a longer --interval")
        return from_trace(path)[0], memory_of(machine)

