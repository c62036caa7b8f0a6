"""What a host has, as it says itself: by the actor of a machine there, or a task."""

from __future__ import annotations

from dataclasses import dataclass

from ipc.shm import room
from workers.accel import registry

__all__ = ["Look", "look"]


@dataclass(frozen=True)
class Look:
    """``memory``: bytes that a machine may still have there (of /dev/shm, the host, and memory cgroups)."""

    memory: int
    kvm: bool


def look() -> Look:
    """At this host."""
    return Look(room().free, not registry.available("kvm").reason)
