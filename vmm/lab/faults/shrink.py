"""A shorter list of events that fails in the same way: parts are left out as long as it still does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import msgspec

from .plan import Episode, Event
from .run import Outcome

__all__ = ["shrink"]

_TRIES = 3          # a fault hits at another moment each time


def shrink(episode: Episode, outcome: Outcome, run: Callable[[Episode], Outcome], seconds: float) -> Episode:
    """``outcome``: of the episode, with a problem. ``run`` carries a shorter one out. Within so many seconds, and the
    one that is being tried then."""
    deadline = time.monotonic() + seconds
    wanted = _kind(outcome.problem)

    def fails(events: tuple[Event, ...]) -> bool:
        for _ in range(_TRIES):
            if time.monotonic() > deadline:
                return False
            if _kind(run(_with(episode, events)).problem) == wanted:
                return True
        return False

    events = episode.events[:outcome.at + 1] if outcome.at >= 0 else ()      # (): it could not even be launched
    size = len(events) // 2
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(events):
            shorter = events[:at] + events[at + size:]
            if shorter and fails(shorter):
                events = shorter
            else:
                at += size
        size //= 2
    return _with(episode, events)


def _with(episode: Episode, events: tuple[Event, ...]) -> Episode:
    return msgspec.structs.replace(episode, events=events)


def _kind(problem: str) -> str:
    """Without what is another each time: numbers, names, lists of pages."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", problem)[:60]
