"""The dirty limit of one vCPU: a token bucket in the worker itself.

A token is a page; the quota fills the bucket, and every ring entry takes one out. The vCPU runs in slices,
after each of which its entries are counted; in debt, it stays out of the guest until the quota has paid.
So the limit neither waits for a full ring (QEMU's sleeps there alone, and a large ring may never get full) nor
for the coordinator, and what one slice does too much, the next wait makes good.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

__all__ = ["SliceTimer", "TokenBucket"]

_BURST = 0.02           # seconds of quota that an idle vCPU may save up
_OVERSHOOT = 0.05       # seconds of quota that a slice may take beyond its tokens
_SLICE_MIN, _SLICE_MAX = 0.0002, 0.02
_SMOOTHING = 0.5


class TokenBucket:
    """Times are monotonic seconds; ``quota`` is pages a second."""

    def __init__(self) -> None:
        self._quota = 0.0
        self._tokens = 0.0
        self._last = 0.0
        self._pushed = 0
        self._rate = 0.0        # entries a second of guest time, smoothed

    def account(self, quota: float, now: float, pushed: int, in_guest: float) -> float:
        """``pushed`` entries in all by ``now``, of which the last ``in_guest`` seconds of guest time made what
        is new; seconds to stay out for."""
        if quota != self._quota:    # set, or changed: nothing is owed from before
            self._quota, self._tokens, self._last, self._pushed = quota, 0.0, now, pushed
            return 0.0
        fresh = max(0, pushed - self._pushed)
        burst = max(1.0, quota * _BURST)
        self._tokens = min(burst, self._tokens + quota * (now - self._last)) - fresh
        self._last, self._pushed = now, pushed
        if in_guest > 0:
            self._rate += _SMOOTHING * (fresh / in_guest - self._rate)
        return max(0.0, -self._tokens / quota)

    def slice(self) -> tuple[int, float]:
        """What the vCPU may do before it is counted again: (pages, seconds)."""
        allowed = self._tokens + self._quota * _OVERSHOOT
        seconds = min(_SLICE_MAX, max(_SLICE_MIN, allowed / self._rate if self._rate > 0 else _SLICE_MIN))
        return max(1, int(allowed)), seconds

    def forget_ring(self) -> None:
        """The ring was rebuilt: entries count from zero again."""
        self._pushed = 0


class SliceTimer:
    """Takes the vCPU thread out of the guest when its slice is over. ``interrupt`` sets the immediate-exit flag
    first, so that a signal that comes just before the entry is not lost."""

    def __init__(self, interrupt: Callable[[], None], thread: int, signum: int) -> None:
        self._interrupt = interrupt
        self._target = thread
        self._signum = signum
        self._condition = threading.Condition()
        self._deadline: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="slice", daemon=True)
        self._thread.start()    # returns when it runs: the first slice is as short as the others

    def arm(self, seconds: float) -> None:
        with self._condition:
            self._deadline = time.monotonic() + seconds
            self._condition.notify()

    def disarm(self) -> None:
        with self._condition:
            self._deadline = None

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {self._signum})
        with self._condition:
            while not self._closed:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._deadline = None
                    self._interrupt()
                    signal.pthread_kill(self._target, self._signum)
                else:
                    self._condition.wait(left)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
