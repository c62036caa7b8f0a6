"""How fast a guest dirties memory (QEMU's calc-dirty-rate, with its modes).

* ``ring``: entries of each vCPU's ring, the pages it was first to write since they were last re-protected; and
  the distinct pages of the machine, from a dirty-log client of the measurement's own. No other client notices.
* ``bitmap``: the distinct pages alone, from such a client. Works on machines without rings.
* ``sampling``: some pages are hashed before and after, as QEMU does by default: 512 per GiB, CRC-32. No dirty log.
"""

from __future__ import annotations

import itertools
import os
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from ipc.shm import PAGE_SIZE

from ..client.machine import Machine
from ..errors import VmmError

__all__ = ["MODES", "DirtyRate", "VcpuRate", "check_time", "measure"]

Mode = Literal["ring", "bitmap", "sampling"]
MODES: tuple[str, ...] = get_args(Mode)

_MIB = 1 << 20
_SHORTEST, _LONGEST = 0.05, 60.0        # seconds, QEMU's bounds
_SAMPLES_PER_GIB = 512                  # QEMU's default
_SAMPLES_MIN = 512                      # of a small machine, or all of its pages

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class VcpuRate:
    """One vCPU over the measured time."""

    index: int
    pages: int              # ring entries
    pages_per_s: float
    mib_per_s: float


@dataclass(frozen=True, slots=True)
class DirtyRate:
    """A measurement. ``repeated`` pages are ring entries of pages that had one already in this time."""

    mode: str
    seconds: float
    pages: int              # distinct pages dirtied (sampling: estimated)
    repeated: int           # ring mode only
    pages_per_s: float
    mib_per_s: float
    vcpus: list[VcpuRate]   # ring mode only

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_time(seconds: float, option: str = "--time") -> float:
    """Raises VmmError outside 50 ms to 60 s."""
    if not _SHORTEST <= seconds <= _LONGEST:
        raise VmmError(f"{option} {seconds:g} s: must be from {_SHORTEST * 1000:.0f} ms to {_LONGEST:.0f} s")
    return seconds


def measure(machine: Machine, seconds: float = 1.0, mode: Mode = "ring") -> DirtyRate:
    """Measure for ``seconds``. Raises VmmError for a mode that the machine does not have."""
    check_time(seconds)
    if mode == "sampling":
        return _sample(machine, seconds)
    before = machine.status()
    if mode == "ring" and before["tracking"] != "ring":
        raise VmmError(f"machine '{machine.name}' has tracking mode {before['tracking']}, but only dirty rings "
                       f"tell its vCPUs apart (run vmm tracking {machine.name} ring)")
    client = f"rate_{os.getpid()}_{next(_numbers)}"
    machine.register(client, mine=True)
    try:
        old = machine.flush(client)
        time.sleep(seconds)
        new = machine.flush(client)
        switches = machine.status()["tracking_switches"]
    finally:
        machine.unregister(client)
    took, distinct = new.at - old.at, sum(new.slots.values())
    vcpus = []
    if mode == "ring":
        if switches != before["tracking_switches"]:
            raise VmmError(f"machine '{machine.name}' changed its tracking mode during the measurement: try "
                           "again")
        for index, (first, last) in enumerate(zip(old.vcpu_pages, new.vcpu_pages, strict=True)):
            pages = last - first
            vcpus.append(VcpuRate(index, pages, pages / took, pages * PAGE_SIZE / _MIB / took))
    repeated = max(0, sum(v.pages for v in vcpus) - distinct) if vcpus else 0
    return _result(mode, took, distinct, repeated, vcpus)


def _result(mode: str, seconds: float, pages: int, repeated: int, vcpus: list[VcpuRate]) -> DirtyRate:
    return DirtyRate(mode, seconds, pages, repeated, pages / seconds, pages * PAGE_SIZE / _MIB / seconds, vcpus)


def _sample(machine: Machine, seconds: float) -> DirtyRate:
    random = np.random.default_rng()
    slots = machine.status()["slots"]
    total = sum(s["pages"] for s in slots)
    wanted = min(total, max(_SAMPLES_MIN, total * PAGE_SIZE * _SAMPLES_PER_GIB >> 30))
    chosen = np.sort(random.choice(total, wanted, replace=False))
    pages = []
    for slot, first in zip(slots, np.cumsum([0, *(s["pages"] for s in slots)]), strict=False):
        mine = chosen[(chosen >= first) & (chosen < first + slot["pages"])] - first
        memory = machine.ram(slot["id"]).reshape(-1, PAGE_SIZE)
        pages += [memory[page] for page in mine]
    began = time.monotonic()
    before = [zlib.crc32(page) for page in pages]
    time.sleep(seconds)
    changed = sum(zlib.crc32(page) != old for page, old in zip(pages, before, strict=True))
    return _result("sampling", time.monotonic() - began, round(changed * total / wanted), 0, [])
