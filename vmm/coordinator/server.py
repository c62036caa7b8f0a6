"""The coordinator's end of the control socket (vmm/machine/verbs.py has the verbs, vmm/client/connection.py the
client's end).

A client gets what it asks for, one request after the other, and no client more than its share of a turn of the
loop. Whatever a verb raises is that verb's answer: one that fails never ends the machine.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ipc.lanes import Kind, Lane
from ipc.lines import LINE_MAX, LineConnection, LineListener, LineTooLong
from ipc.shm import SegmentError
from ipc.steps import step

from ..errors import ExitCode, VmmError
from ..machine import verbs as control
from .events import EventLog

__all__ = ["ControlServer", "Handler"]

Handler = Callable[[Any], dict[str, Any] | None]

_CONNECTIONS = 128
_ACCEPTS = 16           # connections that are taken in a turn
_TURN = 0.010           # seconds of verbs in a turn; the one that is being served then is still answered

_log = logging.getLogger(__name__)


class ControlServer:
    """``before`` is called before each verb with the process id of the client: of the peer of the socket, seen from
    here; 0 when it is in a PID namespace that is not seen from here. ``verbs``: what is called with the verb; it
    gives the answer's result (None: an empty one), or raises. ``Events`` is this class's own. ``lane``: where each
    verb is written down."""

    def __init__(self, machine: str, directory: Path, verbs: dict[type[control.Verb], Handler],
                 before: Callable[[int], None], events: EventLog, lane: Lane | None = None) -> None:
        """Raises OSError."""
        self._lane = lane or Lane.of_nobody()
        self._machine = machine
        self._verbs = verbs
        self._before = before
        self._events = events
        self._listener = LineListener(directory / "control")
        self._connections: dict[int, LineConnection] = {}   # by descriptor; who was served last is the last
        self._waiting: dict[int, tuple[int, int]] = {}      # {descriptor: (id, after)} of requests for events

    # --- for the loop ------------------------------------------------------------------------

    def interests(self) -> dict[int, int]:
        """{descriptor: events to poll for}, as zmq.Poller has them."""
        found: dict[int, int] = {self._listener.fileno(): zmq.POLLIN}
        for fd, connection in self._connections.items():
            if connection.sending:
                found[fd] = zmq.POLLOUT
            elif not connection.lines:      # who has asked already is not read from
                found[fd] = zmq.POLLIN
        return found

    @property
    def behind(self) -> bool:
        """Requests are waiting to be served in the next turn."""
        return any(c.lines and not c.sending for c in self._connections.values())

    def serve(self, ready: Mapping[int, int]) -> None:
        """One turn: what is ready ({descriptor: events}) is read and written, and some requests are served."""
        for fd, happened in ready.items():
            if fd in self._connections:
                self._exchange(self._connections[fd], happened)
        if self._listener.fileno() in ready:
            self._accept()      # now, when those that have hung up are out of the way
        deadline = time.monotonic() + _TURN
        for fd in list(self._connections):
            connection = self._connections.get(fd)
            if connection is not None and connection.lines and not connection.sending:
                self._connections[fd] = self._connections.pop(fd)       # the last in the next turn
                self._serve_one(connection)
                if time.monotonic() > deadline:
                    return

    def answer_waiting(self) -> None:
        """Give those their events who wait for some."""
        if not self._waiting:
            return
        for fd, (number, after) in list(self._waiting.items()):
            connection = self._connections[fd]
            result = None if connection.sending else self._events.since(after)
            if result is not None:
                del self._waiting[fd]
                self._send(connection, _encode({"id": number, "result": result}))

    # --- connections -------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            connection = self._listener.accept()
            if connection is None:
                return
            if connection.uid not in (os.geteuid(), 0):
                connection.close()
            elif len(self._connections) >= _CONNECTIONS:
                self._refuse(connection, f"machine '{self._machine}' already has {_CONNECTIONS} connections to its "
                                         "control socket: close some of them")
            else:
                self._connections[connection.fileno()] = connection

    def _exchange(self, connection: LineConnection, happened: int) -> None:
        try:
            if happened & zmq.POLLOUT:
                connection.flush()
            elif happened & zmq.POLLIN:
                if not connection.receive() and not connection.lines:
                    self._drop(connection)
            elif happened:      # hung up, and nothing can be read any more
                self._drop(connection)
        except LineTooLong:
            self._drop(connection, f"bad request: more than {LINE_MAX} bytes")
        except OSError:
            self._drop(connection)

    def _refuse(self, connection: LineConnection, error: str) -> None:
        try:
            connection.send(_error(0, error, ExitCode.BAD_INPUT))
        except OSError:
            pass    # it has gone by itself
        connection.close()

    def _drop(self, connection: LineConnection, error: str = "") -> None:
        fd = connection.fileno()
        self._connections.pop(fd, None)
        self._waiting.pop(fd, None)
        if error:
            self._refuse(connection, error)
        connection.close()

    def _send(self, connection: LineConnection, answer: bytes) -> None:
        try:
            connection.send(answer)
        except OSError:
            self._drop(connection)

    # --- verbs -------------------------------------------------------------------------------

    def _serve_one(self, connection: LineConnection) -> None:
        line = connection.lines.popleft()
        answer = self._answer(connection, line)
        if answer is not None:
            self._send(connection, answer)

    def _answer(self, connection: LineConnection, line: bytes) -> bytes | None:
        """None: it comes later."""
        number, name = 0, "a request"
        try:
            verb = control.decode_verb(line)
            number, name = verb.id, type(verb).__name__
            if isinstance(verb, control.Events):
                self._waiting[connection.fileno()] = (number, verb.after)
                return None
            began = time.perf_counter_ns()
            self._before(connection.pid)
            step("verb")
            try:
                result = self._verbs[type(verb)](verb)
            finally:
                self._lane.put(Kind.VERB, time.perf_counter_ns() - began, connection.pid,
                               control.VERB_NAMES.index(name), began)
            step("verb-carried-out")
            return _encode({"id": number, "result": result or {}})
        except VmmError as exc:
            return _error(getattr(exc, "request_id", number), str(exc), exc.exit_code)
        except SegmentError as exc:
            return _error(number, str(exc), ExitCode.BAD_INPUT)
        except OSError as exc:
            _log.exception("%s failed", name)
            return _error(number, f"machine '{self._machine}': {name} failed: {exc}", ExitCode.BAD_INPUT)
        except Exception as exc:
            _log.exception("%s failed", name)
            return _error(number, f"machine '{self._machine}': {name} failed: {type(exc).__name__}: {exc} (this is "
                                  f"a bug; see vmm logs {self._machine})", ExitCode.BUG)

    def close(self) -> None:
        """Who waits for events has the last of them first."""
        self.answer_waiting()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()


def _encode(answer: dict[str, Any]) -> bytes:
    return msgspec.json.encode(answer)


def _error(number: int, text: str, code: ExitCode) -> bytes:
    return _encode({"id": number, "error": text, "code": int(code)})
