"""What a call that has to wait, or does not come back, raises."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["Blocked", "Ended"]


class Blocked(Exception):
    """It cannot be served now: the thread makes it again when one of ``on`` has been notified (``System.notify``), at
    the latest at ``deadline`` (CLOCK_MONOTONIC, in nanoseconds; None: no matter how long that takes)."""

    def __init__(self, deadline: int | None = None, on: tuple[Hashable, ...] = ()) -> None:
        super().__init__()
        self.deadline, self.on = deadline, on


class Ended(Exception):
    """The thread does not come back from this call."""
