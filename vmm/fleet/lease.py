"""The lease of a machine that may be restored elsewhere: its actor has it from the fleet, and has to ask for it again
all the time. Should the host be cut off from the fleet, the machine ends before another is restored in its place.

Time is counted from when the actor asked, and at the fleet from when it answered, which is later: however long a
message is on its way, and whichever is lost, the actor gives up first. (Clocks need not agree, only go equally fast.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["LEAST", "Lease"]

#: Seconds of a lease that leave time enough to end a machine at once, on a busy host too.
LEAST = 10.0
_OWN = 0.8                  # of the lease, after which the machine is ended: the rest of the time is for that
_OFTEN = 6                  # times that it is asked for in that time


class Lease:
    """``ask`` is given how long it may take, and says whether the lease goes on, or raises anything; ``over`` is
    called, once, by a thread, when it has not for most of so many ``seconds``. It begins with the first answer: see
    ``wait``."""

    def __init__(self, seconds: float, ask: Callable[[float], bool], over: Callable[[], None]) -> None:
        self._seconds, self._ask, self._over = seconds, ask, over
        self._last: float | None = None
        self._begun, self._given_up = threading.Event(), threading.Event()
        for work in (self._renew, self._watch):     # to ask may take longer than it is allowed to
            threading.Thread(target=work, name="lease", daemon=True).start()

    def wait(self) -> bool:
        """Until it is there; False: it has not come in its own time."""
        return self._begun.wait(self._seconds)

    def give_up(self) -> None:
        """The machine needs none any more."""
        self._given_up.set()

    def _renew(self) -> None:
        every = self._seconds / _OFTEN
        while not self._given_up.is_set():
            at = time.monotonic()
            try:
                if self._ask(every):        # one that hangs leaves time for others
                    self._last = at
                    self._begun.set()
            except Exception:       # whatever it is, there is no answer
                pass
            self._given_up.wait(max(0.0, at + every - time.monotonic()))

    def _watch(self) -> None:
        while not self._given_up.wait(self._seconds / _OFTEN / 4):
            if self._last is not None and time.monotonic() > self._last + self._seconds * _OWN:
                self._over()
                return
