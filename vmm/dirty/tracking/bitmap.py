"""Plain dirty bitmaps, where there is no ring (seed: kvm_log_sync, kvm_log_clear, per slot).

Every vcpu has its own kernel bitmap. Per slot: get each vcpu's log into that vcpu's buffer, OR the
buffers into staging, re-protect in every vcpu what its buffer says, publish. A page's bit is
published only after it is protected again, as with rings (invariant 2); a coordinator that dies
between finds the pages still dirty in the kernel, or still in staging.

With tracking ``uffd`` a worker protects the pages while it gets them, and adds to what its buffer holds. Here a
buffer is cleared after it has gone to staging: a coordinator that dies before finds it in the buffer.
"""

from __future__ import annotations

from functools import partial

from ipc.messages import ClearLog, GetLog

from ...vcpus.handle import VcpuHandle
from ...vcpus.pool import VcpuPool
from ..log import DirtyLog

__all__ = ["gather_bitmaps"]


def gather_bitmaps(vcpus: VcpuPool, log: DirtyLog, *, protected: bool = False) -> int:
    """Gather all logged slots of all vcpus; dirty pages, counted once a vcpu. ``protected``: to get a log has
    re-protected its pages already."""
    total = 0
    for slot_id, slot in log.slots.items():
        if not slot.logged:
            continue
        got = vcpus.request([s for s in vcpus.all if s.alive], partial(_get, slot_id))
        dirty = [s for s in vcpus.all if s.index in got and got[s.index].value]
        for vcpu in dirty:
            slot.staging[0].merge(slot.vcpu_logs[vcpu.index])
            if protected:
                slot.vcpu_logs[vcpu.index][:] = 0
            vcpu.control.dirty_pages += got[vcpu.index].value
            total += got[vcpu.index].value
        if not protected:
            vcpus.request(dirty, partial(_clear, slot_id))
    log.publish()
    return total


def _get(slot_id: int, seq: int, vcpu: VcpuHandle) -> GetLog:
    return GetLog(seq, slot_id)


def _clear(slot_id: int, seq: int, vcpu: VcpuHandle) -> ClearLog:
    return ClearLog(seq, slot_id)
