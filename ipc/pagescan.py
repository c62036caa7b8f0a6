"""Which pages of a process were written, and protecting them again in the same step: the PAGEMAP_SCAN ioctl of
/proc/PID/pagemap, for mappings that a userfaultfd has registered for asynchronous write-protection.

Numbers are those of Linux ``uapi/linux/fs.h``; Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shm import PAGE_SIZE

__all__ = ["HUGE", "POPULATED", "WRITTEN", "WRITTEN_POPULATED", "PageScan", "Pages"]

_PAGEMAP_SCAN = 0xC0606610          # _IOWR('f', 16, struct pm_scan_arg)
_PM_SCAN_WP_MATCHING = 1            # protect what is reported, in the same step
_PM_SCAN_CHECK_WPASYNC = 2          # fail where a mapping is not registered
_WRITTEN, _PRESENT, _SWAPPED, _PFNZERO, _HUGE = 2, 8, 16, 32, 64
_REGIONS = 1 << 14                  # reported by one call
_GAP = 4096                         # pages between two written ones that one call still walks


class Pages(NamedTuple):
    """Which pages are meant: those that have all of ``mask`` and one of ``some``; ``inverted``: of these, those that
    they must not have."""

    mask: int
    inverted: int = 0
    some: int = 0


#: Where holes carry the protection as well.
WRITTEN = Pages(_WRITTEN)
#: Where they do not (anonymous memory): a hole is not written, nor is one that was only read (the zero page).
WRITTEN_POPULATED = Pages(_WRITTEN | _PFNZERO, _PFNZERO, _PRESENT | _SWAPPED)
#: Whatever has content of its own, written or not.
POPULATED = Pages(_PFNZERO, _PFNZERO, _PRESENT | _SWAPPED)
#: Parts of huge pages.
HUGE = Pages(_HUGE)


class _ScanArg(ctypes.Structure):
    """``struct pm_scan_arg``"""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages", "category_inverted",
        "category_mask", "category_anyof_mask", "return_mask")]


assert ctypes.sizeof(_ScanArg) == 96


class PageScan:
    """Of one process."""

    def __init__(self, pid: int | None = None) -> None:
        """None: this process. Raises OSError."""
        self.path = f"/proc/{'self' if pid is None else pid}/pagemap"
        self._pagemap = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        #: ``struct page_region``: start, end (addresses), categories.
        self._regions: NDArray[np.uint64] = np.zeros((_REGIONS, 3), np.uint64)

    def protect(self, start: int, end: int, what: Pages = WRITTEN) -> None:
        """From now on none of the pages there that are meant counts as written. Raises OSError."""
        while start < end:
            _, start = self._scan(start, end, what, _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC)

    def take(self, start: int, end: int, what: Pages = WRITTEN) -> Iterator[NDArray[np.uint64]]:
        """Protect the written pages there again, and report them: ascending regions [first, end), uint64[n, 2] of
        addresses, in parts. Raises OSError (EPERM: a mapping there is not registered; ESRCH: the process has gone).

        Protecting drops the mappings that a guest has (MMU notifiers) of the whole range that the call is told to
        walk, written or not. So a first walk, which changes nothing, finds where to call. What is written between the
        two is in the second or left for the next time, never lost: the second reports what it protects."""
        while start < end:
            regions, start = self._scan(start, end, what, _PM_SCAN_CHECK_WPASYNC)
            if len(regions) == 0:
                continue
            far = np.flatnonzero(regions[1:, 0] - regions[:-1, 1] > _GAP * PAGE_SIZE)
            firsts = regions[np.concatenate(([0], far + 1)), 0].tolist()
            lasts = regions[np.concatenate((far, [len(regions) - 1])), 1].tolist()
            for first, last in zip(firsts, lasts, strict=True):
                while first < last:
                    found, first = self._scan(first, last, what, _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC)
                    yield found

    def find(self, start: int, end: int, what: Pages) -> Iterator[NDArray[np.uint64]]:
        """Regions of such pages, as ``take`` has them; nothing is protected, or need be registered. Raises OSError."""
        while start < end:
            regions, start = self._scan(start, end, what, 0)
            yield regions

    def _scan(self, start: int, end: int, what: Pages, flags: int) -> tuple[NDArray[np.uint64], int]:
        """The regions, a copy; and the address that the walk came to."""
        argument = _ScanArg(
            size=96, flags=flags, start=start, end=end, vec=self._regions.ctypes.data, vec_len=_REGIONS,
            category_mask=what.mask, category_inverted=what.inverted, category_anyof_mask=what.some,
            return_mask=_WRITTEN)
        while True:
            try:
                count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
                break
            except InterruptedError:
                continue
        return self._regions[:count, :2].copy(), int(argument.walk_end)

    def close(self) -> None:
        """Idempotent."""
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1
