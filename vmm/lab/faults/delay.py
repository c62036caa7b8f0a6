"""Messages that come late: what the two ends of a migration say to each other.

A relay takes the target's place at a Unix socket and forwards every connection both ways, each piece after a random
time; what was sent on one connection stays in its order. So a page, a round's end, ``commit`` and ``running`` come
late, and the connections get ahead of one another. It is the one path of the product whose ends find each other by an
address that they are given. Coordinator, workers and keeper know each other by pid (SO_PEERCRED) and share memory:
nothing can stand in between, and their messages are late when one of them is stopped.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from pathlib import Path

__all__ = ["Relay"]

_PIECE = 1 << 18        # bytes, at most, that are held together


class Relay:
    """``with`` it: ``address`` leads to the listener at ``path``. ``delay_ms``: each piece is held for so long at
    most. ``held``: pieces so far."""

    def __init__(self, path: Path, delay_ms: int) -> None:
        self.address = f"ipc://{path}.late"
        self.held = 0
        self._there = str(path)
        self._path = Path(f"{path}.late")
        self._seconds = delay_ms / 1000
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):      # closed
            while True:
                one, _ = self._listener.accept()
                other = socket.socket(socket.AF_UNIX)
                self._sockets += [one, other]
                try:
                    other.connect(self._there)
                except OSError:     # nobody listens there any more, which is what the other end is to see
                    one.shutdown(socket.SHUT_RDWR)
                    continue
                for pair in ((one, other), (other, one)):
                    self._threads.append(threading.Thread(target=self._forward, args=pair))
                    self._threads[-1].start()

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        """One way, to its end: what was said last still arrives though the other way has ended."""
        with contextlib.suppress(OSError):
            while data := one.recv(_PIECE):
                time.sleep(random.random() * self._seconds)
                self.held += 1
                with contextlib.suppress(OSError):      # it has gone
                    other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for each in (*self._sockets, self._listener):
            each.close()
        self._path.unlink()
