"""``tracking: auto``: which mode of dirty tracking a machine should have now.

The rule, and the measurements that it comes from, are in docs/decisions/0008:

* a dirty limit and a recording need rings: ``ring``;
* no client is registered with the dirty log, nor the verifier: ``none``, after a while without (a measurement
  that comes again and again should not switch each time);
* else ``bitmap``.
"""

from __future__ import annotations

__all__ = ["AutoTracking"]

_IDLE = 5.0         # seconds without a client after which logging ends


class AutoTracking:
    """Times are monotonic seconds. Told what the machine is used for, says how to track."""

    def __init__(self) -> None:
        self._idle_since: float | None = None

    def first(self, *, logged: bool, ring: bool) -> str:
        """Of a machine that has just been made, or told to choose: at once, without waiting."""
        if ring:
            return "ring"
        return "bitmap" if logged else "none"

    def choose(self, now: float, present: str, *, logged: bool, ring: bool) -> str:
        """``logged``: the dirty log is wanted; ``ring``: and what only a ring can do."""
        wanted = self.first(logged=logged, ring=ring)
        if wanted != "none" or present == "none":
            self._idle_since = None
            return wanted
        if self._idle_since is None:
            self._idle_since = now
        return wanted if now - self._idle_since >= _IDLE else present

    def left(self, now: float) -> float | None:
        """Seconds until ``choose`` may say something else although nothing happens; None: never."""
        return None if self._idle_since is None else max(0.0, self._idle_since + _IDLE - now)
