"""Which pages of a mapping this process has written: userfaultfd's asynchronous write-protection, read with the
PAGEMAP_SCAN ioctl (ipc/pagescan.py).

Protection lies in the page tables of the process that asked for it. So of several processes over one shared
memory each logs its own writes alone, those of its vCPU among them: where the host's entry is protected, KVM's
is as well (MMU notifiers), and KVM's fault ends in the host's.

A page table entry that is not there can carry the protection too (a marker, since shared memory may be thrown out
of the table at any time): so neither holes nor pages not touched yet have to be made present first, and they do
not count as written.
"""

from __future__ import annotations

import ctypes
import mmap
import platform

import numpy as np
from numpy.typing import NDArray

from .bitmap import set_bits
from .pagescan import PageScan
from .shm import PAGE_SIZE
from .userfault import WRITE_ASYNC, Userfault, UserfaultError

__all__ = ["WriteLog", "watching_missing", "write_log_missing"]

_FEW = 24                           # regions that are quicker marked one by one


class WriteLog:
    """Of this process. ``watch`` mappings, ``collect`` from them what was written since they were collected last
    (or watched)."""

    def __init__(self) -> None:
        """Raises UserfaultError."""
        self._userfault = Userfault.make(WRITE_ASYNC)
        try:
            self._scan = PageScan()
        except OSError as exc:
            self._userfault.close()
            raise UserfaultError(f"/proc/self/pagemap: {exc.strerror}") from None

    def watch(self, address: int, size: int) -> None:
        """Log writes to this mapping from now on. Raises UserfaultError."""
        self._userfault.register(address, size)
        try:
            self._scan.protect(address, address + size)
        except OSError as exc:
            raise _failed(exc) from None

    def forget(self, address: int, size: int) -> None:
        """Log no more. Raises UserfaultError."""
        self._userfault.unregister(address, size)

    def collect(self, address: int, pages: int, words: NDArray[np.uint64]) -> None:
        """Protect the written pages of the mapping again, and set their bits in ``words`` (uint64, one bit a
        page); bits that are set stay. Raises UserfaultError."""
        try:
            for found in self._scan.take(address, address + pages * PAGE_SIZE):
                _mark(words, (found - np.uint64(address)) // np.uint64(PAGE_SIZE))
        except OSError as exc:
            raise _failed(exc) from None

    def close(self) -> None:
        """Idempotent. The mappings are ordinary ones again."""
        self._userfault.close()
        self._scan.close()


def _failed(exc: OSError) -> UserfaultError:
    return UserfaultError(f"PAGEMAP_SCAN: {exc.strerror}")


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


def watching_missing() -> str:
    """Why this host has none of other processes (vmm/consumers/watch/); empty when it has. By trying it on this
    one."""
    if platform.machine() != "x86_64":
        return f"watching another process needs x86-64, not {platform.machine()}"
    return write_log_missing()
