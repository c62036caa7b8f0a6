"""Whether a machine should be logged now, and (``tracking: auto``) in which mode of dirty tracking.

The rules, and the measurements that they come from, are in docs/decisions/0008 and 0020:

* nobody needs a log (no client is registered with it, nor the verifier): the slots are not logged, after a while
  without (a measurement that comes again and again should not switch each time). The mode stays;
* a dirty limit and a recording need rings;
* else rings, until they are measured to cost the guest more than bitmaps would; then bitmaps, until what a vCPU writes
  between two syncs would have fitted into a ring for a while.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["FAULT", "Demand", "Measured", "Sample"]

_IDLE = 5.0         # seconds without anybody who needs a log after which logging ends

#: Seconds that the first write to a protected page costs a vCPU (docs/benchmarks.md).
FAULT = 2.1e-6

_WINDOW = 1.0       # seconds over which it is measured what rings cost
_TOO_MUCH = 0.05    # of the vCPUs' time
_FITS = 0.5         # of a ring: it has room for what a vCPU wrote between two syncs, and for as much again
_PATIENCE = 10.0    # seconds in which all that was synced fitted, before rings are tried again
_PATIENCE_MAX = 320.0   # where they were tried in vain


@dataclass(frozen=True, slots=True)
class Sample:
    """Totals of a machine's life, while it runs."""

    now: float                  # monotonic seconds
    running: int                # vCPUs
    repeats: int                # vmm.dirty.reaper.Reaper.repeats
    stalled: float              # seconds of all vCPUs at full rings
    flushes: int
    pages: tuple[int, ...]      # that each vCPU has dirtied, as far as they have been gathered


class Measured:
    """Rings or bitmaps, while somebody needs a log that either can keep. ``room``: entries until a ring is full."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._patience = _PATIENCE
        self._tried = -math.inf         # when rings were taken for bitmaps
        self._since = 0.0               # in which all has fitted
        self._mode = ""
        self._first: Sample | None = None

    def forget(self) -> None:
        """What has been measured so far says nothing of what follows."""
        self._first = None

    def choose(self, mode: str, sample: Sample) -> str:
        """``mode``: which one it has, ``ring`` or ``bitmap``; which one it is to have."""
        first = self._first if mode == self._mode else None
        self._mode = mode
        if first is None:
            self._first, self._since = sample, sample.now
            return mode
        return self._of_rings(first, sample) if mode == "ring" else self._of_bitmaps(first, sample)

    def _of_rings(self, first: Sample, sample: Sample) -> str:
        elapsed = sample.now - first.now
        if elapsed < _WINDOW:
            return "ring"
        self._first = sample
        lost = (sample.repeats - first.repeats) * FAULT + sample.stalled - first.stalled
        if lost <= _TOO_MUCH * elapsed * max(1, sample.running):
            return "ring"
        in_vain = sample.now - self._tried < self._patience
        self._patience = min(2 * self._patience, _PATIENCE_MAX) if in_vain else _PATIENCE
        return "bitmap"

    def _of_bitmaps(self, first: Sample, sample: Sample) -> str:
        if sample.flushes == first.flushes:
            return "bitmap"
        self._first = sample
        if any(now - then > _FITS * self._room for now, then in zip(sample.pages, first.pages, strict=True)):
            self._since = sample.now
        if sample.now - self._since < self._patience:
            return "bitmap"
        self._tried = sample.now
        return "ring"


class Demand:
    """Times are monotonic seconds."""

    def __init__(self) -> None:
        self._idle_since: float | None = None

    def lasts(self, now: float, *, needed: bool, logging: bool) -> bool:
        """There should be a log: it is ``needed``, or was until a moment ago and is there still (``logging``)."""
        if needed or not logging:
            self._idle_since = None
            return needed
        if self._idle_since is None:
            self._idle_since = now
        return now - self._idle_since < _IDLE

    def forget(self) -> None:
        """A log that is not needed does not last."""
        self._idle_since = -math.inf

    def left(self, now: float) -> float | None:
        """Seconds until ``lasts`` may say something else although nothing happens; None: never."""
        return None if self._idle_since is None else max(0.0, self._idle_since + _IDLE - now)
