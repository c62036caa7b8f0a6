"""Timers that a process has made (timer_create(2)): each sends a signal when it is over."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timer"]

_OVERRUN_MAX = 0x7FFF_FFFF


@dataclass(slots=True)
class Timer:
    """``number``: the signal; 0: none. ``tid``: the thread that gets it; 0: the process. ``at``: when it is over next
    (``System.monotonic``); 0: never. ``pending``: its signal is, and it sends no other until that is taken; ``missed``:
    how often it would have meanwhile. ``overrun``: the same of the last one taken."""

    clock: int
    number: int
    value: int = 0
    tid: int = 0
    at: int = 0
    interval: int = 0
    overrun: int = 0
    pending: bool = False
    missed: int = 0

    @property
    def due(self) -> int:
        """When it sends its signal next; 0: not of itself."""
        return self.at if self.number and not self.pending else 0

    def expire(self, now: int) -> int:
        """How often it is over until now; then it is about to be so next."""
        if not self.at or self.at > now:
            return 0
        times = 1 + (now - self.at) // self.interval if self.interval else 1
        self.at = self.at + times * self.interval if self.interval else 0
        return times

    def take(self, now: int) -> int:
        """Its signal is taken: what ``overrun`` is from now on."""
        self.overrun = min(self.missed + self.expire(now), _OVERRUN_MAX)
        self.pending, self.missed = False, 0
        return self.overrun
