"""``vmm watch --sample``: an estimate from some pages, whose checksums are compared. The process is read and nothing
else (process_vm_readv(2)): no thread of it stops, nothing is protected.

Of N pages that have content, n are drawn by chance; k of them have changed within an interval. So about N k/n pages
have, with the standard error N sqrt(p (1 - p) / n) sqrt((N - n) / (N - 1)) where p = k/n (if none or all have, as if
half a page more had or had not). Beyond that error, two things are not seen: a page that was written and has the
content that it had, and one that got its first content within the interval."""

from __future__ import annotations

import errno
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.linux.foreign import Mapping, mappings, read_pages
from ipc.linux.processid import ProcessId, identity
from ipc.pagescan import POPULATED, PageScan
from ipc.shm import PAGE_SIZE

from ...errors import VmmError
from .blocks import Block
from .watcher import Ended

__all__ = ["PAGES", "Estimate", "Sampler", "error_of"]

PAGES = 2048            # that are drawn, if nothing else is said
_KEPT = 10              # intervals for which they are the same
_MIB = 1 << 20
_ENTRIES = 1 << 20      # of pagemap that are read at once
_SWAPPED_BIT = np.uint64(62)    # of an entry, swapped; the next one is present


@dataclass(frozen=True)
class AreaEstimate:
    """Of one mapping."""

    name: str
    address: int
    size: int           # bytes
    sampled: int        # pages of it that were drawn
    pages: float        # changed, about


@dataclass(frozen=True)
class Estimate:
    """Of one interval."""

    at: float           # time.monotonic() at its end
    seconds: float
    population: int     # pages that have content
    sampled: int        # of which so many were drawn
    changed: int        # of which so many changed
    pages: float        # that changed, of all: about
    error: float        # standard error of ``pages``
    pages_per_s: float
    mib_per_s: float
    areas: list[AreaEstimate]   # the most changed first

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def error_of(population: int, sampled: int, changed: int) -> float:
    """The standard error of the estimate, in pages."""
    if sampled >= population:
        return 0.0
    share = min(max(changed, 0.5), sampled - 0.5) / sampled
    return population * math.sqrt(share * (1 - share) / sampled * (population - sampled) / (population - 1))


class Sampler:
    """Of one process. Raises VmmError and Ended."""

    def __init__(self, process: ProcessId, choose: Callable[[Iterable[Mapping]], list[Block]], pages: int = PAGES,
                 seed: int | None = None) -> None:
        """Draws ``pages`` pages; the first interval begins. Raises VmmError where there are none, and Ended."""
        self._process, self._choose, self._wanted = process, choose, pages
        self._chance = np.random.default_rng(seed)
        self._turns = 0
        self._draw()
        if not self._population:
            raise VmmError(f"process {process.pid} has no memory that could be sampled")

    def collect(self) -> Estimate:
        """Of the time since the last one. Raises Ended."""
        began, before = self._at, self._sums
        self._read()
        changed: NDArray[np.bool_] = self._sums != before
        found = self._estimate(changed, self._at - began)
        self._turns += 1
        if self._turns % _KEPT == 0:
            self._draw()
        return found

    def _draw(self) -> None:
        try:
            self._blocks = self._choose(mappings(self._process.pid))
            regions = [_populated(self._process.pid, b) for b in self._blocks]
        except OSError:
            raise Ended(f"process {self._process.pid} has ended") from None
        counts = np.concatenate([np.zeros(0, np.int64), *((r[:, 1] - r[:, 0]) // PAGE_SIZE for r in regions)])
        starts = np.concatenate([np.zeros(0, np.int64), *(r[:, 0] for r in regions)])
        ends = np.cumsum(counts)
        self._population = int(ends[-1]) if len(ends) else 0
        count = min(self._wanted, self._population)
        chosen = np.sort(self._chance.choice(self._population, count, replace=False)) if count else np.zeros(0, int)
        at = np.searchsorted(ends, chosen, side="right")
        self._addresses: NDArray[np.int64] = starts[at] + (chosen - (ends[at] - counts[at])) * PAGE_SIZE
        self._read()

    def _read(self) -> None:
        self._at = time.monotonic()
        try:
            if identity(self._process.pid) != self._process:
                raise ProcessLookupError
            # A page that cannot be read any more has no content: that is a change.
            self._sums = np.array([-1 if page is None else zlib.crc32(page) for _, page in
                                   read_pages(self._process.pid, self._addresses.tolist(), PAGE_SIZE)], np.int64)
        except PermissionError:
            raise VmmError(f"process {self._process.pid} is not this user's to read (needs root or CAP_SYS_PTRACE; "
                           "sysctl kernel.yama.ptrace_scope may forbid it)") from None
        except OSError:
            raise Ended(f"process {self._process.pid} has ended") from None

    def _estimate(self, changed: NDArray[np.bool_], seconds: float) -> Estimate:
        sampled, count, population = len(changed), int(changed.sum()), self._population
        scale = population / max(1, sampled)
        areas = []
        for block in self._blocks:
            mine = (self._addresses >= block.start) & (self._addresses < block.end)
            if hit := int(changed[mine].sum()):
                areas.append(AreaEstimate(block.name, block.start, block.size, int(mine.sum()), hit * scale))
        pages = count * scale
        return Estimate(self._at, seconds, population, sampled, count, pages, error_of(population, sampled, count),
                        pages / seconds, pages * PAGE_SIZE / _MIB / seconds, sorted(areas, key=lambda a: -a.pages))

    def close(self) -> None:
        """There is nothing to undo."""


def _populated(pid: int, block: Block) -> NDArray[np.int64]:
    """Regions of addresses that have content, int64[n, 2]. Raises OSError."""
    scan = PageScan(pid)
    try:
        found = [r.astype(np.int64) for r in scan.find(block.start, block.end, POPULATED)]
        return np.concatenate([np.zeros((0, 2), np.int64), *found])
    except OSError as exc:
        if exc.errno != errno.ENOTTY:
            raise
        return _by_entries(pid, block)      # a kernel without PAGEMAP_SCAN
    finally:
        scan.close()


def _by_entries(pid: int, block: Block) -> NDArray[np.int64]:
    """The same, one page each, by the entries of pagemap; zero pages among them. Raises OSError."""
    parts = [np.zeros(0, np.int64)]
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start in range(block.start, block.end, _ENTRIES * PAGE_SIZE):
            count = min(_ENTRIES, (block.end - start) // PAGE_SIZE)
            data = os.pread(pagemap.fileno(), 8 * count, start // PAGE_SIZE * 8)
            parts.append(start + np.flatnonzero(np.frombuffer(data, np.uint64) >> _SWAPPED_BIT) * PAGE_SIZE)
    found = np.concatenate(parts)
    return np.stack([found, found + PAGE_SIZE], axis=1)
