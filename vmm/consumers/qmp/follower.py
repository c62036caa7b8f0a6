"""What happens to the machine until it ends, whichever processes it has: for a thread of its own, with a connection of
its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ...client.machine import Machine
from ...errors import ExitCode, VmmError
from ...machine.records import outcome
from ...machine.runtime import goes_on, is_upgrading
from .story import Story, Told

__all__ = ["Follower"]

_HEAR_S = 0.5               # for events, before it is looked whether this is to end
_AGAIN_S = 0.1              # before a machine that did not answer is asked again
_LOST = {"exit_code": int(ExitCode.WORKER_DIED)}


class Follower:
    """``tell`` is called with what there is to tell, until ``over`` is set."""

    def __init__(self, machine: Machine, story: Story, tell: Callable[[Told], object], over: threading.Event) -> None:
        self._machine = machine
        self._story = story
        self._tell = tell
        self._over = over

    def until_end(self) -> dict[str, Any] | None:
        """The machine's last report once it has ended; None where ``over`` came before. One that does not answer, and
        one that is being upgraded, have not ended."""
        machine, ended = self._machine, False
        while not self._over.is_set():
            try:
                ended = ended or self._hear()
            except VmmError as exc:
                ended = exc.exit_code is ExitCode.NO_MACHINE and not goes_on(machine.name)
                if not ended:
                    self._over.wait(_AGAIN_S)
            if ended and machine.goes_on():
                ended = False
            elif ended and not is_upgrading(machine.name):
                return self._last_report()
        return None

    def _hear(self) -> bool:
        """For a moment; True: it has ended. Raises VmmError."""
        for happened in self._machine.events(_HEAR_S):
            if happened["event"] == "ended":
                return True
            told = self._story.heard(happened)
            if happened["event"] == "dropped":
                told = self._story.looked(self._machine.status())
            if told:
                self._tell(told)
            if self._over.is_set():
                break
        return False

    def _last_report(self) -> dict[str, Any]:
        try:
            return self._machine.status()
        except VmmError:        # it does not linger
            return outcome(self._machine.name) or _LOST
