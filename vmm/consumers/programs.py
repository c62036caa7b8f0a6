"""Linux programs from outside: how fast each mapping and each thread dirties memory, and the system calls they make."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from typing import Any

from ipc.shm import PAGE_SIZE

from ..client.interrupts import sleep
from ..client.machine import Machine
from ..errors import VmmError
from .rate import check_time

__all__ = ["map_rates", "system_calls"]

_MIB = 1 << 20
_STEP = 0.1             # seconds between two looks at the calls

_numbers = itertools.count()


def map_rates(machine: Machine, seconds: float) -> dict[str, Any]:
    """``Machine.program_maps``, with what was dirtied in this time. Each mapping has ``dirty_pages``, distinct ones,
    and each thread ``dirty_pages`` too, entries of its vCPU, null where it has none now; both with ``pages_per_s`` and
    ``mib_per_s``. ``other_vcpus``: entries of those whose thread has ended, and of the ``system``; ``changed``: of
    another thread as well. Raises VmmError."""
    check_time(seconds, "--rate")
    before = {each["vcpu"]: each["tid"] for each in _threads(machine.program_maps())}
    client = f"maps_{os.getpid()}_{next(_numbers)}"
    machine.register(client, mine=True)
    try:
        old = machine.flush(client)
        time.sleep(seconds)
        new = machine.flush(client)
        found = machine.program_maps(client)
    finally:
        machine.unregister(client)
    took = new.at - old.at
    entries = [last - first for first, last in zip(old.vcpu_pages, new.vcpu_pages, strict=True)]
    for process in found["processes"]:
        for mapping in process["mappings"]:
            mapping |= _rates(mapping["dirty_pages"], took)
    for thread in _threads(found):
        vcpu = thread["vcpu"]
        thread["dirty_pages"] = None if vcpu is None else entries[vcpu]
        thread |= _rates(thread["dirty_pages"] or 0, took)
        thread["changed"] = before.get(vcpu, thread["tid"]) != thread["tid"]
    taken = {each["vcpu"] for each in _threads(found)}
    others = [{"vcpu": vcpu, "system": vcpu == len(entries) - 1, "dirty_pages": pages, **_rates(pages, took)}
              for vcpu, pages in enumerate(entries) if vcpu not in taken and (pages or vcpu == len(entries) - 1)]
    return {"seconds": took, **found, **_rates(found["dirty_pages"], took), "other_vcpus": others}


def _threads(maps: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (thread for process in maps["processes"] for thread in process["threads"])


def _rates(pages: int, seconds: float) -> dict[str, float]:
    return {"pages_per_s": pages / seconds, "mib_per_s": pages * PAGE_SIZE / _MIB / seconds}


def system_calls(machine: Machine, seconds: float | None = None, pid: int | None = None,
                 wait: Callable[[float], bool] = sleep) -> Generator[dict[str, Any], None, None]:
    """Calls as they are made (workers/linux/tracing.py), for this time or until the machine ends; of one process.
    ``{"lost": n}`` stands for calls that came too fast to be kept (None: nobody knows how many, for it has asked too
    late). ``wait``: so many seconds; True: that is enough. Raises VmmError."""
    tracer = uuid.uuid4().hex
    found = machine.program_trace(tracer)
    deadline = None if seconds is None else time.monotonic() + seconds
    try:
        over = False
        while not over:
            left = _STEP if deadline is None else min(_STEP, deadline - time.monotonic())
            over = left <= 0 or (not found["more"] and wait(left))
            try:
                found = machine.program_trace(tracer, found["next"], on=not over)
                over = over or (found["ended"] and not found["more"])
            except VmmError:
                if _has_ended(machine):
                    return
                raise
            if found["lost"] or found["stopped"]:
                yield {"lost": found["lost"] or None}
            for call in found["calls"]:
                if pid in (None, call["pid"]):
                    yield call
    finally:
        with contextlib.suppress(VmmError):
            machine.program_trace(tracer, on=False)


def _has_ended(machine: Machine) -> bool:
    try:
        return bool(machine.status()["state"] == "ended")
    except VmmError:
        return True
