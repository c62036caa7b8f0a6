"""The source's connections for pages: threads that pack and send what is put to them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import zmq
from numpy.typing import NDArray

from .pages import CHUNK_PAGES, PAGE, Encoding, Packer
from .sockets import Connection
from .wire import Buffer, Join, Pages, frames

__all__ = ["Channels", "Job", "chunk_pages", "send_pages"]

_QUEUE = 8                  # chunks that wait for a channel
_CHUNK_SECONDS = 0.1        # of a capped bandwidth that one message may take: then a stop comes soon


class Job(NamedTuple):
    """Pages (ascending, CHUNK_PAGES at most) of a slot whose memory this is."""

    round: int
    slot: int
    memory: NDArray[np.uint8]
    pages: NDArray[np.int64]


def chunk_pages(bandwidth: float) -> int:
    """Pages of a message, under a cap of so many bytes per second (0: none)."""
    return CHUNK_PAGES if not bandwidth else max(1, min(CHUNK_PAGES, int(bandwidth * _CHUNK_SECONDS / PAGE)))


def send_pages(sock: zmq.Socket[bytes], message: Pages, data: Buffer) -> int:
    """Without a copy: ZeroMQ holds on to ``data`` until it is sent. How many bytes it is."""
    parts: list[Buffer] = [*frames(message), data] if len(data) else [*frames(message)]
    sock.send_multipart(parts, copy=False)
    return sum(len(part) for part in parts)


class _Limiter:
    """A bandwidth cap shared by the channels."""

    def __init__(self, rate: float, stop: threading.Event) -> None:
        self._rate = rate
        self._stop = stop
        self._lock = threading.Lock()
        self._free = time.monotonic()

    def take(self, size: int) -> None:
        """Wait until so many bytes may be sent, or for the stop."""
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            self._free = max(now, self._free) + size / self._rate
            wait = self._free - now
        self._stop.wait(max(0.0, wait))


class Channels:
    """``connections`` are theirs from now on. ``sent`` is called in their threads: message, bytes on the wire."""

    def __init__(self, connections: list[Connection], token: str, compression: Encoding, bandwidth: float,
                 sent: Callable[[Pages, int], None]) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(_QUEUE)
        self._stop = threading.Event()
        self._sent = sent
        #: Why pages may be missing at the target; empty while all is well.
        self.failure = ""
        limiter = _Limiter(bandwidth, self._stop)
        self._threads = [threading.Thread(target=self._work, args=(c, token, Packer(compression), limiter),
                                          name="channel", daemon=True) for c in connections]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job, timeout: float) -> bool:
        """False when there is no room within ``timeout`` seconds."""
        try:
            self._jobs.put(job, block=timeout > 0, timeout=timeout or None)
        except queue.Full:
            return False
        return True

    @property
    def idle(self) -> bool:
        """All that was put has been given to ZeroMQ."""
        return not self._jobs.unfinished_tasks

    def _work(self, connection: Connection, token: str, packer: Packer, limiter: _Limiter) -> None:
        try:
            connection.sock.send_multipart(frames(Join(token)))
            while (job := self._jobs.get()) is not None:
                try:
                    if not self._stop.is_set():
                        self._send(connection, packer, limiter, job)
                except Exception as exc:    # whatever it was, this job was not sent
                    self._fail(str(exc) or type(exc).__name__)
                finally:
                    self._jobs.task_done()
        finally:
            connection.close()

    def _send(self, connection: Connection, packer: Packer, limiter: _Limiter, job: Job) -> None:
        for message, data in packer.pack(*job):
            limiter.take(len(message.numbers) + len(data))
            while not connection.sock.poll(100, zmq.POLLOUT):
                if self._stop.is_set() or connection.broken:
                    break
            if connection.broken:
                self._fail("the connection of a page channel broke")
            if self._stop.is_set():
                return
            self._sent(message, send_pages(connection.sock, message, data))

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        self._stop.set()

    def close(self) -> None:
        """What is left is dropped."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
                self._jobs.task_done()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
