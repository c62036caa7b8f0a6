"""The client's end of the control socket (vmm/machine/verbs.py has the verbs)."""

from __future__ import annotations

import itertools
import os
import select
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ipc.lines import LineConnection, LineTooLong, connect_lines
from ipc.linux.processid import identity

from ..errors import ExitCode, VmmError
from ..machine import verbs

__all__ = ["ControlClient"]

_ATTEMPTS = 4           # a request that was on its way when so many coordinators died is given up
_CONNECTIONS = 12       # and after so many that were lost, whosever they were
_POLL = 3600.0          # poll(2) takes 24 days at most
_RETRY = 0.02           # seconds between two attempts to connect


class _Silent(VmmError):
    """The coordinator did not answer in time."""


class _Refused(VmmError):
    """The coordinator's own answer: it has not done what it was asked for."""


class ControlClient:
    """One connection to a coordinator, or to the one that takes over when it dies. Not thread-safe, nor for a
    forked child. ``alive`` says whether the machine still runs; ``owner`` gives its keeper's pid, which is another
    once it was upgraded: its events begin anew then, and one that is ``pinned`` to a keeper takes it for gone.
    ``after``: the events that ``event`` begins behind (0: from the first; -1: those from now on). ``lease``: token of
    the lease whose holder asks."""

    def __init__(self, directory: Path, name: str, alive: Callable[[], bool], owner: Callable[[], int | None], *,
                 after: int, pinned: int | None = None) -> None:
        self.lease = ""
        self._pid = os.getpid()
        self._path = directory / "control"
        self._name = name
        self._alive = alive
        self._owner = owner
        self._pinned = self._keeper = pinned
        self._connection: LineConnection | None = None
        self._ids = itertools.count(1)
        self._token = uuid.uuid4().hex
        self._requests = itertools.count(1)
        self._unanswered: set[str] = set()      # clients of the dirty log whose last sync was not answered
        self._after = after
        self._asked_events = 0      # the id of the request for events that is with the coordinator; 0: none
        self._events: deque[dict[str, Any]] = deque()   # of one answer: no more are asked for before they are taken

    @property
    def keeper(self) -> int | None:
        """Process id of the one whose machine this was when it was last connected to."""
        return self._keeper

    def ask(self, verb: type[verbs.Verb], timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """Send one verb and wait for its answer; sent again when the coordinator died in between
        (another one takes over, and every verb may be repeated). Raises VmmError."""
        request = f"{self._token}.{next(self._requests)}"
        if issubclass(verb, verbs.Sync):
            return self._sync(arguments, request, timeout)
        return self._ask(verb, arguments, request, timeout)

    def _sync(self, arguments: dict[str, Any], request: str, timeout: float) -> dict[str, Any]:
        """What the last one took is asked for again where its answer never came (it took too long, or the program
        was interrupted): else those pages would be lost."""
        client = arguments["client"]
        arguments["again"] = again = client in self._unanswered
        self._unanswered.add(client)
        try:
            answer = self._ask(verbs.Sync, arguments, request, timeout)
        except _Refused:
            if not (again or arguments["again"]):
                self._unanswered.discard(client)    # it was asked once, and has taken nothing
            raise
        self._unanswered.discard(client)
        return answer

    def _ask(self, verb: type[verbs.Verb], arguments: dict[str, Any], request: str,
             timeout: float) -> dict[str, Any]:
        """``request``: the same whenever it is asked again."""
        deadline = time.monotonic() + timeout
        lost: list[int] = []        # whose: one that is dying can still be connected to, until its memory is gone
        while len(set(lost)) < _ATTEMPTS and len(lost) < _CONNECTIONS:
            number = self._send(verb, arguments, deadline, request)
            asked = 0 if self._connection is None else self._connection.pid
            answer = self._await(number, deadline)
            if answer is not None:
                return answer
            if self._connection is not None or time.monotonic() > deadline:
                raise self._silent(timeout)
            lost.append(asked)
            if verb is verbs.Sync:
                arguments["again"] = True       # it may have been served, and the answer was lost
        raise VmmError(f"machine '{self._name}': {_ATTEMPTS} coordinators died while handling this request (see "
                       f"vmm logs {self._name})", ExitCode.WORKER_DIED)

    def event(self, timeout: float) -> dict[str, Any] | None:
        """The next event, or None when none came within ``timeout`` seconds. ``{"event": "dropped", "count": n}``
        stands for so many that came too long ago. Raises VmmError when the machine is gone."""
        deadline = time.monotonic() + timeout
        while not self._events:
            if not self._asked_events:
                try:
                    self._asked_events = self._send(verbs.Events, {"after": self._after}, deadline)
                except _Silent:
                    return None     # one is just taking over from another
            if not self._next(deadline) and self._connection is not None:
                return None
        return self._events.popleft()

    def skip_events(self) -> None:
        """Begin behind those that there are, if it was not said where to begin."""
        if self._after < 0:
            self._take_events(self.ask(verbs.Events))

    def _send(self, verb: type[verbs.Verb], arguments: dict[str, Any], deadline: float, request: str = "") -> int:
        """The request's id. It may be lost. Raises VmmError."""
        if os.getpid() != self._pid:
            raise VmmError(f"this connection to machine '{self._name}' belongs to process {self._pid}, which "
                           "forked: attach to the machine in this process")
        number = next(self._ids)
        if issubclass(verb, verbs.Owned):
            arguments = _owned(arguments)
        frame = msgspec.json.encode(verb(v=verbs.CONTROL_VERSION, id=number, lease=self.lease, request=request,
                                         **arguments))
        while True:
            connection = self._connected(deadline)
            try:
                connection.send(frame)
                while connection.sending:
                    if not _wait(connection, select.POLLOUT, deadline):
                        self._drop()        # half of a request is with it
                        raise self._silent(0.0)
                    connection.flush()
                return number
            except OSError:
                self._drop()    # it had died before: this request was not served

    def _connected(self, deadline: float) -> LineConnection:
        """Raises VmmError when there is nobody to connect to, and will not be."""
        while self._connection is None:
            try:
                self._connection = connect_lines(self._path)
                self._look_whose()
            except OSError:
                if not self._alive():
                    raise VmmError(f"machine '{self._name}' is gone", ExitCode.NO_MACHINE) from None
                if time.monotonic() > deadline:
                    raise self._silent(0.0) from None
                time.sleep(_RETRY)
        return self._connection

    def _look_whose(self) -> None:
        """Whose coordinator this is, now that there is a connection to one. Raises VmmError when it is no longer that
        of the machine it is pinned to."""
        keeper = self._owner()
        if self._pinned is not None and keeper != self._pinned:
            self._drop()
            raise VmmError(f"machine '{self._name}' is gone" + (
                ": one of its name runs in other processes (was it upgraded?)" if keeper is not None else ""),
                ExitCode.NO_MACHINE)
        if None not in (keeper, self._keeper) and keeper != self._keeper and self._after > 0:
            self._after = 0
        self._keeper = keeper or self._keeper

    def _await(self, number: int, deadline: float) -> dict[str, Any] | None:
        """The answer to this request; None: it did not come in time, or the connection is lost."""
        while True:
            line = self._line(deadline)
            if line is None:
                return None
            answer = msgspec.json.decode(line)
            if answer["id"] in (number, 0):     # 0: it could not even be read
                if "error" in answer:
                    raise _Refused(answer["error"], ExitCode(answer.get("code", ExitCode.BAD_INPUT)))
                return dict(answer["result"])
            self._heed(answer)

    def _next(self, deadline: float) -> bool:
        """Whatever comes next has come; False: nothing did in time, or the connection is lost."""
        line = self._line(deadline)
        if line is None:
            return False
        answer = msgspec.json.decode(line)
        if answer["id"] in (0, self._asked_events) and "error" in answer:
            self._asked_events = 0
            raise VmmError(answer["error"], ExitCode(answer.get("code", ExitCode.BAD_INPUT)))
        self._heed(answer)
        return True

    def _heed(self, answer: dict[str, Any]) -> None:
        """One that was not waited for: events, or of a request that was given up."""
        if answer["id"] == self._asked_events and "result" in answer:
            self._asked_events = 0
            self._take_events(answer["result"])

    def _take_events(self, result: dict[str, Any]) -> None:
        if result["dropped"]:
            self._events.append({"event": "dropped", "count": result["dropped"]})
        self._events.extend(result["events"])
        self._after = result["next"]

    def _line(self, deadline: float) -> bytes | None:
        """None: none came in time, or the connection is lost (and dropped)."""
        connection = self._connection
        assert connection is not None
        while not connection.lines:
            if not _wait(connection, select.POLLIN, deadline):
                if time.monotonic() < deadline:
                    continue
                return None
            try:
                if connection.receive():
                    continue
            except LineTooLong:
                pass
            if not connection.lines:
                self._drop()
                return None
        return connection.lines.popleft()

    def _silent(self, timeout: float) -> _Silent:
        within = f" within {timeout:.0f} s" if timeout else ""
        return _Silent(f"machine '{self._name}' did not answer{within}", ExitCode.NO_MACHINE)

    def _drop(self) -> None:
        self._asked_events = 0
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Idempotent."""
        self._drop()


def _owned(arguments: dict[str, Any]) -> dict[str, Any]:
    """With ``mine``: when this process started. Which one it is, the coordinator sees."""
    others = {key: value for key, value in arguments.items() if key != "mine"}
    if not arguments.get("mine"):
        return others
    try:
        return {**others, "owner_start": identity().start}
    except ProcessLookupError:
        raise VmmError("cannot read /proc/self/stat: the machine could not tell when this process ends") from None


def _wait(connection: LineConnection, event: int, deadline: float) -> bool:
    """It is ready before the deadline (monotonic seconds), or _POLL seconds have passed without."""
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(min(max(0.0, deadline - time.monotonic()), _POLL) * 1000))
