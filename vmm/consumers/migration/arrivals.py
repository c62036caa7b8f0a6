"""Pages as they arrive at the target: a thread for each connection takes them off it and writes them where they
belong. What comes after the start (post-copy) goes to who asks for it: the guest may wait for it.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable

from ...errors import VmmError
from .streams import Stream
from .wire import POSTCOPY, Buffer, Join, OnStream, Pages, Torn, Want, WireError

__all__ = ["Arrivals"]

_PATIENCE = 10.0            # seconds for a connection to say that it is this migration's
_STRANGERS = 64             # that have not said it


class Arrivals:
    """``write`` is called with pages of a round, in any thread; it gives what of them was torn. ``tls``: what comes is
    encrypted. ``with`` it.

    ``fd`` is readable when there is news: a round whose pages are all here (``rounds``), pages of post-copy
    (``next``), or a connection that has ended (``check``)."""

    def __init__(self, write: Callable[[Pages, Buffer], Torn | None], tls: ssl.SSLContext | None = None) -> None:
        self._write = write
        self._tls = tls
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._token = ""
        self._strangers = threading.BoundedSemaphore(_STRANGERS)
        self._streams: set[Stream] = set()
        self._asked: Stream | None = None
        self._over = False
        self._messages: dict[int, int] = {}     # {round: messages of pages}
        self._expected: dict[int, int] = {}     # {round: messages that the source says it sent}
        self._torn: dict[int, list[Torn]] = {}
        self._waiting: deque[tuple[Pages, bytes]] = deque()
        self._error: Exception | None = None
        #: Messages that have come so far.
        self.taken = 0

    def expect(self, token: str) -> None:
        """From now on those are let in who know it."""
        self._token = token

    def serve(self, sock: socket.socket) -> None:
        """Take what comes over a connection, to its end."""
        if not self._strangers.acquire(blocking=False):
            return
        joins = False
        try:
            stream = self._stream(sock)
            joins = stream is not None and self._joins(stream)
        finally:
            self._strangers.release()
        if stream is None:
            return
        with stream:
            try:
                if joins:
                    self._take(stream)
            except Exception as exc:
                with self._lock:
                    if stream in self._streams:         # it is still one of ours
                        self._error = self._error or exc
            finally:
                with self._lock:
                    self._streams.discard(stream)
                self._wake()

    def _stream(self, sock: socket.socket) -> Stream | None:
        """None where it is a stranger's, or the end."""
        if self._tls is not None:
            try:
                sock.settimeout(_PATIENCE)
                sock = self._tls.wrap_socket(sock, server_side=True)
            except OSError:
                return None
        stream = Stream(sock)
        with self._lock:
            if not self._over:
                self._streams.add(stream)
                return stream
        stream.close()
        return None

    def _joins(self, stream: Stream) -> bool:
        """It belongs to this migration."""
        stream.bear(_PATIENCE)
        with contextlib.suppress(WireError):
            match _next(stream):
                case (Join(token=token, asked=asked), _) if self._token and hmac.compare_digest(
                        token.encode(), self._token.encode()):
                    if asked:
                        with self._lock:
                            self._asked = stream
                    return True
        return False

    def _take(self, stream: Stream) -> None:
        stream.bear(None)
        while (received := _next(stream)) is not None:
            message, data = received
            if not isinstance(message, Pages):
                raise WireError(f"the source sent {type(message).__name__} out of turn")
            with self._lock:
                self.taken += 1
            if message.round == POSTCOPY:
                self._waiting.append((message, bytes(data)))
                self._wake()
                continue
            torn = self._write(message, data)
            with self._lock:
                number = message.round
                self._messages[number] = self._messages.get(number, 0) + 1
                if torn is not None:
                    self._torn.setdefault(number, []).append(torn)
                complete = self._messages[number] == self._expected.get(number)
            if complete:
                self._wake()

    def _wake(self) -> None:
        with self._lock:
            if not self._over:
                os.eventfd_write(self.fd, 1)

    def seen(self) -> None:
        """What there is will be looked at: ``fd`` is no longer readable, until there is more."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def check(self) -> None:
        """Raises what a connection has ended with: WireError, VmmError."""
        with self._lock:
            error, self._error = self._error, None
        if isinstance(error, VmmError):
            raise error
        if error is not None:
            raise VmmError(f"pages that have come could not be taken: {error}") from error

    def round_end(self, number: int, messages: int) -> None:
        """So many messages were sent in this round."""
        with self._lock:
            self._expected[number] = messages

    def rounds(self) -> list[tuple[int, list[Torn]]]:
        """Those whose pages have all been written since they were last asked for, with what was torn in them."""
        with self._lock:
            found = [n for n, messages in self._expected.items() if self._messages.get(n, 0) == messages]
            for number in found:
                del self._expected[number]
                self._messages.pop(number, None)
            return [(number, self._torn.pop(number, [])) for number in found]

    def ask(self, message: Want) -> bool:
        """Over the connection that is for that. False where there is none, or it has broken."""
        with self._lock:
            stream = self._asked if self._asked in self._streams else None
        if stream is None:
            return False
        try:
            stream.send(message)
        except OSError:
            return False
        return True

    def next(self) -> tuple[Pages, bytes] | None:
        """Of post-copy, what has come first."""
        return self._waiting.popleft() if self._waiting else None

    def drop(self) -> None:
        """The connections that there are belong to a source that has gone."""
        with self._lock:
            streams, self._streams = self._streams, set()
        for stream in streams:
            stream.shut()

    def close(self) -> None:
        """Nothing is written any more once the door (door.py), whose threads these are, is closed too."""
        with self._lock:
            if self._over:
                return
            self._over = True
        self.drop()
        os.close(self.fd)

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _next(stream: Stream) -> tuple[OnStream, memoryview] | None:
    """None at its end, or when it has broken: what that means the control connection says. Raises WireError."""
    try:
        return stream.receive()
    except OSError:
        return None
