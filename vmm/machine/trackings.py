"""Modes of dirty tracking, and whether this host has them.

``ring``: each vCPU's dirty ring. ``bitmap``: plain dirty bitmaps. ``uffd``: each worker's own page tables,
write-protected by userfaultfd (ipc/writelog.py). ``none``: no dirty log. ``auto`` chooses among them
(vmm/dirty/tracking/auto.py).
"""

from __future__ import annotations

from ipc.layout import Tracking
from workers.accel import registry

from ..errors import VmmError

__all__ = ["BITMAPS", "CHOICES", "MODES", "check_tracking", "is_supported", "not_logged"]

MODES = tuple(t.name.lower() for t in Tracking if t not in (Tracking.UNSET, Tracking.UNKNOWN))
CHOICES = (*MODES, "auto")
#: Modes that collect into a log buffer per vCPU and slot (vmm/dirty/tracking/bitmap.py).
BITMAPS = ("bitmap", "uffd")


def check_tracking(mode: str, accel: str, ring_entries: int) -> None:
    """Raises VmmError, with what to do, where this host or machine does not support that mode."""
    if mode not in CHOICES:
        raise VmmError(f"unknown tracking mode '{mode}' (choose from {', '.join(CHOICES)})")
    if mode not in (*registry.capabilities(accel).trackings, "auto"):
        raise VmmError(f"tracking {mode}: accel {accel} drives dirty rings and supports no other mode")
    if mode == "ring":
        if not ring_entries:
            raise VmmError("tracking ring: the machine has no dirty rings (dirty_ring_size is 0)")
        if not registry.available(accel).ring_max:
            raise VmmError("tracking ring: this kernel has no dirty rings (use bitmap, uffd or auto)")
    if mode == "uffd":
        from ipc.writelog import write_log_missing  # it brings numpy along

        missing = write_log_missing()
        if missing:
            raise VmmError(f"tracking uffd: {missing} (use ring, bitmap or auto)")


def is_supported(mode: str, accel: str, ring_entries: int) -> bool:
    """By this host and machine."""
    try:
        check_tracking(mode, accel, ring_entries)
    except VmmError:
        return False
    return True


def not_logged(name: str) -> VmmError:
    return VmmError(f"machine '{name}' has no dirty log (tracking none): start one with vmm tracking {name} auto")
