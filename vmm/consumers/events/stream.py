"""The events of a running machine, from some time ago on, in the order in which they were over."""

from __future__ import annotations

import time

from ipc.lanes import Lane

from ...client.machine import Machine
from ...errors import ExitCode, VmmError
from .event import COORDINATOR, Event, of_mark, of_news, overwritten

__all__ = ["Stream"]


class Stream:
    """Of a machine that was attached to with its ``past``. ``since``: seconds before now at which it begins.
    ``close`` it. Raises VmmError."""

    def __init__(self, machine: Machine, since: float) -> None:
        self._machine = machine
        self._from = time.monotonic() - since
        self._lanes = machine.lanes()
        self._read: dict[str, int] = {}     # {source: marks that have been read}
        self._waiting: list[Event] = []     # what came after the moment up to which all of it is known
        #: The machine has.
        self.ended = False

    def next(self, seconds: float) -> list[Event]:
        """What has come by now: at most about so many seconds are waited for news from the coordinator."""
        began = time.monotonic()
        found = self._waiting
        try:
            for news in self._machine.events(seconds):
                found.append(of_news(news, time.monotonic()))
                self.ended = news["event"] == "ended"
                if found[-1].at >= began and time.monotonic() >= began + seconds:
                    break       # not before: there may be many from before
        except VmmError as exc:
            if exc.exit_code is not ExitCode.NO_MACHINE:
                raise
            self.ended = True
        until = time.monotonic()        # what was over by then is in the lanes by now
        found += self._marks()
        if self.ended and self._machine.goes_on():
            self._follow()
        found.sort(key=lambda event: event.at)
        ready = len(found) if self.ended else sum(event.at <= until for event in found)
        self._waiting = found[ready:]
        return [event for event in found[:ready] if event.at >= self._from]

    def _follow(self) -> None:
        """The machine was upgraded: its new processes have lanes of their own. Raises VmmError."""
        self._lanes.close()
        try:
            self._lanes, self._read = self._machine.lanes(), {}
            self.ended = False
        except VmmError as exc:
            if exc.exit_code is not ExitCode.NO_MACHINE:
                raise

    def _marks(self) -> list[Event]:
        found: list[Event] = []
        lanes: list[tuple[str, Lane]] = [(COORDINATOR, self._lanes.coordinator),
                                         *((f"vcpu{i}", lane) for i, lane in enumerate(self._lanes.vcpus))]
        for source, lane in lanes:
            marks, self._read[source], lost = lane.read(self._read.get(source, 0))
            if lost:    # told where the first that is known comes: only if that is later than where this begins
                found.append(overwritten(source, lost, marks[0].at / 1e9 if marks else time.monotonic()))
            found += [of_mark(source, mark) for mark in marks]
        return found

    def close(self) -> None:
        """Idempotent."""
        self._lanes.close()
