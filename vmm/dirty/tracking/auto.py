"""Whether a machine should be logged now, and (``tracking: auto``) in which mode of dirty tracking.

The rules, and the measurements that they come from, are in docs/decisions/0008 and 0020:

* a dirty limit and a recording need rings: ``ring``;
* nobody needs a log (no client is registered with it, nor the verifier): ``none``, after a while without (a
  measurement that comes again and again should not switch each time). A machine that is to be tracked in one mode
  keeps that, and its slots are not logged;
* else ``bitmap``.
"""

from __future__ import annotations

import math

__all__ = ["Demand", "best_mode"]

_IDLE = 5.0         # seconds without anybody who needs a log after which logging ends


def best_mode(*, needed: bool, ring: bool) -> str:
    """``needed``: a dirty log is; ``ring``: and what only a ring can do."""
    if ring:
        return "ring"
    return "bitmap" if needed else "none"


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
