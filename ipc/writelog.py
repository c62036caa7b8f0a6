"""Which pages of a mapping this process has written: userfaultfd's asynchronous write-protection, read with the
PAGEMAP_SCAN ioctl.

Protection lies in the page tables of the process that asked for it. So of several processes over one shared
memory each logs its own writes alone, those of its vCPU among them: where the host's entry is protected, KVM's
is as well (MMU notifiers), and KVM's fault ends in the host's.

A page table entry that is not there can carry the protection too (a marker, since shared memory may be thrown out
of the table at any time): so neither holes nor pages not touched yet have to be made present first, and they do
not count as written. Numbers are those of Linux ``uapi/linux/fs.h``; Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from .bitmap import set_bits
from .shm import PAGE_SIZE
from .userfault import WRITE_ASYNC, Userfault, UserfaultError

__all__ = ["WriteLog", "write_log_missing"]

_PAGEMAP_SCAN = 0xC0606610          # _IOWR('f', 16, struct pm_scan_arg)
_PM_SCAN_WP_MATCHING = 1            # protect what is reported, in the same step
_PM_SCAN_CHECK_WPASYNC = 2          # fail where a mapping is not registered
_PAGE_IS_WRITTEN = 2
_REGIONS = 1 << 14                  # reported by one call
_GAP = 4096                         # pages between two written ones that one call still walks
_FEW = 24                           # regions that are quicker marked one by one


class _ScanArg(ctypes.Structure):
    """``struct pm_scan_arg``"""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages", "category_inverted",
        "category_mask", "category_anyof_mask", "return_mask")]


assert ctypes.sizeof(_ScanArg) == 96


class WriteLog:
    """Of this process. ``watch`` mappings, ``collect`` from them what was written since they were collected last
    (or watched)."""

    def __init__(self) -> None:
        """Raises UserfaultError."""
        self._userfault = Userfault.make(WRITE_ASYNC)
        try:
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            self._userfault.close()
            raise UserfaultError(f"/proc/self/pagemap: {exc.strerror}") from None
        #: ``struct page_region``: start, end (addresses), categories.
        self._regions: NDArray[np.uint64] = np.zeros((_REGIONS, 3), np.uint64)

    def watch(self, address: int, size: int) -> None:
        """Log writes to this mapping from now on. Raises UserfaultError."""
        self._userfault.register(address, size)
        at, end = address, address + size
        while at < end:
            _, at = self._scan(at, end, protect=True)

    def forget(self, address: int, size: int) -> None:
        """Log no more. Raises UserfaultError."""
        self._userfault.unregister(address, size)

    def collect(self, address: int, pages: int, words: NDArray[np.uint64]) -> None:
        """Protect the written pages of the mapping again, and set their bits in ``words`` (uint64, one bit a
        page); bits that are set stay. Raises UserfaultError.

        Protecting drops the guest's mappings of the whole range that the call is told to walk, written or not.
        So a first walk, which changes nothing, finds where to call. What is written between the two is in the
        second or left for the next time, never lost: the second reports what it protects."""
        end = address + pages * PAGE_SIZE
        at = address
        while at < end:
            regions, at = self._scan(at, end, protect=False)
            if len(regions) == 0:
                continue
            far = np.flatnonzero(regions[1:, 0] - regions[:-1, 1] > _GAP * PAGE_SIZE)
            firsts = regions[np.concatenate(([0], far + 1)), 0].tolist()
            lasts = regions[np.concatenate((far, [len(regions) - 1])), 1].tolist()
            for first, last in zip(firsts, lasts, strict=True):
                while first < last:
                    found, first = self._scan(first, last, protect=True)
                    _mark(words, (found - np.uint64(address)) // np.uint64(PAGE_SIZE))

    def _scan(self, start: int, end: int, *, protect: bool) -> tuple[NDArray[np.uint64], int]:
        """Written regions [start, end) within these addresses, uint64[n, 2], a view of what the next call will
        overwrite unless it is a copy; and the address that the walk came to."""
        argument = _ScanArg(
            size=96, flags=_PM_SCAN_CHECK_WPASYNC | (_PM_SCAN_WP_MATCHING if protect else 0), start=start, end=end,
            vec=self._regions.ctypes.data, vec_len=_REGIONS, category_mask=_PAGE_IS_WRITTEN,
            return_mask=_PAGE_IS_WRITTEN)
        while True:
            try:
                count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
                break
            except InterruptedError:
                continue
            except OSError as exc:
                raise UserfaultError(f"PAGEMAP_SCAN: {exc.strerror}") from None
        return self._regions[:count, :2].copy(), int(argument.walk_end)

    def close(self) -> None:
        """Idempotent. The mappings are ordinary ones again."""
        self._userfault.close()
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1


def _mark(words: NDArray[np.uint64], regions: NDArray[np.uint64]) -> None:
    """Set the bits of disjoint page ranges [first, end), ascending, uint64[n, 2]."""
    if len(regions) <= _FEW:
        for first, end in regions.tolist():
            set_bits(words, first, end - 1)
        return
    ranges = regions.astype(np.int64)
    base = int(ranges[0, 0]) // 64
    count = -(-int(ranges[-1, 1]) // 64) - base
    steps = np.zeros(count * 64 + 1, np.int8)
    steps[ranges[:, 0] - base * 64] += 1
    steps[ranges[:, 1] - base * 64] -= 1
    bits = np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_)
    words[base:base + count] |= np.packbits(bits, bitorder="little").view(np.uint64)


def write_log_missing() -> str:
    """Why this host has no such log; empty when it has. By trying it on a page."""
    try:
        log = WriteLog()
    except UserfaultError as exc:
        return str(exc)
    page = mmap.mmap(-1, PAGE_SIZE, mmap.MAP_SHARED)
    anchor = ctypes.c_char.from_buffer(page)
    try:
        log.watch(ctypes.addressof(anchor), PAGE_SIZE)
        return ""
    except UserfaultError as exc:
        return str(exc)
    finally:
        log.close()
        del anchor
        page.close()
