"""Post-copy, the source's side: the guest runs at the target, and what is missing there is sent, what it asks for
first. The machine stays paused here, with its memory as it was handed over, until the target has every page."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .channels import Channels, Job
from .memory import SentMemory
from .pages import PAGE, page_numbers
from .report import Report
from .talk import RUNNING_PATIENCE, GoneThere, Lost, Talk
from .wire import POSTCOPY, Complete, Ended, Want, WireError

__all__ = ["serve"]

_CHUNK_PAGES = 64           # what is asked for must not wait long behind a message
_WINDOW = 1 << 16           # pages looked at for the next chunk


def serve(talk: Talk, channels: Channels, memory: SentMemory, there: dict[int, NDArray[np.int64]], report: Report,
          tell: Callable[[], None]) -> None:
    """Until the target says that it has everything. ``there``: the pages that are missing there, {slot: pages}.
    Raises Lost when the connection breaks (what had not arrived by then is still missing), GoneThere when the
    machine has ended there."""
    talk.patience = RUNNING_PATIENCE
    talk.begin()
    work = _Missing({slot: pages for slot, pages in there.items() if len(pages)})
    ram, of = report.ram, {slot: memory[slot] for slot in there}

    def answer(want: Want) -> Job:
        pages = work.wanted(talk, want)
        ram.postcopy_requests += len(pages)
        ram.postcopy_pages += work.sent(want.slot, pages)
        return Job(POSTCOPY, want.slot, of[want.slot], pages)

    channels.answer(answer)
    while True:
        ram.remaining = work.left * PAGE
        tell()
        wait = 0.1
        if (job := work.next()) is not None:
            slot, pages = job
            wait = 0.0 if channels.put(Job(POSTCOPY, slot, of[slot], pages), 0.0) else 0.001
            if not wait:
                ram.postcopy_pages += work.sent(slot, pages)
        while (said := talk.hear(wait)) is not None:
            wait = 0.0
            match said:
                case Complete(blocked=blocked):
                    report.postcopy_blocktime, report.postcopy_latency = blocked, said.latency
                    return
                case Want():        # it has no connection for that, or that one has broken
                    channels.send_now(answer(said))
                case Ended(error=error):
                    raise talk.error(f"the machine has ended there: {error}", GoneThere)
        if channels.failure:
            raise talk.error(channels.failure, Lost)


class _Missing:
    """Pages that were not sent yet, and where to continue. A cursor jumps to what was asked for last, since its
    neighbours will be wanted too. Two threads may use it."""

    def __init__(self, pages: dict[int, NDArray[np.int64]]) -> None:
        self.left = sum(len(p) for p in pages.values())
        self._bits = {slot: np.zeros(int(p[-1]) + 1, bool) for slot, p in pages.items()}
        for slot, bits in self._bits.items():
            bits[pages[slot]] = True
        self._cursor = dict.fromkeys(self._bits, 0)
        self._lock = threading.Lock()

    def next(self) -> tuple[int, NDArray[np.int64]] | None:
        """Pages of a slot from where its cursor is, round and round."""
        if not self.left:
            return None
        for slot, bits in self._bits.items():
            with self._lock:    # else numpy counts the bits, and finds others when it looks where they are
                at = self._cursor[slot]
                found = np.flatnonzero(bits[at:at + _WINDOW])[:_CHUNK_PAGES] + at
                if not len(found):
                    found = np.flatnonzero(bits)[:_CHUNK_PAGES]
            if len(found):
                return slot, found
        return None

    def wanted(self, talk: Talk, message: Want) -> NDArray[np.int64]:
        """Raises WireError."""
        if message.slot not in self._bits:
            raise WireError(str(talk.error(f"the target wants pages of slot {message.slot}, which is missing none")))
        return page_numbers(message, len(self._bits[message.slot]))

    def sent(self, slot: int, pages: NDArray[np.int64]) -> int:
        """How many of them were not before."""
        bits = self._bits[slot]
        with self._lock:
            fresh = int(bits[pages].sum())
            bits[pages] = False
            self._cursor[slot] = int(pages[-1]) + 1
            self.left -= fresh
        return fresh
