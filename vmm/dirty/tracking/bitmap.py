"""Plain dirty bitmaps, where there is no ring (seed: kvm_log_sync, kvm_log_clear, per slot).

Every shard has its own kernel bitmap. Per slot: get each shard's log into that shard's buffer, OR the
buffers into staging, re-protect in every shard what its buffer says, publish. A page's bit is
published only after it is protected again, as with rings (invariant 2); a coordinator that dies
between finds the pages still dirty in the kernel, or still in staging.

With tracking ``uffd`` a worker protects the pages while it gets them, and adds to what its buffer holds. Here a
buffer is cleared after it has gone to staging: a coordinator that dies before finds it in the buffer.
"""

from __future__ import annotations

from functools import partial

from ipc.messages import ClearLog, GetLog

from ...vcpus.pool import Shard, Shards
from ..log import DirtyLog

__all__ = ["gather_bitmaps"]


def gather_bitmaps(shards: Shards, log: DirtyLog, *, protected: bool = False) -> int:
    """Gather all logged slots of all shards; dirty pages, counted once a shard. ``protected``: to get a log has
    re-protected its pages already."""
    total = 0
    for slot_id, slot in log.slots.items():
        if not slot.logged:
            continue
        got = shards.request([s for s in shards.all if s.alive], partial(_get, slot_id))
        dirty = [s for s in shards.all if s.index in got and got[s.index].value]
        for shard in dirty:
            slot.staging[0].merge(slot.vcpu_logs[shard.index])
            if protected:
                slot.vcpu_logs[shard.index][:] = 0
            shard.control.dirty_pages += got[shard.index].value
            total += got[shard.index].value
        if not protected:
            shards.request(dirty, partial(_clear, slot_id))
    log.publish()
    return total


def _get(slot_id: int, seq: int, shard: Shard) -> GetLog:
    return GetLog(seq, slot_id)


def _clear(slot_id: int, seq: int, shard: Shard) -> ClearLog:
    return ClearLog(seq, slot_id)
