"""SIGINT and SIGTERM for commands that keep what they have: waited with, instead of thrown."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from types import FrameType, TracebackType

__all__ = ["Interrupts", "sleep"]


def sleep(seconds: float) -> bool:
    """As ``Interrupts.wait``, for programs that have nothing to note: False."""
    time.sleep(seconds)
    return False


class Interrupts:
    """While its ``with`` lasts, a signal that would end the program is noted, and ends a ``wait``; a second one
    raises KeyboardInterrupt wherever the program is. Signals that are ignored stay so. Of the main thread."""

    def __init__(self) -> None:
        #: The signal that came first; 0: none yet.
        self.came = 0

    def __enter__(self) -> Interrupts:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._handlers = {}
        # A handler alone would not do: select goes on after it, and one that comes just before it is not seen.
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = number

    def wait(self, seconds: float) -> bool:
        """For so long, or until one comes, or not at all when one has come. Whether one has come."""
        deadline = time.monotonic() + seconds
        while not self.came:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            with contextlib.suppress(BlockingIOError):      # of another signal, perhaps
                os.read(self._read, 4096)
        return bool(self.came)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)
