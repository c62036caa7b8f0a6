"""When to reap next: decisions without I/O."""

from __future__ import annotations

from ..machine.spec import ReaperSpec

__all__ = ["FILL_TARGET", "Schedule"]

#: Wake when the fastest ring is expected to be this full.
FILL_TARGET = 0.4


class Schedule:
    """When to reap next.

    ``fixed`` is QEMU's constant sleep. ``adaptive`` learns each ring's dirtying rate (entries per
    second; up at once, down by half a reap) and wakes when the fastest ring would be 40 % full, so that
    twice the learnt rate still meets no soft-full, within ``min_interval``..``max_interval``.
    """

    def __init__(self, spec: ReaperSpec) -> None:
        self._spec = spec
        self._rates: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._due = 0.0

    def learn(self, now: float, harvested: dict[int, int]) -> None:
        """After a reap at ``now`` (monotonic seconds): {vCPU index: entries since its last}."""
        for index, count in harvested.items():
            elapsed = max(now - self._last.get(index, now - self._spec.max_interval), 1e-6)
            rate = count / elapsed
            self._rates[index] = max(rate, (self._rates.get(index, 0.0) + rate) / 2)
            self._last[index] = now

    def plan(self, now: float, soft_limits: dict[int, int]) -> float:
        """Seconds until the next reap, from ``now``; remembers when it is due."""
        spec = self._spec
        wait = spec.interval
        if spec.mode == "adaptive":
            wait = min((FILL_TARGET * limit / self._rates[index]
                        for index, limit in soft_limits.items() if self._rates.get(index, 0.0) > 0),
                       default=spec.max_interval)
            wait = min(max(wait, spec.min_interval), spec.max_interval)
        self._due = now + wait
        return wait

    def left(self, now: float) -> float:
        return max(0.0, self._due - now)
