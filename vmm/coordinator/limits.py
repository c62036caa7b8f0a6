"""The dirty limit: how many pages a second a vCPU may dirty (workers/throttle.py holds it to that)."""

from __future__ import annotations

from ..errors import VmmError
from .core import Core
from .tracking import TrackingSwitch

__all__ = ["set_limit"]


def set_limit(core: Core, tracking: TrackingSwitch, pages_per_s: int, vcpu: int) -> None:
    """Of one vCPU, or (-1) of each; 0 lifts the limit. Raises VmmError."""
    core.require_not_ended()
    if pages_per_s and core.spec.ring_entries:  # auto: to a ring
        tracking.choose(limited=True)
    if pages_per_s and not core.parts.ring_entries:
        raise VmmError(f"a dirty limit needs dirty rings: this machine has tracking {core.parts.tracking}")
    if not -1 <= vcpu < len(core.shards.all):
        raise VmmError(f"there is no vCPU {vcpu} (there are 0 to {len(core.shards.all) - 1})")
    for shard in core.shards.all:
        if vcpu in (-1, shard.index):
            shard.control.dirty_quota = pages_per_s
            if shard.running:
                shard.kick()    # out of the guest, or out of its wait: the new quota counts at once
