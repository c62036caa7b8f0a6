"""System calls as they are made, for who wants to see them: kept in a ring, from which each takes what is new to it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from .arguments import Shown
from .blocked import Again, Blocked, Ended

if TYPE_CHECKING:
    from .processes import Thread

__all__ = ["Tracer"]

_KEPT = 16384           # calls
_ANSWER = 2000          # in an answer
_PATIENCE = 2.0         # seconds after which somebody who has not asked again wants no more

#: Of a call that a signal has ended, and that is made again: as within Linux.
_RESTART = "? ERESTARTSYS"


class Tracer:
    """It stands before ``call`` (``System.call``) as long as it is ``wanted``."""

    def __init__(self, call: Callable[[Thread, int, Sequence[int]], int], now: Callable[[], float] = time.monotonic,
                 kept: int = _KEPT) -> None:
        """``now``: in seconds."""
        self._call, self._now = call, now
        self._asked: dict[str, float] = {}              # {who: until when it is heard}
        self._until = 0.0
        self._made: deque[dict[str, Any]] = deque(maxlen=kept)
        self._next = 0                                  # number of the next call
        self._begun: dict[Thread, tuple[float, Shown]] = {}

    @property
    def wanted(self) -> bool:
        """By somebody. Who has died has not asked again."""
        return self._now() < self._until

    def ask(self, client: str, on: bool, after: int) -> dict[str, Any]:
        """``calls``, and ``next``: what to ask for then; ``more``: there are more already. ``lost``: calls that are no
        longer kept; ``stopped``: this client has asked so late that there may be others, which were never kept."""
        now = self._now()
        if now >= self._until:
            self._begun.clear()     # what has become of those is not known
        known = self._asked.get(client, 0.0) > now
        self._asked = {each: until for each, until in self._asked.items() if until > now and each != client}
        if on:
            self._asked[client] = now + _PATIENCE
        self._until = max(self._asked.values(), default=0.0)
        oldest = self._next - len(self._made)
        first = self._next if after < 0 else min(max(after, oldest), self._next)
        calls = list(islice(self._made, first - oldest, first - oldest + _ANSWER))
        following = first + len(calls)
        return {"calls": calls, "next": following, "more": following < self._next,
                "lost": max(0, first - after) if after >= 0 else 0, "stopped": after >= 0 and not known}

    def call(self, thread: Thread, number: int, arguments: Sequence[int]) -> int:
        """A call, or one that was blocked, again. Raises as that does."""
        if thread not in self._begun:
            self._begun[thread] = self._now(), Shown(thread.process.space, number, arguments)
        try:
            result = self._call(thread, number, arguments)
        except Blocked:
            raise
        except Again:       # its worker serves it
            del self._begun[thread]
            raise
        except Ended:
            self.over(thread, None)
            raise
        self.over(thread, result)
        return result

    def over(self, thread: Thread, result: int | None, *, again: bool = False) -> None:
        """A call of this thread, if it is in one. ``result``: None: it does not come back; ``again``: to this call."""
        began, shown = self._begun.pop(thread, (0.0, None))
        if shown is None:
            return
        now = self._now()
        self._made.append({
            "pid": thread.process.pid, "tid": thread.tid, "name": shown.name,
            "arguments": shown.arguments(thread.process.space, result),
            "result": _RESTART if again else shown.result(result), "error": shown.error(result),
            "at": now, "seconds": now - began})
        self._next += 1
