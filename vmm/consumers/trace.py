"""``vmm trace record``: what the coordinator has put into the queue (vmm/dirty/recorder.py) is taken out,
compressed and written to a file. A reader that lags loses entries, and the trace says how many."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipc.traces.queue import TraceQueue

from ..client.interrupts import sleep
from ..errors import VmmError
from ..machine.names import record_queue
from ..machine.spec import RamSlot
from ..machine.tracefile import TraceEnd, TraceHeader, TraceWriter

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["INTERRUPTED", "record"]

INTERRUPTED = "interrupted"


def record(machine: Machine, path: Path, seconds: float, interval: float,
           progress: Callable[[float, int], None] = lambda part, entries: None,
           wait: Callable[[float], bool] = sleep) -> TraceEnd:
    """Record what the machine's vCPUs dirty, for so long or until it ends. Every ``interval`` seconds the rings are
    harvested, if they were not in between: that is how exact the times in the trace are. ``progress`` is told the
    part of the time that is over, and entries. ``wait`` waits, and says whether to stop early: the trace is kept
    then, and says that it was interrupted. Raises VmmError, with no file left then."""
    status = machine.status()
    if status["tracking"] != "ring" and status["tracking_asked"] != "auto":     # auto changes to rings for it
        raise VmmError(f"machine '{machine.name}' has tracking mode {status['tracking']}, but only dirty rings "
                       f"record the order in which pages are dirtied (run vmm tracking {machine.name} ring)")
    slots = [RamSlot(s["id"], s["gpa"], s["size"], s["logged"], s["born"]) for s in status["slots"]]
    header = TraceHeader(
        machine=machine.name, accelerator=status["accelerator"], vcpus=len(status["vcpus"]),
        ring_entries=status["ring_entries"], interval=interval, slots=slots,
        recorded=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        threads=_threads(machine, len(status["vcpus"])) if status.get("program") else [])
    with TraceWriter(path, header) as writer:
        opened = time.monotonic()
        machine.record_start()
        status = machine.status()       # tracking auto has changed to rings by now
        queue = TraceQueue.open(record_queue(machine.name))
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


def _threads(machine: Machine, vcpus: int) -> list[str]:
    """What the thread of each vCPU is called. Raises VmmError."""
    names = [""] * (vcpus - 1) + ["system"]
    for process in machine.program_maps()["processes"]:
        for thread in process["threads"]:
            if thread["vcpu"] is not None:
                names[thread["vcpu"]] = thread["name"]
    return names


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
        return "the tracking mode changed during the recording"
    if [(s["id"], s["born"], s["logged"]) for s in status["slots"]] != [(s.id, s.born, s.log) for s in slots]:
        return "memory slots were added or removed, or their logging switched, during the recording"
    return ""


def _take(queue: TraceQueue, writer: TraceWriter) -> int:
    taken = 0
    for time_ns, vcpu, entries in queue.records():
        writer.append(time_ns, vcpu, entries)
        taken += len(entries)
    return taken
