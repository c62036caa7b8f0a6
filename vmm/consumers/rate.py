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

from ipc.bitmap import set_bit_indices
from ipc.shm import PAGE_SIZE

from ..client.machine import Flushed, Machine
from ..errors import VmmError

__all__ = ["MODES", "SAMPLES_PER_GIB", "DirtyRate", "Mode", "VcpuRate", "best_mode", "check_time", "measure"]

Mode = Literal["ring", "bitmap", "sampling"]
MODES: tuple[str, ...] = get_args(Mode)

_MIB = 1 << 20
_SHORTEST, _LONGEST = 0.05, 60.0        # seconds, QEMU's bounds
SAMPLES_PER_GIB = 512                   # QEMU's default
_PART = 4096                            # pages that are compared at once
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
    unchanged: int | None = None    # of ``pages``, those whose content was what it had been; None: not asked for

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_time(seconds: float, option: str = "--time") -> float:
    """Raises VmmError outside 50 ms to 60 s."""
    if not _SHORTEST <= seconds <= _LONGEST:
        raise VmmError(f"{option} {seconds:g} s: must be from {_SHORTEST * 1000:.0f} ms to {_LONGEST:.0f} s")
    return seconds


def best_mode(machine: Machine) -> Mode:
    """The one that says most of this machine as it is now. Raises VmmError."""
    status = machine.status()
    if status["tracking"] == "ring":
        return "ring"
    return "bitmap" if status["tracking"] != "none" or status["tracking_asked"] == "auto" else "sampling"


def measure(machine: Machine, seconds: float = 1.0, mode: Mode = "ring", *, unchanged: bool = False,
            samples_per_gib: int = SAMPLES_PER_GIB) -> DirtyRate:
    """Measure for ``seconds``. ``unchanged``: and compare the content of dirtied pages: the guest stands still while
    its memory is copied, and compared. ``samples_per_gib``: pages that ``sampling`` looks at. Raises VmmError for a
    mode that the machine does not have."""
    check_time(seconds)
    if mode == "sampling":
        if unchanged:
            raise VmmError("--unchanged: sampling does not know which pages were dirtied")
        return _sample(machine, seconds, samples_per_gib)
    before = machine.status()
    if mode == "ring" and before["tracking"] != "ring":
        raise VmmError(f"machine '{machine.name}' has tracking mode {before['tracking']}, but only dirty rings "
                       f"tell its vCPUs apart (run vmm tracking {machine.name} ring)")
    client = f"rate_{os.getpid()}_{next(_numbers)}"
    machine.register(client, mine=True)
    try:
        if unchanged:
            old, new, took, same = _compare(machine, client, seconds)
        else:
            old, same = machine.flush(client), None
            time.sleep(seconds)
            new = machine.flush(client)
            took = new.at - old.at
        switches = machine.status()["tracking_switches"]
    finally:
        machine.unregister(client)
    distinct = sum(new.slots.values())
    vcpus = []
    if mode == "ring":
        if switches != before["tracking_switches"]:
            raise VmmError(f"machine '{machine.name}' changed its tracking mode during the measurement: try "
                           "again")
        for index, (first, last) in enumerate(zip(old.vcpu_pages, new.vcpu_pages, strict=True)):
            pages = last - first
            vcpus.append(VcpuRate(index, pages, pages / took, pages * PAGE_SIZE / _MIB / took))
    repeated = max(0, sum(v.pages for v in vcpus) - distinct) if vcpus else 0
    return _result(mode, took, distinct, repeated, vcpus, same)


def _compare(machine: Machine, client: str, seconds: float) -> tuple[Flushed, Flushed, float, int]:
    """What was flushed at the beginning and at the end, seconds between the two in which the guest ran, and how many
    pages had the same content at both."""
    with machine.paused("dirty-rate"):
        old = machine.flush(client)
        before = {slot: machine.ram(slot) for slot in old.slots}
        copies = {slot: memory.copy() for slot, memory in before.items()}
    began = time.monotonic()
    time.sleep(seconds)
    took, same = time.monotonic() - began, 0
    with machine.paused("dirty-rate"):
        new = machine.flush(client)
        for slot, copy in copies.items():
            if new.slots.get(slot):     # what was plugged in since has no content from before
                pages = set_bit_indices(machine.bitmap(slot, client).words)
                for at in range(0, len(pages), _PART):
                    part = pages[at:at + _PART]
                    now, then = (memory.reshape(-1, PAGE_SIZE)[part] for memory in (before[slot], copy))
                    same += int((now == then).all(axis=1).sum())
    return old, new, took, same


def _result(mode: str, seconds: float, pages: int, repeated: int, vcpus: list[VcpuRate],
            unchanged: int | None = None) -> DirtyRate:
    return DirtyRate(mode, seconds, pages, repeated, pages / seconds, pages * PAGE_SIZE / _MIB / seconds, vcpus,
                     unchanged)


def _sample(machine: Machine, seconds: float, samples_per_gib: int) -> DirtyRate:
    random = np.random.default_rng()
    slots = machine.status()["slots"]
    total = sum(s["pages"] for s in slots)
    wanted = min(total, max(_SAMPLES_MIN, total * PAGE_SIZE * samples_per_gib >> 30))
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
