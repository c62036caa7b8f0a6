"""What happens to a machine, for any client that asks: the newest events, in a bounded list.

Clients fetch events (``Events`` of vmm/machine/verbs.py); nothing is pushed at them. So a client that does not
read, or has stopped, costs nothing and holds up nothing, and one that comes too late is told how many it has missed.
The number of the next event lies in the control block: a coordinator that takes over counts on from there.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import msgspec

from ipc.layout import MachineControl

__all__ = ["EventLog"]

_EVENTS = 1 << 16
_BYTES = 8 << 20
_ANSWER = 256 << 10     # bytes of events in one answer


class EventLog:
    """The newest events; bounded in number and bytes."""

    def __init__(self, block: MachineControl) -> None:
        self._block = block
        self._kept: deque[bytes] = deque()
        self._bytes = 0

    @property
    def next(self) -> int:
        """Number of the event that comes next."""
        return int(self._block.events)

    def add(self, event: dict[str, Any]) -> None:
        encoded = msgspec.json.encode(event)
        self._kept.append(encoded)
        self._bytes += len(encoded)
        self._block.events += 1
        while len(self._kept) > _EVENTS or (self._bytes > _BYTES and len(self._kept) > 1):
            self._bytes -= len(self._kept.popleft())

    def since(self, after: int) -> dict[str, Any] | None:
        """The answer to ``Events``; None: there is none yet."""
        end = self.next
        if after >= 0 and after == end:
            return None
        if not 0 <= after < end:        # from now on; or it has a number from somewhere else
            return {"events": [], "next": end, "dropped": 0}
        first = end - len(self._kept)
        events: list[msgspec.Raw] = []
        size = 0
        for encoded in itertools.islice(self._kept, max(after, first) - first, None):
            if events and size + len(encoded) > _ANSWER:
                break
            events.append(msgspec.Raw(encoded))
            size += len(encoded)
        return {"events": events, "next": max(after, first) + len(events), "dropped": max(0, first - after)}
