"""Recording of dirty traces: the coordinator's end, and that of ``vmm trace record``.

The coordinator puts what it harvests into a queue in shared memory (ipc/traces/queue.py) and never waits; the
recording process takes it out, compresses it and writes the file. Should that one lag, entries are lost and the
trace says how many.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ipc.traces.queue import TraceQueue

from ..errors import VmmError
from ..machine.names import segment_name
from ..machine.spec import RamSlot
from ..machine.tracefile import TraceEnd, TraceHeader, TraceWriter, pack

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["INTERRUPTED", "QUEUE", "Recorder", "record"]

INTERRUPTED = "interrupted"
QUEUE = "record"            # what the queue's segment is called
_QUEUE_WORDS = 1 << 23      # 64 MiB: 8 million entries


class Recorder:
    """Of a machine that is being recorded; its reaper feeds it."""

    def __init__(self, machine: str, table: NDArray[np.uint64]) -> None:
        self._queue = TraceQueue.create(segment_name(machine, QUEUE), _QUEUE_WORDS)
        self._table = table
        self._began = time.monotonic_ns()

    def put(self, vcpu: int, triples: NDArray[np.uint64]) -> None:
        """What was harvested from one ring: (fetch index, slot word, page) each, uint64 [entries, 3]."""
        slots, pages = triples[:, 1], triples[:, 2]
        good = slots < len(self._table)     # what the harvest has dropped is not recorded either
        good[good] = pages[good] < self._table[slots[good], 2]
        if good.any():
            self._queue.put(time.monotonic_ns() - self._began, vcpu, pack(slots[good], pages[good]))

    def miss(self) -> None:
        """A ring has lost count: what else it held nobody knows. The trace is not complete."""
        self._queue.miss(1)

    def close(self) -> None:
        """All of it is in the queue; whoever has it mapped can still read it."""
        self._queue.end()
        self._queue.close()


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def record(machine: Machine, path: Path, seconds: float, interval: float,
           progress: Callable[[float, int], None] = lambda part, entries: None,
           wait: Callable[[float], bool] = _sleep) -> TraceEnd:
    """Record what the machine's vCPUs dirty, for so long or until it ends. Every ``interval`` seconds the rings are
    harvested, if they were not in between: that is how exact the times in the trace are. ``progress`` is told the
    part of the time that is over, and entries. ``wait`` waits, and says whether to stop early: the trace is kept
    then, and says that it was interrupted. Raises VmmError, with no file left then."""
    status = machine.status()
    if status["tracking"] != "ring" and status["tracking_asked"] != "auto":     # auto changes to rings for it
        raise VmmError(f"machine '{machine.name}' tracks dirty pages by {status['tracking']}, and only dirty rings "
                       f"say which page came after which (vmm tracking {machine.name} ring)")
    slots = [RamSlot(s["id"], s["gpa"], s["size"], s["logged"], s["born"]) for s in status["slots"]]
    header = TraceHeader(
        machine=machine.name, accelerator=status["accelerator"], vcpus=len(status["vcpus"]),
        ring_entries=status["ring_entries"], interval=interval, slots=slots,
        recorded=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    with TraceWriter(path, header) as writer:
        opened = time.monotonic()
        machine.record_start()
        status = machine.status()       # tracking auto has changed to rings by now
        queue = TraceQueue.open(segment_name(machine.name, QUEUE))
        try:
            reason = _follow(machine, queue, writer, seconds, interval, progress, wait)
            if reason in ("", INTERRUPTED):
                try:
                    machine.record_stop()
                except VmmError as exc:
                    reason = reason or str(exc)
            if queue.closed and reason != INTERRUPTED:
                reason = ""     # the machine has gone, but in order
            _take(queue, writer)
            reason = reason or _changed(machine, status, slots)
            return writer.finish(queue.lost, reason, time.monotonic() - opened)
        finally:
            queue.close()


def _follow(machine: Machine, queue: TraceQueue, writer: TraceWriter, seconds: float, interval: float,
            progress: Callable[[float, int], None], wait: Callable[[float], bool]) -> str:
    """Until the time is over, or something else ends it: why the trace is not complete, "" where it is."""
    began = time.monotonic()
    entries = 0
    while (elapsed := time.monotonic() - began) < seconds:
        if wait(min(interval, seconds - elapsed)):
            return INTERRUPTED
        try:
            going_on = machine.record_step()
        except VmmError as exc:
            return str(exc)
        entries += _take(queue, writer)
        progress((time.monotonic() - began) / seconds, entries)
        if not going_on:
            break
    return ""


def _changed(machine: Machine, before: dict[str, Any], slots: list[RamSlot]) -> str:
    """What has happened meanwhile that leaves a gap in a trace; "" when nothing has."""
    try:
        status = machine.status()
    except VmmError:    # it has gone: as it was
        return ""
    if status["tracking_switches"] != before["tracking_switches"]:
        return "dirty pages were tracked in another way meanwhile"
    if [(s["id"], s["born"], s["logged"]) for s in status["slots"]] != [(s.id, s.born, s.log) for s in slots]:
        return "memory slots were plugged in or out, or their logging switched, meanwhile"
    return ""


def _take(queue: TraceQueue, writer: TraceWriter) -> int:
    taken = 0
    for time_ns, vcpu, entries in queue.records():
        writer.append(time_ns, vcpu, entries)
        taken += len(entries)
    return taken
