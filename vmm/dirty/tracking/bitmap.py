"""Tracking ``bitmap``: plain dirty bitmaps, where there is no ring (QEMU: kvm_log_sync, kvm_log_clear, per slot).

Every vCPU has its own kernel bitmap. Per slot: get each vCPU's log into that vCPU's buffer, OR the
buffers into staging, re-protect in every vCPU what its buffer says, publish. A page's bit is
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
from ..parts import Parts
from ..reaper import Reaper

__all__ = ["Bitmap", "gather_bitmaps"]


class Bitmap:
    """A plain dirty bitmap of each vCPU and slot."""

    name = "bitmap"
    rings, logs, logged = False, True, True
    #: To get a log has re-protected its pages already.
    _protected = False

    def need(self, parts: Parts, *, fresh: bool) -> None:
        """A log buffer for each vCPU and slot."""
        for slot in parts.log.slots.values():
            slot.need_vcpu_logs(parts.spec.vcpus)
            if fresh:
                for words in slot.vcpu_logs:
                    words[:] = 0

    def gather(self, reaper: Reaper) -> int:
        return gather_bitmaps(reaper.vcpus, reaper.log, protected=self._protected)

    def drain(self, reaper: Reaper) -> int:
        return self.gather(reaper)

    def switch_in(self, parts: Parts, vcpus: VcpuPool) -> None:
        """The buffers are there already."""

    def segments(self, parts: Parts, vcpu: VcpuHandle) -> tuple[str, dict[int, str]]:
        return "", {i: slot.log_segment(vcpu.index) for i, slot in parts.log.slots.items()}


def gather_bitmaps(vcpus: VcpuPool, log: DirtyLog, *, protected: bool = False) -> int:
    """Gather all logged slots of all vCPUs; dirty pages, counted once per vCPU. ``protected``: to get a log has
    re-protected its pages already."""
    total = 0
    for slot_id, slot in log.slots.items():
        if not log.logs(slot):
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
