"""Which peers the target listens to: the source's connection, which is that of the offer, or of the last Commit with
its token. All others are told that this place is taken, or nothing. (Connections for pages: arrivals.py.)"""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import Callable

import zmq

from ...errors import ExitCode, VmmError
from .arrivals import Arrivals
from .wire import (
    Alive,
    Answer,
    Busy,
    Check,
    Commit,
    Message,
    Offer,
    OtherVersion,
    Refused,
    Unknown,
    WireError,
    decode_message,
    frames,
)

__all__ = ["LOOK_EVERY", "Gone", "Peers", "ReceiveError"]

LOOK_EVERY = 0.25           # seconds
_ALIVE_EVERY = 1.0          # seconds


class ReceiveError(VmmError):
    """No machine was received; nothing of it is left here."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.MIGRATION_FAILED) -> None:
        super().__init__(message, exit_code)


class Gone(ReceiveError):
    """The source is no longer connected."""


class Peers:
    """One migration on a ROUTER socket, whose pages are ``arrivals``. ``refused`` is told why another than the source
    was turned away; ``look`` is called every LOOK_EVERY seconds, and may raise what is to end the migration. ``known``:
    how earlier migrations have ended here, {token: what is said to their sources, should they ask again}."""

    def __init__(self, sock: zmq.Socket[bytes], arrivals: Arrivals, refused: Callable[[str], None],
                 look: Callable[[], None], known: dict[str, list[Answer]]) -> None:
        self._sock = sock
        self._arrivals = arrivals
        self._known = known
        self._refused = refused
        self._look_now = look
        #: The source; b"": there is none yet.
        self.source = b""
        #: Who sent the last Check that was let in.
        self.asker = b""
        #: Of the migration, once its offer has been taken.
        self.token = ""
        #: When the source was last heard, seconds of CLOCK_MONOTONIC.
        self.heard_at = time.monotonic()
        self._said = self._looked = self.heard_at
        self.poller = zmq.Poller()
        self.poller.register(sock, zmq.POLLIN)
        self.poller.register(arrivals.fd, zmq.POLLIN)

    def _send(self, who: bytes, message: Answer) -> None:
        """Raises Gone. What does not fit into the queue is dropped: the other end takes nothing."""
        try:
            self._sock.send_multipart([who, *frames(message)], zmq.DONTWAIT)
        except zmq.Again:
            pass
        except zmq.ZMQError as exc:
            raise Gone(f"the source has disconnected ({exc.strerror})") from None

    def say(self, *answers: Answer) -> None:
        """To the source. Raises Gone."""
        self._said = time.monotonic()
        for answer in answers:
            self._send(self.source, answer)

    def tell_stranger(self, who: bytes, answer: Answer) -> None:
        """If it is still connected."""
        with contextlib.suppress(Gone):
            self._send(who, answer)

    def hear(self, seconds: float) -> Message | None:
        """The next message of the source; None when there was none within ``seconds``, or another of the ``poller``'s
        descriptors is readable. All others are ignored, but for a source that takes over (Commit with the token) and
        those that are told that this place is taken. Raises Gone, WireError for what the source must not say,
        and what ``look`` does."""
        until = time.monotonic() + seconds
        while True:
            gone = self._look()
            left = max(0.0, min(until - time.monotonic(), LOOK_EVERY))
            ready = dict(self.poller.poll(int(left * 1000)))
            if self._arrivals.fd in ready:
                self._arrivals.seen()
            if self._sock not in ready:
                if gone is not None:
                    raise gone
                if ready or time.monotonic() >= until:
                    return None
                continue
            who, *received = self._sock.recv_multipart()
            ours = who == self.source
            try:
                message = _decode(received)
            except WireError as exc:
                if ours:
                    raise
                if isinstance(exc, OtherVersion):
                    self.tell_stranger(who, Refused(str(exc)))
                    self._refused(str(exc))
            else:
                if self._let_in(who, message, ours=ours):
                    self.heard_at = time.monotonic()
                    return message
            if time.monotonic() >= until:
                return None

    def _let_in(self, who: bytes, message: Message, *, ours: bool) -> bool:
        """The message is one of this migration's."""
        match message:
            case Commit(token=token):
                if not self._is_token(token):
                    for answer in self._verdict(token):
                        self.tell_stranger(who, answer)
                    return False
                if who != self.source:       # another process, or another connection: the old ones are void
                    self.source = who
                    self._arrivals.drop()
                return True
            case Check() if not self.source:
                self.asker = who
                return True
            case Check():
                self.tell_stranger(who, Busy())
                return False
            case Offer() if not self.source:
                self.source = who
                return True
            case Offer() if not ours:
                self.tell_stranger(who, Busy())
                return False
        return ours

    def _verdict(self, token: str) -> list[Answer]:
        """Of an earlier migration."""
        for known, verdict in self._known.items():
            if hmac.compare_digest(token.encode(), known.encode()):
                return verdict
        return [Unknown()]

    def _is_token(self, token: str) -> bool:
        return bool(self.token) and hmac.compare_digest(token.encode(), self.token.encode())

    def _look(self) -> Gone | None:
        """Now and then: say that we are alive, and see whether the machine is. The source's end, if that is so:
        what it has said before is still to be read."""
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY:
            self._looked = now
            self._look_now()
        try:
            self.alive()
        except Gone as exc:
            return exc
        return None

    def alive(self) -> None:
        """Say so, if it has not been said for a while. Raises Gone."""
        if self.source and time.monotonic() - self._said >= _ALIVE_EVERY:
            self.say(Alive(self._arrivals.taken))


def _decode(parts: list[bytes]) -> Message:
    """Raises WireError."""
    if len(parts) not in (1, 2):
        raise WireError(f"the source sent a message of {len(parts)} frames")
    return decode_message(parts[0], parts[1] if len(parts) > 1 else b"")
