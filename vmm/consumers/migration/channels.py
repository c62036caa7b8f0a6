"""The source's connections for pages: threads that pack and send what is put to them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .pages import CHUNK_PAGES, PAGE, Encoding, Packer, Runs
from .streams import Sent, Stream
from .wire import Join, Pages, Want, WireError

__all__ = ["Channels", "Job", "chunk_pages"]

_QUEUE = 8                  # chunks that wait for a channel
_CHUNK_SECONDS = 0.1        # of a capped bandwidth that one message may take: then a stop comes soon


class Job(NamedTuple):
    """Pages (ascending, CHUNK_PAGES at most) of a slot whose memory this is."""

    round: int
    slot: int
    memory: Sent
    pages: NDArray[np.int64]


def chunk_pages(bandwidth: float) -> int:
    """Pages of a message, under a cap of so many bytes per second (0: none)."""
    return CHUNK_PAGES if not bandwidth else max(1, min(CHUNK_PAGES, int(bandwidth * _CHUNK_SECONDS / PAGE)))


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
    """``streams`` are theirs from now on: the first is for what the target asks for (``answer``), the others have a
    thread each. ``sums``: pages are sent with sums (pages.py). ``sent`` is called in the threads: message, bytes on the
    wire."""

    def __init__(self, streams: list[Stream], token: str, compression: Encoding, bandwidth: float,
                 sent: Callable[[Pages, int], None], *, sums: bool) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(_QUEUE)
        self._stop = threading.Event()
        self._streams = streams
        self._sent = sent
        self._now = Packer(compression, sums=sums)
        self._answers: Callable[[Want], Job] | None = None
        self._can_answer = threading.Condition()
        #: Why pages may be missing at the target; empty while all is well.
        self.failure = ""
        try:
            for number, stream in enumerate(streams):
                stream.send(Join(token, asked=number == 0))
        except OSError as exc:
            self._fail(exc)
        limiter = _Limiter(bandwidth, self._stop)
        self._threads = [threading.Thread(target=self._work, args=(s, Packer(compression, sums=sums), limiter),
                                          name="channel", daemon=True) for s in streams[1:]]
        self._threads.append(threading.Thread(target=self._be_asked, name="asked", daemon=True))
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
        """All that was put has been given to the kernel."""
        return not self._jobs.unfinished_tasks

    def answer(self, answers: Callable[[Want], Job]) -> None:
        """From now on, what the target asks for over the first connection is sent there, past all that waits, and past
        the cap of the bandwidth. ``answers`` is called in another thread."""
        with self._can_answer:
            self._answers = answers
            self._can_answer.notify_all()

    def send_now(self, job: Job) -> None:
        """The same, for what was asked otherwise. Where it fails, ``failure`` says so."""
        try:
            with self._can_answer:      # one at a time
                for message, data in self._now.pack(job.round, job.slot, job.memory.memory, job.pages):
                    self._sent(message, self._streams[0].send(message, data, job.memory))
        except OSError as exc:
            self._fail(exc)

    def _be_asked(self) -> None:
        stream = self._streams[0]
        try:
            while (received := stream.receive()) is not None:
                if not isinstance(want := received[0], Want):
                    raise WireError(f"the target sent {type(want).__name__} on a connection for pages")
                with self._can_answer:
                    self._can_answer.wait_for(lambda: self._answers is not None or self._stop.is_set())
                    answers = self._answers
                if answers is None:
                    return
                self.send_now(answers(want))
        except Exception as exc:
            if not self._stop.is_set():
                self._fail(exc)

    def _work(self, stream: Stream, packer: Packer, limiter: _Limiter) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not self._stop.is_set():
                    self._send(stream, packer, limiter, job)
            except Exception as exc:    # whatever it was, this job was not sent
                self._fail(exc)
            finally:
                with contextlib.suppress(ValueError):       # see ``close``
                    self._jobs.task_done()

    def _send(self, stream: Stream, packer: Packer, limiter: _Limiter, job: Job) -> None:
        for message, data in packer.pack(job.round, job.slot, job.memory.memory, job.pages):
            limiter.take(len(message.numbers) + (data.size if isinstance(data, Runs) else len(data)))
            if self._stop.is_set():
                return
            self._sent(message, stream.send(message, data, job.memory))

    def _fail(self, exc: Exception) -> None:
        why = str(exc) or type(exc).__name__
        self.failure = self.failure or (f"the connection of a page channel broke ({why})" if isinstance(exc, OSError)
                                        else why)
        self._stop.set()

    def close(self) -> None:
        """What is left is dropped."""
        self._stop.set()
        for stream in self._streams:
            stream.shut()
        with self._can_answer:
            self._can_answer.notify_all()
        # A signal may have thrown an exception into the middle of ``put``: its count may be wrong then, and a waiter
        # that was woken may still stand first in the line of those to be woken, where one ``notify`` is lost on it.
        with self._jobs.mutex:
            self._jobs.queue.clear()
            self._jobs.queue.extend([None] * (len(self._streams) - 1))
            self._jobs.not_empty.notify_all()
        for thread in self._threads:
            thread.join()
        for stream in self._streams:
            stream.close()
