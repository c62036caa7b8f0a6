"""From one mode of dirty tracking to another, with every vCPU paused and nothing lost.

What the old mode has gathered is drained into the slot bitmaps first; until the vCPUs continue, no page is dirtied.
So a log that is dropped is empty, whichever workers have changed already. The journal names the new mode before the
first worker is asked, and each worker's control block the one that it follows: a coordinator that dies in between
leaves vCPUs that stand still, and its successor asks those that are not there yet (:func:`align_workers`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from ipc.layout import Tracking
from ipc.messages import SetTracking
from ipc.steps import step

from ...errors import VmmError
from ...vcpus.handle import VcpuHandle
from ...vcpus.pool import VcpuPool
from ..parts import Parts
from ..reaper import Reaper
from .base import TrackingMode
from .modes import tracking_mode

__all__ = ["align_workers", "switch", "unfinished"]


def switch(parts: Parts, vcpus: VcpuPool, reaper: Reaper, mode: str, commit: Callable[[], None]) -> None:
    """``commit`` writes the journal. Raises VmmError and SegmentError, with everything as it was."""
    old, new = tracking_mode(parts.tracking), tracking_mode(mode)
    reaper.drain()
    step("tracking-drained")
    new.need(parts, fresh=new is not old)
    step("tracking-made")
    if not parts.mode.logged and parts.log.clients:
        parts.log.mark_logged_slots()   # what was dirtied without a log is not known
    step("tracking-marked")
    try:
        _go(parts, vcpus, reaper, new, commit)
    except VmmError:
        try:
            _go(parts, vcpus, reaper, old, commit)
        except VmmError:
            for vcpu in _not_following(parts, vcpus):
                vcpu.signal(signal.SIGKILL)    # its death is seen, and its pages are marked
        raise


def _go(parts: Parts, vcpus: VcpuPool, reaper: Reaper, mode: TrackingMode, commit: Callable[[], None]) -> None:
    parts.mode = reaper.mode = mode
    commit()
    step("tracking-committed")
    for vcpu in vcpus.all:
        vcpu.control.fetch_total = 0
    step("tracking-rewound")
    align_workers(parts, vcpus)
    step("tracking-set")
    reaper.full.clear()


def _not_following(parts: Parts, vcpus: VcpuPool) -> list[VcpuHandle]:
    wanted = Tracking[parts.tracking.upper()]
    return [s for s in vcpus.all if s.alive and s.control.tracking != wanted]


def unfinished(parts: Parts, vcpus: VcpuPool) -> bool:
    """A coordinator died in the middle of a switch."""
    return bool(_not_following(parts, vcpus))


def align_workers(parts: Parts, vcpus: VcpuPool) -> None:
    """Have every worker follow the machine's mode of dirty tracking, and map the rings. The vCPUs are paused, and
    one that follows another mode has an empty log. Raises VmmError."""
    vcpus.request(_not_following(parts, vcpus), lambda seq, vcpu: _request(parts, seq, vcpu))
    for vcpu in vcpus.all:
        vcpu.control.fetch_total = vcpu.control.reset_total   # 0, but where the worker had no need to change
        vcpu.ring.use(parts.ring_entries)
    tracking_mode(parts.tracking).switch_in(parts, vcpus)
    if parts.spec.can.kernel_ring:
        vcpus.adopt_fds([v for v in vcpus.all if v.alive])


def _request(parts: Parts, seq: int, vcpu: VcpuHandle) -> SetTracking:
    ring, logs = tracking_mode(parts.tracking).segments(parts, vcpu)
    return SetTracking(seq, parts.tracking, parts.ring_entries, ring, logs)
