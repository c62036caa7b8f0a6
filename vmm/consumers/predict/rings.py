"""Which ring a guest fits into, by what its vCPUs dirty between two looks at the log: a ring that holds all of it makes
no vCPU wait. Where none does, a bitmap costs the guest less (docs/tracking.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipc.layout import RING_MAX, RING_MIN, RING_RESERVE

from .dirtying import Guest

__all__ = ["RingFit", "fit"]

_WINDOWS = 200


@dataclass(frozen=True, slots=True)
class RingFit:
    """``interval``: seconds between two looks. ``median``, ``most``: pages that the busiest vCPU dirties in one.
    ``entries``: the smallest ring that holds the most, None where no ring does."""

    interval: float
    median: int
    most: int
    entries: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"interval": self.interval, "median": self.median, "most": self.most, "entries": self.entries,
                "tracking": "bitmap" if self.entries is None else "ring"}


def fit(guest: Guest, interval: float) -> RingFit:
    """Over the time that was recorded, in intervals of so many seconds."""
    running = guest.begin()
    count = min(max(1, int(guest.seconds / interval)), _WINDOWS)
    counts = sorted(max(running.run(interval).vcpus) for _ in range(count))
    most = counts[-1]
    entries = RING_MIN
    while entries < most + RING_RESERVE:
        entries *= 2
    return RingFit(interval, counts[count // 2], most, entries if entries <= RING_MAX else None)
