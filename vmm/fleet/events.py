"""What became of a fleet's machines and nodes, as it is told: a line each, the last thousand."""

from __future__ import annotations

import datetime
from collections import deque
from dataclasses import dataclass

__all__ = ["Event", "Events"]

_KEPT = 1000


@dataclass(frozen=True)
class Event:
    """``number``: from 0 on. ``at``: ISO 8601, UTC."""

    number: int
    at: str
    text: str


class Events:
    """The oldest first."""

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=_KEPT)
        #: The number that the next one will have.
        self.next = 0

    def say(self, text: str) -> None:
        """It has happened just now."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._kept.append(Event(self.next, at, text))
        self.next += 1

    def since(self, number: int) -> list[Event]:
        """Those from this number on, as far as they are kept."""
        return [event for event in self._kept if event.number >= number]
