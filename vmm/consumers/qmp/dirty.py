"""Dirty rate and dirty limit, in QEMU's units: MiB per second, whole ones."""

from __future__ import annotations

import threading
import time
from typing import Annotated, Any, Literal

import msgspec

from ipc.shm import PAGE_SIZE

from ...client.machine import Machine
from ...errors import VmmError
from ..rate import SAMPLES_PER_GIB, DirtyRate, measure
from .arguments import Arguments, Count
from .wire import QmpError

__all__ = ["Calc", "Limit", "Rates", "Unlimit", "limit", "limits", "unlimit"]

_PER_MIB = (1 << 20) // PAGE_SIZE   # pages
_CURRENT_S = 0.25           # in which the current rates of limited vCPUs are measured

_MODES: dict[str, Literal["ring", "bitmap", "sampling"]] = {
    "page-sampling": "sampling", "dirty-ring": "ring", "dirty-bitmap": "bitmap"}


class Calc(Arguments):
    """Of calc-dirty-rate."""

    calc_time: Annotated[int, msgspec.Meta(ge=1, le=60)]        # seconds
    sample_pages: Annotated[int, msgspec.Meta(ge=128, le=16384)] = SAMPLES_PER_GIB     # per GiB
    mode: Literal["page-sampling", "dirty-ring", "dirty-bitmap"] = "page-sampling"


class Rates:
    """The last measurement of a machine's dirty rate, or the one that is under way, by a thread and a connection of its
    own."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._asked = Calc(calc_time=1)
        self._started = 0
        self._found: DirtyRate | None = None
        self._thread: threading.Thread | None = None

    def calc(self, machine: Machine, asked: Calc) -> dict[str, Any]:
        """Begin. Raises QmpError for a mode that the machine does not have, and while one is under way; VmmError."""
        if self._measuring:
            raise QmpError("the dirty rate is being measured already (query-dirty-rate)")
        tracking = machine.status()["tracking"]
        if asked.mode == "dirty-ring" and tracking != "ring":
            raise QmpError(f"mode dirty-ring needs dirty rings, and the machine's tracking mode is {tracking}")
        self._asked, self._started, self._found = asked, int(time.monotonic()), None
        self._thread = threading.Thread(target=self._measure, args=(machine.another(),), name="dirty-rate", daemon=True)
        self._thread.start()
        return {}

    @property
    def _measuring(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _measure(self, machine: Machine) -> None:
        asked = self._asked
        try:
            self._found = measure(machine, asked.calc_time, _MODES[asked.mode], samples_per_gib=asked.sample_pages)
        except VmmError:
            pass        # it has ended, or is no longer tracked so: there is no rate
        finally:
            machine.detach()

    def query(self) -> dict[str, Any]:
        """How it is, and the rates once they are known."""
        found, asked = self._found, self._asked
        status = "measuring" if self._measuring else "unstarted" if found is None else "measured"
        answer: dict[str, Any] = {"status": status, "start-time": self._started, "mode": asked.mode,
                                  "calc-time": asked.calc_time if self._started else 0,
                                  "sample-pages": asked.sample_pages}
        if found is None or status != "measured":
            return answer
        answer["dirty-rate"] = round(found.mib_per_s)
        if asked.mode == "dirty-ring":      # as QEMU: the sum of what the vCPUs' rings say
            answer["dirty-rate"] = round(sum(vcpu.mib_per_s for vcpu in found.vcpus))
            answer["vcpu-dirty-rate"] = [{"id": v.index, "dirty-rate": round(v.mib_per_s)} for v in found.vcpus]
        return answer


class Unlimit(Arguments):
    """Of cancel-vcpu-dirty-limit."""

    cpu_index: Count | None = None      # every vCPU


class Limit(Arguments):
    """Of set-vcpu-dirty-limit; 0 lifts it."""

    dirty_rate: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]     # MiB per second
    cpu_index: Count | None = None


def limit(machine: Machine, asked: Limit) -> dict[str, Any]:
    """Raises VmmError."""
    machine.dirty_limit(asked.dirty_rate * _PER_MIB, asked.cpu_index)
    return {}


def unlimit(machine: Machine, asked: Unlimit) -> dict[str, Any]:
    """Raises VmmError."""
    machine.dirty_limit(0, asked.cpu_index)
    return {}


def limits(machine: Machine) -> list[dict[str, Any]]:
    """Those vCPUs that are limited, and how fast they are now, which takes a moment to see. Raises VmmError."""
    limited = {vcpu["index"]: vcpu["dirty_limit_pages_per_s"] for vcpu in machine.status()["vcpus"]
               if vcpu["dirty_limit_pages_per_s"]}
    if not limited:
        return []
    rates = {vcpu.index: vcpu.mib_per_s for vcpu in measure(machine, _CURRENT_S, "ring").vcpus}
    return [{"cpu-index": index, "limit-rate": max(1, round(pages / _PER_MIB)),
             "current-rate": round(rates.get(index, 0.0))} for index, pages in limited.items()]
