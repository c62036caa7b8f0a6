"""The source's control connection: what it says, what it hears, and an end to every wait.

The target's program says ``Alive`` every second with the number of page messages it has taken. A wait lasts as
long as there is progress (an answer, or more pages), and no longer than ``patience`` without: while the guest
stands still that is short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from ...errors import VmmError
from . import wire
from .addresses import Address
from .keys import Keys
from .report import MigrationError
from .sockets import connect
from .wire import Alive, Answer, Ping, Refused, Wire, WireError, decode_answer, frames

__all__ = ["PAUSED_PATIENCE", "RUNNING_PATIENCE", "Busy", "GoneThere", "Lost", "Talk"]

RUNNING_PATIENCE = 30.0     # seconds without progress after which the target is given up
PAUSED_PATIENCE = 7.0       # while the guest stands still
_PING_EVERY = 2.0
_LINGER_MS = 1000

_A = TypeVar("_A", bound=Answer)


class Lost(MigrationError):
    """The connection to the target broke, or nothing comes through it."""


class GoneThere(MigrationError):
    """Post-copy: the machine ran at the target, and has ended."""


class Busy(MigrationError):
    """The target is receiving another machine."""


class Talk:
    """Connected. ``waiting`` is called now and then while something is awaited (to show progress)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: Address, keys: Keys | None, until: float,
                 waiting: Callable[[], None]) -> None:
        self._address = address
        self._waiting = waiting
        self._connection = connect(context, address, keys, until=until, waiting=waiting)
        self._taken = 0
        self._moved = self._pinged = time.monotonic()
        #: Seconds without progress that are borne.
        self.patience = RUNNING_PATIENCE

    def error(self, why: str, kind: type[MigrationError] = MigrationError) -> MigrationError:
        """That names the address."""
        return kind(f"{self._address.text}: {why}")

    @property
    def sock(self) -> zmq.Socket[bytes]:
        """The DEALER."""
        return self._connection.sock

    def send(self, message: Wire) -> None:
        """Raises Lost."""
        self._pinged = time.monotonic()
        try:
            self.sock.send_multipart(frames(message), zmq.DONTWAIT)
        except zmq.Again:
            raise self.error("the target does not take what is sent", Lost) from None

    def begin(self) -> None:
        """From now on progress is awaited."""
        self._moved = time.monotonic()

    def hear(self, timeout: float) -> Answer | None:
        """The next answer but for Alive; None when there was none in time. Raises Lost, and WireError."""
        until = time.monotonic() + timeout
        while True:
            left = max(0, int((until - time.monotonic()) * 1000))
            if not self.sock.poll(left):
                self._look()
                return None
            answer = decode_answer(self.sock.recv_multipart())
            if not isinstance(answer, Alive):
                self.begin()
                return answer
            if answer.messages != self._taken:
                self._taken = answer.messages
                self.begin()

    def _look(self) -> None:
        """Nothing is there to be read. Raises Lost when nothing will be."""
        if self._connection.broken and not self.sock.poll(0):
            raise self.error("the target has disconnected", Lost)
        now = time.monotonic()
        if now - self._moved > self.patience:
            raise self.error(f"the target made no progress for {self.patience:.0f} s", Lost)
        if now - self._pinged > _PING_EVERY:
            self.send(Ping())

    def check(self) -> None:
        """While pages are sent nothing is to be heard. Raises MigrationError for a target that has refused or
        gone."""
        self._waiting()
        answer = self.hear(0.0)
        if answer is not None:
            self.unexpected(answer)

    def expect(self, kind: type[_A]) -> _A:
        """Wait for this answer. Raises MigrationError, Lost."""
        self.begin()
        while True:
            answer = self.hear(0.1)
            if isinstance(answer, kind):
                return answer
            if answer is not None:
                self.unexpected(answer)
            self._waiting()

    def unexpected(self, answer: Answer) -> None:
        """Raises MigrationError."""
        if isinstance(answer, Refused):
            raise self.error(f"the target refused: {answer.error}")
        if isinstance(answer, wire.Busy):
            raise self.error("the target is busy: another machine is being received there", Busy)
        raise WireError(f"{self._address.text}: the target sent {type(answer).__name__} out of turn")

    def close(self, farewell: Wire | None = None) -> None:
        """``farewell`` is the last word, if it can still be said."""
        if farewell is not None:
            try:
                self.send(farewell)
            except (VmmError, zmq.ZMQError):
                farewell = None
        self._connection.close(linger_ms=_LINGER_MS if farewell is not None else 0)
