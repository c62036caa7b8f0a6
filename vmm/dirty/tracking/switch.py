"""From one way of dirty tracking to another, with every vCPU paused and nothing lost.

What the old way has gathered is drained into the slot bitmaps first; until the vCPUs go on, nobody dirties a page.
So a log that is dropped is empty, whichever workers have changed already. The journal names the new way before the
first worker is asked, and each worker's control block the one that it follows: a coordinator that dies in between
leaves vCPUs that stand still, and its successor asks those that are not there yet (:func:`fulfil`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from ipc.layout import Tracking
from ipc.messages import SetTracking
from ipc.steps import step

from ...coordinator.segments import Parts
from ...errors import VmmError
from ...machine.trackings import BITMAPS
from ...vcpus.pool import Shard, Shards
from ..reaper import Reaper

__all__ = ["fulfil", "switch", "unfinished"]


def switch(parts: Parts, shards: Shards, reaper: Reaper, mode: str, commit: Callable[[], None]) -> None:
    """``commit`` writes the journal. Raises VmmError and SegmentError, with everything as it was."""
    old = parts.tracking
    reaper.drain()
    step("tracking-drained")
    parts.need(mode)
    step("tracking-made")
    if old == "none" and parts.log.clients:
        parts.log.mark_logged_slots()   # what was dirtied without a log is not known
    step("tracking-marked")
    try:
        _go(parts, shards, reaper, mode, commit)
    except VmmError:
        try:
            _go(parts, shards, reaper, old, commit)
        except VmmError:
            for shard in _astray(parts, shards):
                shard.signal(signal.SIGKILL)    # its death is seen, and its pages are marked
        raise


def _go(parts: Parts, shards: Shards, reaper: Reaper, mode: str, commit: Callable[[], None]) -> None:
    parts.tracking = reaper.tracking = mode
    commit()
    step("tracking-committed")
    for shard in shards.all:
        shard.control.fetch_total = 0
    step("tracking-rewound")
    fulfil(parts, shards)
    step("tracking-set")
    reaper.full.clear()


def _astray(parts: Parts, shards: Shards) -> list[Shard]:
    wanted = Tracking[parts.tracking.upper()]
    return [s for s in shards.all if s.alive and s.control.tracking != wanted]


def unfinished(parts: Parts, shards: Shards) -> bool:
    """A coordinator died in the middle of a switch."""
    return bool(_astray(parts, shards))


def fulfil(parts: Parts, shards: Shards) -> None:
    """Have every worker follow the machine's way of tracking, and map the rings. The vCPUs are paused, and whoever
    follows another way has an empty log. Raises VmmError."""
    shards.request(_astray(parts, shards), lambda seq, shard: _request(parts, seq, shard))
    for shard in shards.all:
        shard.control.fetch_total = shard.control.reset_total   # 0, but where the worker had no need to change
        shard.use_ring(parts.ring_entries)
        if parts.ring_entries and not parts.spec.can.kernel_ring:
            shard.map_software_ring(parts.rings[shard.index])
    if parts.spec.can.kernel_ring:
        shards.adopt_fds([s for s in shards.all if s.alive])


def _request(parts: Parts, seq: int, shard: Shard) -> SetTracking:
    rings = parts.ring_entries > 0
    logs = ({i: slot.log_segment(shard.index) for i, slot in parts.log.slots.items()}
            if parts.tracking in BITMAPS else {})
    return SetTracking(seq, parts.tracking, parts.ring_entries,
                       parts.rings[shard.index].name if rings and parts.rings else "", logs)
