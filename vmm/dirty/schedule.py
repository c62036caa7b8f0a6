"""When to reap next, and when to reset: decisions without I/O."""

from __future__ import annotations

from ..machine.spec import ReaperSpec

__all__ = ["FILL_TARGET", "Schedule"]

#: Wake when the fastest ring is expected to have filled this much of what is free in it.
FILL_TARGET = 0.4


class Schedule:
    """When to reap next, and whether the rings are to be reset then.

    ``fixed`` is QEMU's constant sleep. ``adaptive`` learns each ring's dirtying rate (entries per
    second; up at once, down by half a reap) and wakes when 40 % of what is free in the fastest ring would be
    filled, so that twice the learnt rate still meets no soft-full, within ``min_interval``..``max_interval``.

    A reap need not reset what it has harvested: then less is free (``room``), and the next reap comes sooner. Where
    that could not be in time any more, ``is_low``. In time is as soon as a reap may follow, with what reaps have been
    late by and resets have taken of late.
    """

    def __init__(self, spec: ReaperSpec) -> None:
        self._spec = spec
        self._rates: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._due = 0.0
        #: Seconds that were planned last.
        self.interval = 0.0
        self._late = self._resetting = 0.0      # seconds

    def woken(self, now: float) -> None:
        """A reap that was due begins."""
        late = max(0.0, now - self._due)
        self._late = max(late, (self._late + late) / 2)

    def was_reset(self, took: float) -> None:
        """The rings have been reset, within so many seconds."""
        self._resetting = max(took, (self._resetting + took) / 2)

    def learn(self, now: float, harvested: dict[int, int]) -> None:
        """After a reap at ``now`` (monotonic seconds): {vCPU index: entries since its last}."""
        for index, count in harvested.items():
            elapsed = max(now - self._last.get(index, now - self._spec.max_interval), 1e-6)
            rate = count / elapsed
            self._rates[index] = max(rate, (self._rates.get(index, 0.0) + rate) / 2)
            self._last[index] = now

    def is_low(self, room: dict[int, int]) -> bool:
        """{vCPU index: entries that are free in its ring}: what is free in one may be filled before another reap."""
        spec = self._spec
        soonest = (spec.interval if spec.mode == "fixed" else spec.min_interval) + self._late + self._resetting
        return self._until_filled(room, soonest + 1.0) < soonest

    def plan(self, now: float, room: dict[int, int]) -> float:
        """Seconds until the next reap, from ``now``; remembers when it is due."""
        spec = self._spec
        wait = spec.interval
        if spec.mode == "adaptive":
            wait = min(max(self._until_filled(room, spec.max_interval), spec.min_interval), spec.max_interval)
        self.interval, self._due = wait, now + wait
        return wait

    def _until_filled(self, room: dict[int, int], never: float) -> float:
        """Seconds until the fastest ring has filled FILL_TARGET of what is free in it."""
        return min((FILL_TARGET * free / self._rates[index] for index, free in room.items()
                    if self._rates.get(index, 0.0) > 0), default=never)

    def left(self, now: float) -> float:
        return max(0.0, self._due - now)
