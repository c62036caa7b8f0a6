"""Huge pages: the first write to a protected one splits it, and it stays so. What was huge before is made so again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from ipc.linux.foreign import collapse
from ipc.linux.processid import ProcessId, open_process
from ipc.pagescan import HUGE, PageScan

from ...errors import VmmError

__all__ = ["collapse_again", "huge_pages"]

HUGE_SIZE = 2 << 20


def huge_pages(pid: int, ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Addresses of the huge pages in these ranges of a process. Raises OSError."""
    scan = PageScan(pid)
    try:
        return {address for start, end in ranges for regions in scan.find(start, end, HUGE)
                for first, last in regions.tolist()
                for address in range(-(-first // HUGE_SIZE) * HUGE_SIZE, last - HUGE_SIZE + 1, HUGE_SIZE)}
    finally:
        scan.close()


def collapse_again(process: ProcessId, before: set[int]) -> tuple[int, int]:
    """Have the kernel make huge pages of those that are none any more: (how many were not, how many are again). It
    copies each of them, which takes some 0.3 ms, and the process's threads wait where they touch it meanwhile. (0, 0)
    when the process has ended. Raises VmmError where this user may not."""
    if not before:
        return 0, 0
    try:
        pidfd = open_process(process)
    except OSError:
        return 0, 0
    try:
        split = before - huge_pages(process.pid, ((a, a + HUGE_SIZE) for a in before))
        return len(split), sum(_collapsed(pidfd, address) for address in sorted(split))
    except FileNotFoundError:
        return 0, 0
    finally:
        os.close(pidfd)


def _collapsed(pidfd: int, address: int) -> bool:
    try:
        collapse(pidfd, address, HUGE_SIZE)
    except OSError as exc:
        if exc.errno == errno.EPERM:
            raise VmmError("--collapse: needs root or CAP_SYS_NICE") from None
        return False
    return True
