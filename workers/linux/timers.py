"""Timers that a process has made (timer_create(2)): each sends a signal when it is over."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timer"]


@dataclass(slots=True)
class Timer:
    """``number``: the signal; 0: none. ``tid``: the thread that gets it; 0: the process. ``at``: when
    (``System.monotonic``); 0: never. ``overrun``: how often it has been over beyond what its last signal says."""

    clock: int
    number: int
    value: int = 0
    tid: int = 0
    at: int = 0
    interval: int = 0
    overrun: int = 0

    def expire(self, now: int) -> int:
        """How often it is over until now; then it is about to be so next."""
        if not self.at or self.at > now:
            return 0
        times = 1 + (now - self.at) // self.interval if self.interval else 1
        self.at = self.at + times * self.interval if self.interval else 0
        return times
