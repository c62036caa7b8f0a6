"""What a host has, as it says itself: by the actor of a machine there, or a task."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ipc.shm import room
from workers.accel import registry

from ..machine.runtime import is_running

__all__ = ["Look", "await_end", "look"]

_LOOK_EVERY = 0.05          # seconds


@dataclass(frozen=True)
class Look:
    """``memory``: bytes that another machine may have there (of /dev/shm, the host, and memory cgroups)."""

    memory: int
    kvm: bool


def look() -> Look:
    """At this host."""
    return Look(room().free, not registry.available("kvm").reason)


def await_end(machine: str, timeout: float) -> bool:
    """Whether no machine of that name runs at this host; so many seconds are waited for that."""
    deadline = time.monotonic() + timeout
    while is_running(machine):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY)
    return True
